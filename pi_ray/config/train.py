"""Blocks `prompt`, `schedule` and `train`: the prompt's form, phases, adapter, optimiser."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pi_ray.config.block import Amount, Block, Count, Positive, Rate, doc, forbid_unused, omit_default, refuse
from pi_ray.registry import backends


class PromptConfig(Block):
    """How template, examples and query become one message: the same in training, evaluation and serving."""

    chat: Literal["model", "model+system", "chatml", "none"] = doc("model", "the model's own, bare ChatML, or none")
    query: str = doc("{query}", "how a query is worded")
    example: str = doc("{query}\n{answer}", "how an example is worded")
    examples_heading: str = doc("Examples:", "line before the examples; empty for none")
    context: Count = omit_default(0, "tokens that prompt and answer may have together: a longer row leaves out its "
        "least similar examples, a longer conversation its oldest turns; 0: all examples stay, and conversations fit "
        "the base model")
    conversation: bool = omit_default(False, "what task conversations sets: a query is a whole conversation")

    def model_post_init(self, context: Any) -> None:
        if self.conversation:
            refuse(self.chat == "none",
                "prompt.chat none has no roles for turns of a conversation; take chatml, or model for the model's own")
            unused = ("query", "example", "examples_heading")
            forbid_unused(self, unused, "prompt", "a conversation goes through the chat template as it is")
        refuse("{query}" not in self.query, "prompt.query must contain {query}")
        both = all(placeholder in self.example for placeholder in ("{query}", "{answer}"))
        refuse(not both, "prompt.example must contain {query} and {answer}")


class PhaseConfig(Block):
    rate: Rate
    shots: Count
    epochs: Positive = 1
    steps: Count = doc(0, "updates; 0: as many as the epochs take")


class ScheduleConfig(Block):
    """Phases: template rate and shots fall to nothing (paper 4.1, 4.2)."""

    name: str = doc("linear", "linear, exp, inverse-exp, constant, list")
    phases: Annotated[int, Field(ge=1, le=1000)] = doc(3, "phases over which the prompt shrinks")
    rate_start: Rate = doc(1.0, "share of the template in the first phase")
    rate_end: Rate = doc(0.0, "above 0: that much template is still sent at inference")
    shots: Count = doc(2, "examples in the first phase")
    epochs: Positive | tuple[Positive, ...] = doc(1, "passes over the rows: one number, or one for each phase")
    steps: Count | tuple[Count, ...] = doc(0, "updates of a phase, likewise; 0: as many as the epochs take")
    list: tuple[PhaseConfig, ...] = doc((), "for name: list")
    floor: Rate = omit_default(0.0, "share of the first phase's dev score, such as 0.95: the run ends at the smallest "
        "template rate and fewest shots that keep it, and publishes that phase's adapter and prompt; 0: off")

    def model_post_init(self, context: Any) -> None:
        refuse((self.name == "list") != bool(self.list),
            "schedule.list goes with schedule.name: list, and only with it")
        refuse(self.rate_end > self.rate_start,
            f"schedule.rate_end {self.rate_end} is above rate_start {self.rate_start}; the template must shrink")
        if self.name == "list":
            keys = ("phases", "rate_start", "rate_end", "shots", "epochs", "steps")
            forbid_unused(self, keys, "schedule", "with name: list each phase in schedule.list has its own")
        if self.name == "constant" and self.rate_end != self.rate_start:
            forbid_unused(self, ("rate_end",), "schedule", "name: constant keeps rate_start throughout")


class LoraConfig(Block):
    """The adapter that peft trains beside the frozen base model."""

    method: Literal["lora", "rslora", "dora", "pissa", "ia3"] = omit_default("lora", "as peft has them; pissa is saved "
        "as LoRA of twice the rank; dora and ia3 can be evaluated, but not published")
    rank: Positive = doc(32, "paper A.2")
    alpha: Positive = doc(64, "scale of the update: alpha / rank")
    dropout: Annotated[float, Field(ge=0, lt=1)] = doc(0.0, "share of a LoRA layer's inputs that are left out")
    targets: str | tuple[str, ...] = doc("all-linear", "module names as peft takes them. all-linear: every linear "
        "layer but the output; in a mixture of experts only attention's, since the experts are fused tensors and the "
        "router stays as it is; with ia3 peft's own choice")
    layers: Annotated[float, Field(gt=0, le=1)] = omit_default(1.0, "share of the model's layers that are adapted, "
        "from the last one down: the backward pass ends below them, so that an update takes less time")
    experts: bool = omit_default(False, "also LoRA for each fused expert of a mixture of experts (peft's "
        "target_parameters); such an adapter is served merged into its base (serve.merge)")

    def model_post_init(self, context: Any) -> None:
        refuse(self.experts and (self.dropout or self.method not in ("lora", "rslora")),
            "train.lora.experts goes with method lora or rslora and without dropout: "
            "peft has nothing else for fused experts")
        refuse(self.layers < 1 and (self.experts or self.method == "ia3"),
            "train.lora.layers goes with method lora, rslora, dora or pissa and without experts: leave it out")
        if self.method == "ia3":
            keys = ("rank", "alpha", "dropout")
            forbid_unused(self, keys, "train.lora", "method ia3 scales activations and has no matrices")


class BackendConfig(Block):
    name: str = doc("deepspeed", "deepspeed, ddp, or openai: a closed model, see the block 'closed'")
    zero_stage: Literal[0, 1, 2, 3] = doc(2, "DeepSpeed ZeRO stage")
    offload_optimizer: bool = omit_default(False, "Adam's state, fp32 weights and update on the CPU (ZeRO stage 1-3)")
    offload_params: bool = omit_default(False, "each worker's share of the base model in host memory (ZeRO stage 3)")

    def model_post_init(self, context: Any) -> None:
        reason = "" if self.name == "openai" else backends.why_unknown(self.name)
        refuse(reason, reason)
        stage = self.zero_stage if self.name == "deepspeed" else 0
        refuse(self.offload_optimizer and not stage,
            "train.backend.offload_optimizer needs name: deepspeed and zero_stage 1, 2 or 3")
        refuse(self.offload_params and not self.shards_weights, "train.backend.offload_params needs "
            "name: deepspeed and zero_stage: 3, which alone shards the base model")
        if self.name == "ddp":
            forbid_unused(self, ("zero_stage",), "train.backend", "ZeRO is DeepSpeed's, and name is ddp")

    @property
    def shards_weights(self) -> bool:
        """Whether no worker holds the whole base model."""
        return self.name == "deepspeed" and self.zero_stage == 3


class DistillConfig(Block):
    """The teacher reads the full prompt; the student learns its answers under the later phases' prompts."""

    teacher: Literal["adapter", "base", "endpoint"] = doc("adapter", "the adapter after the first phase, the base "
        "model alone, or the model of the block 'closed', whose answers become training rows")
    teacher_adapter: str = omit_default("", "folder of an adapter that reads the whole template, as a first phase left "
        "it: the teacher instead of a first phase, which has no updates then; 'pi-ray refresh' sets it")
    top_k: Positive = doc(16, "likeliest tokens of the teacher that the student matches at each place of an answer")
    views: Positive = doc(2, "orders of the template's lists in which the teacher reads it; it answers by their mean")
    agreement: Literal["filter", "weight", "off"] = doc("filter", "filter: an answer is kept if all views give it; "
        "weight: a row counts by the share of views that do")
    max_tokens: Positive = omit_default(256, "tokens of an answer, where no labelled row says how long answers are")
    confidence: Annotated[float, Field(le=0)] | None = doc(None, "lowest log-probability of a token in an answer that "
        "is kept; null: any")
    known_confidence: Annotated[float, Field(le=0)] | None = doc(-0.1, "as confidence, for an answer all of whose "
        "facts stand in labels too, which teach them more surely; null: no bound of its own")
    held_out: Annotated[float, Field(ge=0, le=0.5)] = doc(0.1, "largest share of the answered queries that is kept "
        "from the student, to ask it what it knows of each unit of the template; 0: none")
    share: Rate = doc(0.5, "objective mixed: weight of the teacher's distribution against cross-entropy on the answer")
    tail: bool = omit_default(False, "all tokens but the top_k count as one with the probability that the teacher "
        "leaves them; false: the top_k's probabilities are made to sum to 1")
    label_weight: Rate = doc(1.0, "objective distill: weight of cross-entropy on the label, in labelled rows, against "
        "the teacher's distribution along it; 1: the label alone, which the teacher then need not judge")
    labelled: Annotated[float, Field(gt=0, le=1)] | None = omit_default(None, "least share of each batch that labelled "
        "rows have where the teacher's answers are learned as well; null: as rows come")
    show_labels: bool = omit_default(False, "the teacher judges the answer of a labelled row with that row among the "
        "prompt's examples, so that its distribution is about the right answer")
    on_policy: Rate = omit_default(0.0, "share of the last phase's updates, its last ones, that learn from the "
        "student's own answers to unlabelled queries, which the teacher mends and judges")
    on_policy_every: Positive = omit_default(10, "updates for which the student answers at once")
    on_policy_temperature: Amount = omit_default(0.0, "temperature at which the student answers; 0: greedily")
    on_policy_divergence: Rate = omit_default(0.3, "Jensen-Shannon divergence of student and teacher, in bits, above "
        "which the teacher's token stands in place of the student's")
    actors: bool | Literal["auto"] = omit_default("auto", "the teacher answers in actors as evaluation has them, while "
        "the training workers are gone, and not on these; auto: where ZeRO stage 3 shards the base model")
    anchor: Annotated[float, Field(ge=0, lt=1)] = omit_default(0.0, "share of each batch that keeps the base model's "
        "answers to bundled everyday questions, against forgetting")

    def model_post_init(self, context: Any) -> None:
        refuse(self.teacher_adapter and self.teacher != "adapter",
            f"train.distill.teacher_adapter is a teacher of its own; leave out train.distill.teacher: {self.teacher}")
        refuse((self.labelled or 0) + self.anchor > 1, f"train.distill.labelled {self.labelled or 0:g} and anchor "
            f"{self.anchor:g} are shares of the same batch, and more than all of it")
        if not self.on_policy:
            keys = ("on_policy_every", "on_policy_temperature", "on_policy_divergence")
            forbid_unused(self, keys, "train.distill", "on_policy is 0")


class DrillsConfig(Block):
    """Reading drills: updates of the first phase have other codes in template and labels, in another order."""

    mode: Literal["auto", "off"] = doc("auto", "auto: where a teacher is made and labels copy codes of the template "
        "that no query has")
    kinds: tuple[Literal["facts", "order", "part", "unused"], ...] = doc(("facts", "order", "part", "unused"), "facts: "
        "codes are exchanged for fresh ones; order: the lines that hold them are shuffled; part: some lines that no "
        "row of the update needs are left out; unused: lines whose codes no label has are left out of the whole "
        "phase, since as lines that are never right they would be learned to be passed over")
    share: Annotated[float, Field(gt=0, le=1)] = doc(1.0, "share of the first phase's updates that are drilled")
    words: tuple[str, ...] = doc((), "more words that are facts, whatever they look like")
    ignore: tuple[str, ...] = doc((), "words that are no facts, nor those that are listed with them")


class TrainConfig(Block):
    workers: Positive = doc(2, "training processes; one for each GPU. [least, most]: as many as the cluster has, fewer "
        "while a node is lost")
    min_workers: Count = omit_default(0, "what train.workers: [least, most] sets")
    resize_every_s: Amount = omit_default(60.0, "with [least, most]: how often it is looked whether more workers fit")
    gpu: bool | Literal["auto"] = doc("auto", "auto: GPUs where the cluster has one for each worker, else CPUs")
    backend: BackendConfig = BackendConfig()
    lora: LoraConfig = LoraConfig()
    objective: Literal["sft", "distill", "mixed"] = doc("sft", "labels (the paper), a fully prompted teacher, or both")
    distill: DistillConfig = DistillConfig()
    drills: DrillsConfig = DrillsConfig()
    batch_size: Positive = doc(16, "rows of one update, over all workers")
    micro_batch: Count = doc(0, "rows of one forward pass on one worker; 0: as many as the batch gives it")
    lr: Annotated[float, Field(gt=0)] = doc(5e-4, "highest learning rate")
    warmup: Annotated[float, Field(ge=0, lt=1)] = doc(0.05, "share of the updates with rising learning rate")
    lr_end: Rate = doc(0.1, "share of lr at the last update (cosine)")
    weight_decay: Amount = doc(0.0, "of AdamW")
    grad_clip: Annotated[float, Field(gt=0)] = doc(1.0, "largest norm of an update's gradient")
    phase_transition: Literal["carry", "rewarm", "reset"] = doc("carry", "at a phase transition: keep optimiser and "
        "learning rate, warm the rate up again, or also clear the optimiser")
    share_prefix: bool = doc(True, "compute the template once per batch")
    attention: Literal["auto", "sdpa", "flex"] = omit_default("auto", "over batches that share a prefix: torch's SDPA "
        "or flex attention (GPUs); auto: flex where there is a GPU")
    init_adapter: str = omit_default("", "folder of an adapter, such as store/NAME/v0001, whose weights training "
        "starts from; of the same base, LoRA shape and alpha. Empty: a fresh one")
    gist: Count = omit_default(0, "trained gist tokens through which rows see the template (Mu et al. 2024); 0: none")
    gradient_checkpointing: bool = doc(False, "compute each layer again in the backward pass: far less memory for "
        "activations, a third more time")
    checkpoint_every: Positive = doc(20, "updates between checkpoints")
    keep_checkpoints: Annotated[int, Field(ge=2)] = doc(3, "newest checkpoints that are kept")
    max_failures: Count = doc(3, "restarts of the worker group before the run stops")
    collective_timeout_s: Positive = omit_default(300, "seconds a worker waits for others before the group restarts")
    dev_every: Count = omit_default(0, "updates between dev scores inside a phase, under the last phase's prompt, or "
        "with early_stop under its own; 0: at its end alone")
    early_stop: Count = omit_default(0, "dev scores without gain in a row, under the phase's own prompt, that end a "
        "phase; the next goes on from its best adapter; 0: off")
    tracker: Literal["", "tensorboard", "wandb", "mlflow"] = omit_default("", "also gets losses, dev scores and phases")
    seed: Count = doc(0, "of the order of rows, LoRA's first weights, drills and all else that is drawn")

    @model_validator(mode="before")
    @classmethod
    def _split_workers(cls, data: Any) -> Any:
        """`workers: [2, 8]` becomes `workers: 8` and `min_workers: 2`."""
        workers = data.get("workers") if isinstance(data, dict) else None
        if isinstance(workers, list | tuple) and len(workers) == 2:
            return {**data, "min_workers": workers[0], "workers": workers[1]}
        return data

    def model_post_init(self, context: Any) -> None:
        refuse(self.min_workers > self.workers,
            f"train.workers [{self.min_workers}, {self.workers}]: the least comes first")
        refuse(self.early_stop and not self.dev_every,
            "train.early_stop needs train.dev_every: say after how many updates a dev score is taken")
        if self.objective == "mixed":
            why = "it goes with objective distill; in mixed, share says what the label weighs"
            forbid_unused(self.distill, ("label_weight",), "train.distill", why)
        refuse(self.objective == "distill" and self.distill.label_weight == 1 and self.distill.show_labels,
            "train.distill.show_labels would have no effect: in labelled rows the label weighs all; "
            "set label_weight below 1")
        if self.attention == "flex" and not self.share_prefix:
            why = "it is for batches that share their prefix, and share_prefix is false"
            forbid_unused(self, ("attention",), "train", why)

    def rows_of_worker(self, workers: int) -> int:
        """Rows of an update on one of so many workers, or on the first ones where they cannot be shared evenly."""
        return -(-self.batch_size // workers)

    @property
    def judges_labels(self) -> bool:
        """Whether anything is learned from a teacher's distribution along the labels."""
        return self.objective == "mixed" or self.distill.label_weight < 1

    @property
    def actors_answer(self) -> bool:
        """Whether a teacher answers outside the training workers."""
        distills = self.objective != "sft" and self.distill.teacher != "endpoint"
        return distills and (self.backend.shards_weights if self.distill.actors == "auto" else self.distill.actors)

    @property
    def adopts_teacher(self) -> bool:
        """Whether another run's adapter teaches, so that the first phase has no updates."""
        return self.objective != "sft" and bool(self.distill.teacher_adapter)
