"""The config: one frozen pydantic model for each block of a run file, mirrored 1:1. Reading and checking the file is runfile.py."""

from pi_ray.config.block import Block, added, assign
from pi_ray.config.cluster import ClusterConfig
from pi_ray.config.data import COMPRESS_MODELS, INPUTS, CompressConfig, DocumentsConfig, RetrieveConfig, RowsConfig, TaskConfig
from pi_ray.config.evaluate import ClosedConfig, CostConfig, EvaluateConfig
from pi_ray.config.run import ModelConfig, RunConfig, dump, schema
from pi_ray.config.serve import ServeConfig
from pi_ray.config.train import BackendConfig, DistillConfig, LoraConfig, PhaseConfig, PromptConfig, ScheduleConfig, TrainConfig

__all__ = [
    "COMPRESS_MODELS", "INPUTS", "BackendConfig", "Block", "ClosedConfig", "ClusterConfig", "CompressConfig", "CostConfig", "DistillConfig", "DocumentsConfig", "EvaluateConfig", "LoraConfig", "ModelConfig",
    "PhaseConfig", "PromptConfig", "RetrieveConfig", "RowsConfig", "RunConfig", "ScheduleConfig", "ServeConfig", "TaskConfig", "TrainConfig", "added", "assign", "dump", "schema",
]  # fmt: skip
