"""One run.yaml."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from pi_ray.config.block import Block, added, assign
from pi_ray.config.cluster import ClusterConfig
from pi_ray.config.data import CompressConfig, RetrieveConfig, TaskConfig
from pi_ray.config.evaluate import ClosedConfig, CostConfig, EvaluateConfig
from pi_ray.config.serve import ServeConfig
from pi_ray.config.train import PromptConfig, ScheduleConfig, TrainConfig


class ModelConfig(Block):
    base: str = Field("smollm2-135m", description="packaged name, hub id, local folder, or .gguf file")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto: bfloat16 on GPU, float32 on CPU")
    revision: str = Field("", description="hub revision, pinned")
    quantize: Literal["", "4bit"] = added("", "4bit: the frozen base's linear layers in bitsandbytes' NF4, computed in bfloat16; on GPUs only")


class RunConfig(Block):
    """One run.yaml."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    run_dir: str = Field("", description="default: runs/<name> under the current folder")
    store: str = Field("", description="adapter store: a folder, s3://, gs://, hf:// or file://; default: store under the current folder")
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
    cluster: ClusterConfig = added(ClusterConfig(), "the cluster that it runs on")

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.train.batch_size % self.train.workers:
            raise ValueError(f"train.batch_size {self.train.batch_size} cannot be shared by train.workers {self.train.workers}; take a multiple")
        if self.train.objective != "sft" and self.train.backend.name == "deepspeed" and self.train.backend.zero_stage == 3:
            raise ValueError(f"train.objective {self.train.objective} needs whole weights on each worker to let the teacher answer; take train.backend.zero_stage 2 or less")
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
    def _teacher(self) -> RunConfig:
        from pi_ray.schedule import plan_phases

        if self.train.objective == "sft":
            return self
        first, *others = plan_phases(self.schedule)
        if not others:
            raise ValueError(f"train.objective {self.train.objective} needs a phase after the first: the teacher is what the first one leaves")
        if first.rate < 1:
            raise ValueError(f"train.objective {self.train.objective} needs a first phase with the whole template, which the teacher reads: its rate is {first.rate:g}, take 1")
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
