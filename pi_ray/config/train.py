"""How it learns: prompt, phases, adapter, optimiser."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pi_ray.config.block import Block, Count, Positive, Rate, added, unused


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
        if self.name == "list":
            unused(self, ("phases", "rate_start", "rate_end", "shots", "epochs", "steps"), "schedule", "with name: list each phase in schedule.list has its own")
        if self.name == "constant" and self.rate_end != self.rate_start:
            unused(self, ("rate_end",), "schedule", "name: constant keeps rate_start throughout")
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
        if self.method == "ia3":
            unused(self, ("rank", "alpha", "dropout"), "train.lora", "method ia3 scales activations and has no matrices")
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
        if self.name == "ddp":
            unused(self, ("zero_stage",), "train.backend", "ZeRO is DeepSpeed's, and name is ddp")
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
    phase_transition: Literal["carry", "rewarm", "reset"] = Field("carry", description="at a phase transition: keep optimiser and learning rate, warm the rate up again, or also clear the optimiser")
    share_prefix: bool = Field(True, description="compute the template once per batch")
    attention: Literal["auto", "sdpa", "flex"] = added("auto", "of batches that share their prefix: torch's SDPA, or flex attention on GPUs; auto: flex where there is a GPU")
    init_adapter: str = added("", "folder of an adapter, such as store/NAME/v0001, whose weights training starts from; of the same base, LoRA shape and alpha. Empty: a fresh one")
    gist: Count = added(0, "gist tokens, a baseline (Mu et al. 2024): rows see the template through so many trained tokens alone; 0: none")
    gradient_checkpointing: bool = False
    checkpoint_every: Positive = Field(20, description="updates between checkpoints")
    keep_checkpoints: Annotated[int, Field(ge=2)] = 3
    max_failures: Count = Field(3, description="restarts of the worker group before the run stops")
    collective_timeout_s: Positive = added(300, "seconds that a worker waits for the others before it takes them for lost, and the worker group is started again")
    dev_every: Count = added(0, "updates between dev scores inside a phase, under the last phase's prompt, or with early_stop under its own; 0: at its end alone")
    early_stop: Count = added(
        0, "dev scores in a row, each under the phase's own prompt, without gain after which a phase ends early; every phase then leaves the adapter of its best score, "
        "with which the next one goes on; 0: off",
    )
    tracker: Literal["", "tensorboard", "wandb", "mlflow"] = added("", "also send losses, dev scores and phases there")
    seed: Count = 0

    @model_validator(mode="after")
    def _scored(self) -> TrainConfig:
        if self.early_stop and not self.dev_every:
            raise ValueError("train.early_stop needs train.dev_every: say after how many updates a dev score is taken")
        if self.attention == "flex" and not self.share_prefix:
            unused(self, ("attention",), "train", "it is for batches that share their prefix, and share_prefix is false")
        return self
