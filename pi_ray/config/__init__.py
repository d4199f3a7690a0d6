"""The config: one frozen pydantic model for each block of a run file. run_file.py reads and checks the file itself.

Enters YAML text, leaves a RunConfig that every other folder takes; imports only errors and schedule.
"""

from pi_ray.config.ask import ADAPTER_KINDS, AskConfig, AskKind
from pi_ray.config.block import Block, check_storage_url, omit_default, set_key
from pi_ray.config.closed import ClosedConfig
from pi_ray.config.cluster import ClusterConfig
from pi_ray.config.data import COMPRESS_MODELS, INPUTS, OWN_ROWS, CompressConfig, RetrieveConfig, RowsConfig, TaskConfig
from pi_ray.config.metric import MetricConfig
from pi_ray.config.run import CostConfig, EvaluateConfig, ModelConfig, RunConfig, dump_config
from pi_ray.config.serve import ServeConfig
from pi_ray.config.train import (
    BackendConfig,
    DistillConfig,
    DrillsConfig,
    LoraConfig,
    PromptConfig,
    ScheduleConfig,
    TrainConfig,
)

__all__ = [
    "ADAPTER_KINDS", "COMPRESS_MODELS", "INPUTS", "OWN_ROWS", "AskConfig", "AskKind", "BackendConfig", "Block",
    "ClosedConfig", "ClusterConfig", "CompressConfig", "CostConfig", "DistillConfig", "DrillsConfig", "EvaluateConfig",
    "LoraConfig", "MetricConfig", "ModelConfig", "PromptConfig", "RetrieveConfig", "RowsConfig", "RunConfig",
    "ScheduleConfig",
    "ServeConfig", "TaskConfig", "TrainConfig", "check_storage_url", "dump_config", "omit_default", "set_key",
]  # fmt: skip
