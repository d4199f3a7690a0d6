"""The config: one frozen pydantic model for each block of a run file, mirrored 1:1. Reading and checking the file is runfile.py."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from pi_ray.errors import ConfigError

Rate = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Money = Annotated[float, Field(ge=0)]
PLAIN_URL = r"https?://[^/@\s]+(/[^@?\s]*)?"  # without user, password or query
COMPRESS_MODELS = {"llmlingua2": "microsoft/llmlingua-2-xlm-roberta-large-meetingbank", "generation": "gpt-4"}  # compressors with a model of their own


class Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def added(default: Any, description: str) -> Any:
    """A key that dumps leave out while it has its default, so that its arrival changed no fingerprint of runs that do not use it."""
    return Field(default, description=description, exclude_if=lambda value: value == default)


class RowsConfig(Block):
    """How many rows of each split to use; 0, or more than there are, means all.

    opsql takes the first n of its seeded order; tasks that read files take the n rows whose ids hash lowest, in file order.
    """

    train: Count = 0
    dev: Count = 0
    test: Count = 0
    unlabelled: Count = Field(0, description="queries without an answer, for distillation")


class TaskConfig(Block):
    """The data, the template and the metric."""

    name: str = Field("jsonl", description="jsonl (your own rows), opsql (bundled), nl2bash, mbpp, nl2f, nl2f-w")
    train: str = Field("train.jsonl", description="training rows, relative to run.yaml")
    dev: str = Field("dev.jsonl", description="rows for choosing; may be missing")
    test: str = Field("test.jsonl", description="held-out rows; only evaluated")
    queries: str = Field("queries.jsonl", description="queries without an answer, such as a request log, for train.objective distill and mixed; may be missing")
    template: str = Field("template.md", description="instruction and documents")
    folder: str = Field("", description="data folder of a named task such as nl2bash; empty: from the hub, for tasks that are there")
    docs: str = Field("", description="folder or file of API documents that become the template's documents; empty: those that ship with the task")
    docs_count: Positive = Field(6, description="documents taken, most used in the training answers first")
    docs_examples: Count = Field(2, description="examples kept of each document")
    allow_code_execution: bool = Field(False, description="run generated programs, in a sandbox, to score them by their tests (mbpp)")
    unsafe_local_execution: bool = Field(False, description="also where there can be no sandbox: with your own rights, on your own files")
    rows: RowsConfig = RowsConfig()
    max_bad_rows: Count = Field(0, description="stop when more rows than this are rejected")
    overlap: Literal["error", "drop"] = Field("error", description="a training query that also stands in dev or test: stop, or drop it from training")


class ModelConfig(Block):
    base: str = Field("smollm2-135m", description="packaged name, hub id, local folder, or .gguf file")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto: bfloat16 on GPU, float32 on CPU")
    revision: str = Field("", description="hub revision, pinned")
    quantize: Literal["", "4bit"] = added("", "4bit: the frozen base's linear layers in bitsandbytes' NF4, computed in bfloat16; on GPUs only")


class PromptConfig(Block):
    """How template, examples and query become one message. The same words in training, evaluation and serving."""

    chat: Literal["model", "model+system", "chatml", "none"] = Field("model", description="the model's own chat template, bare ChatML, or plain text")
    query: str = Field("{query}", description="how a query is worded")
    example: str = Field("{query}\n{answer}", description="how an example is worded")
    examples_heading: str = Field("Examples:", description="line before the examples; empty for none")

    @model_validator(mode="after")
    def _placeholders(self) -> PromptConfig:
        if "{query}" not in self.query:
            raise ValueError("prompt.query must contain {query}")
        if not {"{query}", "{answer}"} <= set(re.findall(r"\{\w+\}", self.example)):
            raise ValueError("prompt.example must contain {query} and {answer}")
        return self


class DocumentsConfig(Block):
    """The template's documents, where they are not compressed as its instruction is (paper 4.1)."""

    name: str = Field("", description="a compressor; empty: the instruction's")
    model: str = Field("", description="empty: the instruction's, or the compressor's own where it is another")
    rate: Rate | dict[Rate, Rate] | None = Field(None, description="what stays of them: one share, or {template rate: share}; default: the template rate. A template rate of 0 or 1 always holds for both")

    def at(self, rate: float) -> float:
        """The documents' rate where the template's is `rate`."""
        if self.rate is None or rate in (0, 1):
            return rate
        return self.rate.get(rate, rate) if isinstance(self.rate, dict) else self.rate


class CompressConfig(Block):
    """Template compression C(x, rate), paper equation 2."""

    name: str = Field("llmlingua", description="llmlingua, longllmlingua, llmlingua2, selective, generation or none")
    model: str = Field("smollm2-135m", description="what scores tokens: a small language model; for llmlingua2 a token classifier, default LLMLingua-2's own; for generation a chat model, default gpt-4")
    protect: tuple[str, ...] = Field((), description="terms that survive byte for byte, besides placeholders, code fences, URLs and numbers")
    protect_numbers: bool = Field(True, description="numbers survive while they leave room for words, and are never cut")
    tolerance: Annotated[float, Field(gt=0, le=0.5)] = Field(0.05, description="accepted distance between asked and achieved rate")
    documents: DocumentsConfig | None = added(None, "compressor and rate of the documents; default: the instruction's")
    question: str = added("", "longllmlingua: the question that text is weighed by, such as a typical query; empty: what must be known for the task")
    base_url: str = added("", "generation: the chat model's API; empty: OpenAI's own")
    api_key_env: str = added("OPENAI_API_KEY", "generation: environment variable with its key")

    @model_validator(mode="before")
    @classmethod
    def _own_model(cls, data: Any) -> Any:
        if isinstance(data, dict) and "model" not in data and data.get("name") in COMPRESS_MODELS:
            return {**data, "model": COMPRESS_MODELS[data["name"]]}
        return data

    @model_validator(mode="after")
    def _no_secret(self) -> CompressConfig:
        if self.base_url and not re.fullmatch(PLAIN_URL, self.base_url):
            raise ValueError("compress.base_url must be an http or https URL without user, password or query; the key belongs in the environment")
        return self

    @property
    def label(self) -> str:
        """The compressors in words."""
        return self.name if self.documents is None else f"{self.name}, documents {self.of_documents.name}"

    @property
    def of_instruction(self) -> CompressConfig:
        return self.model_copy(update={"documents": None})

    @property
    def of_documents(self) -> CompressConfig:
        """The documents' compressor as a config of its own."""
        own = self.documents or DocumentsConfig()
        name = own.name or self.name
        model = own.model or (self.model if name == self.name else COMPRESS_MODELS.get(name, type(self).model_fields["model"].default))
        return self.model_copy(update={"documents": None, "name": name, "model": model})


class RetrieveConfig(Block):
    """Example retrieval, paper equation 3: FAISS candidates, then exact sentence BLEU on the answers."""

    encoder: str = Field("ngram", description="ngram (hashed n-grams) or sentence-transformers")
    encoder_model: str = Field("all-minilm-l6-v2", description="for sentence-transformers: packaged name, hub id or folder")
    candidates: Positive = Field(64, description="rows that FAISS proposes for each row")
    by: Literal["answer", "query"] = Field("answer", description="what training rows are compared by; dev and test rows have no answer yet, so always by query")
    bank_fraction: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="share of the training rows that may serve as examples (paper 5.5)")


class PhaseConfig(Block):
    rate: Rate
    shots: Count
    epochs: Positive = 1
    steps: Count = Field(0, description="updates; 0: as many as the epochs take")


class ScheduleConfig(Block):
    """Phases: template rate and shots fall to nothing (paper 4.1, 4.2)."""

    name: str = Field("linear", description="linear, exp, inverse-exp, constant, list")
    phases: Positive = 3
    rate_start: Rate = 1.0
    rate_end: Rate = Field(0.0, description="above 0: that much template is still sent at inference")
    shots: Count = Field(2, description="examples in the first phase")
    epochs: Positive | tuple[Positive, ...] = Field(1, description="passes over the rows: one number, or one for each phase")
    steps: Count | tuple[Count, ...] = Field(0, description="updates of a phase instead of passes: one number, or one for each phase; 0: as many as the epochs take")
    list: tuple[PhaseConfig, ...] = Field((), description="for name: list")

    @model_validator(mode="after")
    def _consistent(self) -> ScheduleConfig:
        if (self.name == "list") != bool(self.list):
            raise ValueError("schedule.list goes with schedule.name: list, and only with it")
        if self.rate_end > self.rate_start:
            raise ValueError(f"schedule.rate_end {self.rate_end} is above rate_start {self.rate_start}; the template must shrink")
        return self


class LoraConfig(Block):
    """What is trained beside the frozen base model, by peft."""

    method: Literal["lora", "rslora", "dora", "pissa", "ia3"] = added(
        "lora", "as peft has them; pissa is saved as plain LoRA of twice the rank; dora and ia3 can be evaluated, but not published",
    )
    rank: Positive = Field(32, description="paper A.2")
    alpha: Positive = 64
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: str | tuple[str, ...] = Field(
        "all-linear",
        description="module names as peft takes them. all-linear: every linear layer but the output; of a mixture of experts the attention's alone, since its "
        "experts are fused tensors and its router stays as it is; with method ia3 the places that peft knows for the architecture",
    )
    experts: bool = added(False, "also LoRA matrices for each fused expert of a mixture of experts (peft target_parameters); such adapters can be evaluated, but not published")

    @model_validator(mode="after")
    def _experts(self) -> LoraConfig:
        if self.experts and (self.dropout or self.method not in ("lora", "rslora")):
            raise ValueError("train.lora.experts goes with method lora or rslora and without dropout: peft has nothing else for fused experts")
        return self


class BackendConfig(Block):
    name: str = Field("deepspeed", description="deepspeed, ddp, or openai: a closed model, see the block 'closed'")
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="DeepSpeed ZeRO stage")
    offload_optimizer: bool = added(False, "Adam's state and fp32 weights in host memory, and the update computed there (ZeRO stage 1 to 3)")
    offload_params: bool = added(False, "each worker's share of the base model in host memory (ZeRO stage 3)")

    @model_validator(mode="after")
    def _offload(self) -> BackendConfig:
        stage = self.zero_stage if self.name == "deepspeed" else 0
        if self.offload_optimizer and not stage:
            raise ValueError("train.backend.offload_optimizer needs name: deepspeed and zero_stage 1, 2 or 3")
        if self.offload_params and stage < 3:
            raise ValueError("train.backend.offload_params needs name: deepspeed and zero_stage: 3, which alone shards the base model")
        return self


class DistillConfig(Block):
    """The teacher reads the full prompt; the student learns its answers under the later phases' prompts."""

    teacher: Literal["adapter", "base"] = Field("adapter", description="the adapter as the first phase leaves it, or the base model without it")
    top_k: Positive = Field(16, description="likeliest tokens of the teacher that the student matches at each place of an answer")
    confidence: Annotated[float, Field(le=0)] = Field(-0.1, description="a query's answer is kept when its least sure token has at least this log-probability")
    share: Annotated[float, Field(ge=0, le=1)] = Field(0.5, description="objective mixed: weight of the teacher's distribution; the rest is cross-entropy on the answer")


class TrainConfig(Block):
    workers: Positive = Field(2, description="training processes; one for each GPU")
    gpu: bool | Literal["auto"] = Field("auto", description="auto: use GPUs when the cluster has them")
    backend: BackendConfig = BackendConfig()
    lora: LoraConfig = LoraConfig()
    objective: Literal["sft", "distill", "mixed"] = Field("sft", description="the labels (the paper), a teacher that reads the full prompt, or both")
    distill: DistillConfig = DistillConfig()
    batch_size: Positive = Field(16, description="rows of one update, over all workers")
    micro_batch: Count = Field(0, description="rows of one forward pass on one worker; 0: as many as the batch gives it")
    lr: Annotated[float, Field(gt=0)] = 5e-4
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(0.05, description="share of the updates with rising learning rate")
    lr_end: Annotated[float, Field(ge=0, le=1)] = Field(0.1, description="share of lr at the last update (cosine)")
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    border: Literal["carry", "rewarm", "reset"] = Field("carry", description="over a phase border: keep optimiser and learning rate, warm the rate up again, or also clear the optimiser")
    share_prefix: bool = Field(True, description="compute the template once per batch")
    gist: Count = added(0, "gist tokens, a baseline (Mu et al. 2024): rows see the template through so many trained tokens alone; 0: none")
    gradient_checkpointing: bool = False
    checkpoint_every: Positive = Field(20, description="updates between checkpoints")
    keep_checkpoints: Annotated[int, Field(ge=2)] = 3
    max_failures: Count = Field(3, description="restarts of the worker group before the run stops")
    seed: Count = 0


class EvaluateConfig(Block):
    split: Literal["test", "dev"] = Field("test", description="rows that are scored; dev for choosing settings")
    baseline: bool = Field(True, description="also train and evaluate plain fine-tuning without a prompt")
    batch_size: Positive = 16
    max_new_tokens: Count = Field(0, description="0: the longest answer of the data, plus a quarter")
    shots: Count = Field(0, description="examples in the base model's full prompt; 0: as the first phase")
    latency_rows: Positive = Field(12, description="rows timed one by one")
    bootstrap: Positive = Field(2000, description="resamples for the 95% intervals")
    probe: bool = Field(True, description="also measure what was forgotten (perplexity on other text) and how much of the template is recited when asked")
    samples: Positive = Field(10, description="rows shown side by side in the report")


class CostConfig(Block):
    """Prices in money per million tokens, for the cost table and the break-even."""

    currency: str = "USD"
    input: Money = Field(0.50, description="per million input tokens")
    cached_input: Money = Field(0.05, description="per million input tokens read from a prefix cache")
    output: Money = Field(1.50, description="per million output tokens")
    training_hour: Money = Field(2.00, description="of one worker")
    requests_per_month: Positive = 1_000_000


class ServeConfig(Block):
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    engine: str = "transformers"
    min_replicas: Count = 1
    max_replicas: Positive = 1
    max_ongoing_requests: Positive = 8
    max_queued_requests: Positive = 16
    request_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    max_new_tokens: Positive = Field(1028, description="upper bound of a request's max_tokens (paper A.2)")
    max_loras: Positive = Field(4, description="adapters kept in memory per replica")
    body_limit_bytes: Positive = 1_048_576
    api_key_env: str = Field("PI_RAY_API_KEY", description="environment variable with the bearer key; required off loopback")

    @model_validator(mode="after")
    def _replicas(self) -> ServeConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"serve.min_replicas {self.min_replicas} is above serve.max_replicas {self.max_replicas}")
        return self


class ClosedConfig(Block):
    """A closed model, fine-tuned and asked through OpenAI's API or one like it, for train.backend.name: openai."""

    base_url: str = Field("", description="of the service's API; empty: OpenAI's own")
    model: str = Field("gpt-4o-mini-2024-07-18", description="the service's name of the base model")
    api_key_env: str = Field("OPENAI_API_KEY", description="environment variable with the service's key")
    batch_size: Count = Field(0, description="0: the service's choice")
    lr_multiplier: Annotated[float, Field(ge=0)] = Field(0.0, description="of the service's learning rate; 0: the service's choice")
    suffix: str = Field("pi-ray", pattern=r"^[a-z0-9-]{1,40}$", description="part of the tuned models' names")
    train_price: Money = Field(3.00, description="per million training tokens, as your service has it now")
    input_price: Money = Field(0.30, description="per million input tokens of evaluation")
    output_price: Money = Field(1.20, description="per million output tokens of evaluation")
    confirmed: bool = Field(False, description="spend without asking; needed where nobody can be asked")
    poll_s: Annotated[float, Field(ge=0)] = Field(10.0, description="seconds between looks at a job; up to six times that while nothing happens")

    @model_validator(mode="after")
    def _no_secret(self) -> ClosedConfig:
        if self.base_url and not re.fullmatch(PLAIN_URL, self.base_url):
            raise ValueError("closed.base_url must be an http or https URL without user, password or query; the key belongs in the environment")
        return self


class RunConfig(Block):
    """One run.yaml."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    run_dir: str = Field("", description="default: runs/<name> under the current folder")
    store: str = Field("", description="adapter store; default: store under the current folder")
    task: TaskConfig = TaskConfig()
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

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.train.batch_size % self.train.workers:
            raise ValueError(f"train.batch_size {self.train.batch_size} cannot be shared by train.workers {self.train.workers}; take a multiple")
        if self.train.objective != "sft" and self.train.backend.name == "deepspeed" and self.train.backend.zero_stage == 3:
            raise ValueError(f"train.objective {self.train.objective} needs whole weights on each worker to let the teacher answer; take train.backend.zero_stage 2 or less")
        if self.train.objective != "sft" and self.schedule.phases < 2 and len(self.schedule.list) < 2:
            raise ValueError(f"train.objective {self.train.objective} needs a phase after the first: the teacher is what the first one leaves")
        if self.train.micro_batch and self.rows_per_worker % self.train.micro_batch:
            raise ValueError(f"train.micro_batch {self.train.micro_batch} does not divide the {self.rows_per_worker} rows that each worker has of a batch")
        return self

    @model_validator(mode="after")
    def _adaptation(self) -> RunConfig:
        train, sharded = self.train, self.train.backend.name == "deepspeed" and self.train.backend.zero_stage == 3
        if self.model.quantize and (train.gpu is False or sharded):
            raise ValueError("model.quantize: 4bit needs GPUs that each hold the whole base model; leave train.gpu at auto and take train.backend.zero_stage 2 or less")
        if train.lora.method == "pissa" and (self.model.quantize or (train.objective != "sft" and train.distill.teacher == "base")):
            raise ValueError("train.lora.method: pissa takes its start out of the base weights: it cannot go with model.quantize or with the base model as teacher")
        return self

    @model_validator(mode="after")
    def _gist(self) -> RunConfig:
        from pi_ray.schedule import plan_phases

        if not self.train.gist:
            return self
        if not self.train.share_prefix:
            raise ValueError("train.gist needs train.share_prefix: the mask that hides the template is a part of it")
        if self.train.objective != "sft":
            raise ValueError(f"train.gist cannot be combined with train.objective {self.train.objective}; take sft")
        if self.train.backend.name == "openai":
            raise ValueError("train.gist needs a model whose weights are here; take train.backend.name deepspeed or ddp")
        if self.train.backend.name == "deepspeed" and self.train.backend.zero_stage == 3:
            raise ValueError("train.gist starts its tokens from the mean of all embeddings, which no worker has at train.backend.zero_stage 3; take 2 or less")
        for i, phase in enumerate(plan_phases(self.schedule)):
            if not phase.rate:
                raise ValueError(f"train.gist: phase {i} of the schedule has no template (rate 0) that gist tokens could stand for; keep rates above 0, as schedule.name constant does")
        return self

    @property
    def rows_per_worker(self) -> int:
        return self.train.batch_size // self.train.workers

    @property
    def root(self) -> Path:
        """The run directory."""
        return Path(self.run_dir)

    def replace(self, **changes: Any) -> RunConfig:
        """A validated copy; dotted keys reach into blocks: `replace(**{"train.lr": 1e-3})`."""
        data = self.model_dump(mode="json")
        for key, value in changes.items():
            assign(data, key, value)
        return RunConfig.model_validate(data)


def dump(config: RunConfig) -> str:
    """The resolved whole as YAML, which `runfile.load` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def schema() -> str:
    """JSON Schema of run.yaml, for editors."""
    return json.dumps(RunConfig.model_json_schema(), indent=2)


def assign(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key, such as "train.lr", in nested blocks. Raises ConfigError where the key leads through a value."""
    *blocks, last = key.split(".")
    for block in blocks:
        data = data.setdefault(block, {})
        if not isinstance(data, dict):
            raise ConfigError(f"'{key}': '{block}' is a value, not a block")
    data[last] = value
