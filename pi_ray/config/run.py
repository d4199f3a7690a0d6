"""A whole run file: the block `model`, all other blocks, and the checks that reach across blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from pi_ray.config.block import Block, doc, omit_default, refuse, set_key
from pi_ray.config.cluster import ClusterConfig
from pi_ray.config.data import CompressConfig, RetrieveConfig, TaskConfig
from pi_ray.config.evaluate import ClosedConfig, CostConfig, EvaluateConfig
from pi_ray.config.serve import ServeConfig
from pi_ray.config.train import PromptConfig, ScheduleConfig, TrainConfig
from pi_ray.schedule import plan_phases


class ModelConfig(Block):
    base: str = doc("smollm2-135m", "packaged name, hub id, local folder, or .gguf file")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = doc("auto", "auto: bfloat16 on GPU, float32 on CPU")
    revision: str = doc("", "hub revision, pinned")
    quantize: Literal["", "4bit"] = omit_default("", "4bit: the frozen base's linear layers in bitsandbytes' NF4, "
        "computed in bfloat16; on GPUs only")


class RunConfig(Block):
    """One run.yaml."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    run_dir: str = doc("", "default: ./runs/<name>")
    store: str = doc("", "adapter store: a folder, s3://, gs://, hf:// or file://; default: ./store")
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
    cluster: ClusterConfig = omit_default(ClusterConfig(), "the cluster that it runs on")

    def model_post_init(self, context: Any) -> None:
        train, lora, sharded = self.train, self.train.lora, self.train.backend.shards_weights
        refuse(train.batch_size % train.workers,
            f"train.batch_size {train.batch_size} cannot be shared by train.workers {train.workers}; take a multiple")
        refuse(train.objective != "sft" and sharded,
            f"train.objective {train.objective} needs whole weights on each worker to let the teacher answer; "
            "take train.backend.zero_stage 2 or less")
        refuse(train.micro_batch and self.rows_per_worker % train.micro_batch,
            f"train.micro_batch {train.micro_batch} does not divide the {self.rows_per_worker} rows "
            "that each worker has of a batch")
        refuse(self.model.quantize and (train.gpu is False or sharded),
            "model.quantize: 4bit needs GPUs that each hold the whole base model; "
            "leave train.gpu at auto and take train.backend.zero_stage 2 or less")
        base_teaches = train.objective != "sft" and train.distill.teacher == "base"
        refuse(lora.method == "pissa" and (self.model.quantize or base_teaches),
            "train.lora.method: pissa takes its start out of the base weights: "
            "it cannot go with model.quantize or with the base model as teacher")
        if train.objective != "sft":
            objective, (first, *later) = f"train.objective {train.objective}", plan_phases(self.schedule)
            refuse(not later, f"{objective} needs a phase after the first: the teacher is what the first one leaves")
            refuse(first.rate < 1, f"{objective} needs a first phase with the whole template, which the teacher reads: "
                f"its rate is {first.rate:g}, take 1")
        if train.gist:
            self._check_gist()

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

    @property
    def rows_per_worker(self) -> int:
        """Rows of one update on one training worker."""
        return self.train.batch_size // self.train.workers

    @property
    def root(self) -> Path:
        """The run directory."""
        return Path(self.run_dir)

    def replace(self, **changes: Any) -> RunConfig:
        """A validated copy; dotted keys reach into blocks: `replace(**{"train.lr": 1e-3})`."""
        data = self.model_dump(mode="json")
        for key, value in changes.items():
            set_key(data, key, value)
        return RunConfig.model_validate(data)


def dump_config(config: RunConfig) -> str:
    """All keys as YAML, which `load_run_file` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
