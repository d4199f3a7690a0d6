"""Rows of the task and the size of the model, read once for the plans of all columns of a table."""

from collections.abc import Sequence
from typing import Any

from pi_ray.config import LoraConfig, ModelConfig
from pi_ray.data.context import ConversationContext
from pi_ray.data.ingest import read_splits
from pi_ray.plan import estimate
from pi_ray.protocols import Reject, Row, Task


class PlanInputs:
    """Keeps rows by the task's fingerprint, and sizes by model and adapter, for as long as it lives."""

    def __init__(self) -> None:
        self._splits: dict[Any, tuple[dict[str, list[Row]], list[Reject]]] = {}
        self._sizes: dict[Any, estimate.ModelSize] = {}

    def splits(
        self, task: Task, names: Sequence[str], context: ConversationContext | None
    ) -> tuple[dict[str, list[Row]], list[Reject]]:
        """As `read_splits` does, whose lists a caller may change. Rows that a context cuts are read each time."""
        if context:
            return read_splits(task, names, context)
        key = (task.fingerprint(), *names)
        if key not in self._splits:
            self._splits[key] = read_splits(task, names)
        splits, rejects = self._splits[key]
        return {split: [*rows] for split, rows in splits.items()}, [*rejects]

    def model_size(self, model: ModelConfig, lora: LoraConfig) -> estimate.ModelSize:
        """Raises what `estimate.model_size` does."""
        key = (model, lora)
        if key not in self._sizes:
            self._sizes[key] = estimate.model_size(model, lora)
        return self._sizes[key]
