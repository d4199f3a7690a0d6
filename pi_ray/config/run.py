"""A whole run file: blocks `model`, `evaluate`, `cost`, `closed`, and the checks that reach across all blocks."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from pi_ray.config.ask import AskConfig
from pi_ray.config.block import (
    Amount,
    Block,
    Count,
    Positive,
    check_storage_url,
    doc,
    forbid_unused,
    omit_default,
    refuse,
    set_key,
)
from pi_ray.config.closed import ClosedConfig
from pi_ray.config.cluster import ClusterConfig
from pi_ray.config.data import CompressConfig, RetrieveConfig, TaskConfig
from pi_ray.config.metric import MetricConfig
from pi_ray.config.serve import ServeConfig
from pi_ray.config.train import PromptConfig, ScheduleConfig, TrainConfig
from pi_ray.schedule import plan_phases

LICENCES = {"gemma3-270m": ("gemma", "https://ai.google.dev/gemma/terms")}  # base -> its licence, and where that is


class ModelConfig(Block):
    base: str = doc("smollm2-135m", "packaged name, hub id, local folder, or .gguf file")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = doc("auto", "auto: bfloat16 on GPUs, and on CPUs with "
        "AMX, or AMD's with avx512_bf16, where it trains faster; float32 on others, and for serving and compression "
        "on CPUs")
    revision: str = doc("", "hub revision, pinned")
    quantize: Literal["", "4bit"] = omit_default("", "4bit: the frozen base's linear layers in bitsandbytes' NF4, "
        "computed in bfloat16; on GPUs only")
    accept_licence: str = omit_default("", "name of the licence that you have read and accept, for a base that comes "
        "under one of its own: gemma, for gemma3-270m")


class EvaluateConfig(Block):
    split: Literal["test", "dev"] = doc("test", "rows that are scored; dev for choosing settings")
    baseline: bool = doc(True, "also train and evaluate plain fine-tuning without a prompt")
    engine: Literal["auto", "transformers", "vllm"] = omit_default("auto", "what generates answers, and those of a "
        "teacher in actors; auto: vllm where it is installed and can, else transformers, which always measures latency")
    batch_size: Positive = doc(16, "rows answered at once; fewer take less memory")
    max_new_tokens: Count = doc(0, "0: the longest answer of the data, plus a quarter")
    shots: Count = doc(0, "examples in the base model's full prompt; 0: the most that any phase has")
    latency_rows: Positive = doc(12, "rows timed one by one")
    bootstrap: Positive = doc(2000, "resamples for the 95% intervals")
    probe: bool = doc(True, "also measure forgetting (perplexity on other text) and the share of the template recited")
    knows: bool = omit_default(True, "also ask the adapter about each unit of the template, by held-out queries and "
        "dev rows, for knows.json, 'pi-ray knows' and the report")
    samples: Positive = doc(10, "rows shown side by side in the report")


class CostConfig(Block):
    """Prices in money per million tokens, for the cost table and the break-even."""

    currency: str = doc("USD", "what the prices are in")
    input: Amount = doc(0.50, "per million input tokens")
    cached_input: Amount = doc(0.05, "per million input tokens read from a prefix cache")
    output: Amount = doc(1.50, "per million output tokens")
    training_hour: Amount = doc(2.00, "one worker for an hour")
    requests_per_month: Positive = doc(1_000_000, "for the days until training is paid back")


TEACHES = ("distill", "mixed")  # objectives with a teacher
CONVERSATION_DEFAULTS = (("prompt", "conversation", True), ("schedule", "shots", 0), ("evaluate", "knows", False))


class RunConfig(Block):
    """One run.yaml."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$",
        description="of the run, its folder, its adapter in the store and the model's name in the API")]
    run_dir: str = doc("", "default: ./runs/<name>")
    store: str = doc("", "adapter store: a folder, s3://, gs://, hf:// or file://; default: ./store")
    task: TaskConfig = TaskConfig()
    ask: AskConfig = omit_default(AskConfig(), "how queries are generated, with task.queries generate")
    model: ModelConfig = ModelConfig()
    prompt: PromptConfig = PromptConfig()
    compress: CompressConfig = CompressConfig()
    retrieve: RetrieveConfig = RetrieveConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    cost: CostConfig = CostConfig()
    serve: ServeConfig = ServeConfig()
    closed: ClosedConfig = ClosedConfig()
    cluster: ClusterConfig = omit_default(ClusterConfig(), "the cluster that it runs on")

    @model_validator(mode="before")
    @classmethod
    def _set_teacher_defaults(cls, data: Any) -> Any:
        """With a teacher, no examples unless they are asked for, and those by the query: an example that was chosen by
        the row's answer gives it away, and who copies it does not learn to read the template.
        """
        train = data.get("train") if isinstance(data, dict) else None
        if (train.get("objective") if isinstance(train, dict) else getattr(train, "objective", None)) in TEACHES:
            for name, key, value in (("schedule", "shots", 0), ("retrieve", "by", "query")):
                block = data.get(name) or {}
                if isinstance(block, dict) and key not in block and block.get("name") != "list":
                    data = {**data, name: {**block, key: value}}
        return data

    @model_validator(mode="before")
    @classmethod
    def _set_conversation_defaults(cls, data: Any) -> Any:
        """With task conversations queries are conversations, which have no examples and ask for no unit of a prompt."""
        task = data.get("task") if isinstance(data, dict) else None
        name = task.get("name") if isinstance(task, dict) else getattr(task, "name", None)
        if name == "conversations":
            for block, key, value in CONVERSATION_DEFAULTS:
                given = data.get(block) or {}
                if isinstance(given, dict) and key not in given and given.get("name") != "list":
                    data = {**data, block: {**given, key: value}}
        return data

    def model_post_init(self, context: Any) -> None:
        check_storage_url(self.store, "store")
        for key, name in (("model.base", self.model.base), ("compress.model", self.compress.model)):
            licence, terms = LICENCES.get(name, ("", ""))
            refuse(licence and self.model.accept_licence != licence,
                f"{key}: {name} comes under terms of its own; read them at {terms}, and accept them with "
                f"model.accept_licence: {licence}")
        train, lora, sharded = self.train, self.train.lora, self.train.backend.shards_weights
        refuse(train.batch_size % train.workers,
            f"train.batch_size {train.batch_size} cannot be shared by train.workers {train.workers}; take a multiple")
        refuse(train.objective != "sft" and sharded and (train.distill.on_policy or train.distill.actors is False),
            "ZeRO stage 3 leaves no training worker whole weights to answer with: leave out train.distill.on_policy "
            "and train.distill.actors: false, or take train.backend.zero_stage 2 or less")
        refuse(train.micro_batch and self.rows_per_worker % train.micro_batch,
            f"train.micro_batch {train.micro_batch} does not divide the {self.rows_per_worker} rows "
            "that each worker has of a batch")
        refuse(self.model.quantize and (train.gpu is False or sharded),
            "model.quantize: 4bit needs GPUs that each hold the whole base model; "
            "leave train.gpu at auto and take train.backend.zero_stage 2 or less")
        base_teaches = train.objective != "sft" and (train.distill.teacher == "base" or train.distill.anchor)
        refuse(lora.method == "pissa" and (self.model.quantize or base_teaches),
            "train.lora.method: pissa takes its start out of the base weights: "
            "it cannot go with model.quantize, or with the base model as teacher or anchor")
        adapter_teaches = train.objective != "sft" and train.distill.teacher == "adapter"
        refuse(adapter_teaches and train.distill.on_policy and lora.method in ("pissa", "ia3"),
            f"train.distill.on_policy puts the first phase's adapter back into the model, which train.lora.method "
            f"{lora.method} does not allow; take lora, rslora or dora")
        refuse(self.evaluate.engine == "vllm" and (train.gist or lora.experts or lora.method in ("dora", "ia3")),
            "evaluate.engine: vllm answers with LoRA of linear layers alone, not with gist tokens, fused experts, DoRA "
            "or IA3; take transformers, or auto")
        refuse(self.task.generate and train.objective == "sft",
            "task.queries generate needs a teacher to answer the queries: set train.objective distill or mixed")
        refuse(self.ask != AskConfig() and not self.task.generate,
            "ask would have no effect: no queries are generated; set task.queries generate, or leave it out")
        refuse(not self.task.train and (train.objective == "sft" or train.distill.teacher == "adapter"),
            "task.train is empty: without labelled rows nothing trains a teacher; take train.objective distill, and "
            "train.distill.teacher base or endpoint")
        if train.objective != "sft":
            self._check_teacher()
        if train.gist:
            self._check_gist()
        if self.schedule.floor:
            self._check_floor()
        if self.task.name == "conversations":
            self._check_conversations()
        else:
            refuse(self.prompt.conversation, "prompt.conversation is set by task conversations alone; leave it out")

    def _check_teacher(self) -> None:
        train, distill = self.train, self.train.distill
        objective, (first, *later) = f"train.objective {train.objective}", plan_phases(self.schedule)
        if distill.teacher == "adapter":
            refuse(not later, f"{objective} needs a phase after the first: the teacher is what the first one leaves")
            refuse(first.rate < 1, f"{objective} needs a first phase with the whole template, which the teacher reads: "
                f"its rate is {first.rate:g}, take 1; train.distill.teacher base needs none")
        refuse(first.rate == 1 and not later,
            f"{objective} needs a phase with less than the whole template, in which the student learns")
        refuse(distill.teacher == "endpoint" and self.task.name != "jsonl",
            f"train.distill.teacher endpoint answers queries of your own (task.name jsonl), not of {self.task.name}")
        if distill.teacher == "endpoint":
            keys = ("tail", "label_weight", "labelled", "known_confidence", "show_labels", "on_policy", "anchor")
            forbid_unused(distill, keys, "train.distill", "an endpoint's answers are learned as labels are")
        if not self.task.train and distill.teacher == "base":
            refuse(self.task.name != "jsonl", "task.train is empty: the base answers queries of your own (task.name "
                f"jsonl) where there are no labelled rows, not of {self.task.name}; leave task.train out")
            refuse(distill.on_policy or distill.labelled, "task.train is empty: a teacher's answers are the rows, so "
                "that there are no unlabelled ones for train.distill.on_policy, and no others for "
                "train.distill.labelled; leave them out")
        refuse(self.answers_first and distill.agreement == "weight",
            "train.distill.agreement weight is for answers beside labelled rows; where a teacher's answers are the "
            "rows, take filter or off")

    def _check_gist(self) -> None:
        train = self.train
        refuse(not train.share_prefix,
            "train.gist needs train.share_prefix: the mask that hides the template is a part of it")
        refuse(train.objective != "sft",
            f"train.gist cannot be combined with train.objective {train.objective}; take sft")
        refuse(train.backend.name == "openai",
            "train.gist needs a model whose weights are here; take train.backend.name deepspeed or ddp")
        refuse(train.backend.shards_weights,
            "train.gist starts its tokens from the mean of all embeddings, which no worker has at "
            "train.backend.zero_stage 3; take 2 or less")
        for i, phase in enumerate(plan_phases(self.schedule)):
            refuse(not phase.rate, f"train.gist: phase {i} of the schedule has no template (rate 0) that gist tokens "
                "could stand for; keep rates above 0, as schedule.name constant does")

    def _check_floor(self) -> None:
        train, (first, *later) = self.train, plan_phases(self.schedule)
        refuse(train.backend.name == "openai",
            "schedule.floor needs the adapter of each phase here; take train.backend.name deepspeed or ddp")
        refuse(train.gist, "schedule.floor is about the prompt that a server sends, and gist tokens cannot be served; "
            "leave out one of schedule.floor and train.gist")
        refuse(any(p.rate > first.rate or p.shots > first.shots for p in later),
            "schedule.floor compares every phase with the first, whose prompt must be the longest; let template rate "
            "and shots fall")
        refuse(all((p.rate, p.shots) == (first.rate, first.shots) for p in later),
            "schedule.floor would have nothing to choose: every phase has the same prompt; take schedule.name linear, "
            "or leave it out")

    def _check_conversations(self) -> None:
        train, name = self.train, "task conversations"
        refuse(not self.prompt.conversation, f"{name} needs prompt.conversation, which it sets itself; leave it out")
        refuse(train.objective != "sft" or self.task.generate,
            f"{name} learns its labelled turns, and has no teacher yet that answers others; take train.objective sft, "
            "and no task.queries generate")
        refuse(train.gist, f"{name} cannot be combined with train.gist yet; leave it out")
        refuse(train.backend.name == "openai",
            f"{name} trains a model whose weights are here; take train.backend.name deepspeed or ddp")
        refuse(self.evaluate.shots or any(p.shots for p in plan_phases(self.schedule)),
            f"{name} has no examples yet, since whole dialogues are long; set schedule.shots and evaluate.shots to 0")
        refuse(self.evaluate.knows,
            f"{name} has no single queries that could ask for each unit of the prompt; leave out evaluate.knows")
        refuse(self.task.published, f"{name} cannot follow a changed prompt yet; train anew, without 'pi-ray refresh'")

    @property
    def answers_first(self) -> bool:
        """Whether a teacher answers the queries before preparation, so that its answers are rows like labelled ones."""
        by_endpoint = self.train.objective != "sft" and self.train.distill.teacher == "endpoint"
        return bool(self.task.queries or self.task.generate) and (by_endpoint or not self.task.train)

    def learns_all_turns(self, split: str) -> bool:
        """Whether rows of the split are conversations of which every assistant turn is learned."""
        return self.prompt.conversation and self.task.learn == "all" and split == "train"

    @property
    def training_metric(self) -> MetricConfig | None:
        """The metric by which training chooses a phase and stops early: the first of task.metric that costs no money.

        None: the share of the dev answers' tokens that are right decides. So it is without task.metric, where no worker
        can generate answers (ZeRO stage 3, gist tokens), and where one phase runs to its end.
        """
        train = self.train
        chooses = len(plan_phases(self.schedule)) > 1 or train.early_stop
        generates = not (train.gist or train.backend.shards_weights or train.backend.name == "openai")
        return next((m for m in self.task.metric if not m.asks_service), None) if chooses and generates else None

    @property
    def rows_per_worker(self) -> int:
        """Rows of one update on one training worker."""
        return self.train.batch_size // self.train.workers

    @property
    def root(self) -> Path:
        """The run directory."""
        return Path(self.run_dir)

    def replace(self, **changes: Any) -> Self:
        """A validated copy; dotted keys reach into blocks: `replace(**{"train.lr": 1e-3})`."""
        data = self.model_dump(mode="json")
        for key, value in changes.items():
            set_key(data, key, value)
        return type(self).model_validate(data)


def dump_config(config: RunConfig) -> str:
    """All keys as YAML, which `load_run_file` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
