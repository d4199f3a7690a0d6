"""How a model takes rows behind their prompt: packed, behind the prompt's cache, or each with a copy of its own."""

from collections.abc import Callable
from typing import Any

from pi_ray.config import TrainConfig
from pi_ray.errors import TrainingError
from pi_ray.train import batch_logits, batches, shared_prefix
from pi_ray.train.batches import Pack
from pi_ray.train.gradient_cache import checkpoint_layers

Entry = dict[str, Any]  # of the training log


def choose_packing(
    model: Any, train: TrainConfig, device: str, longest: int, plain_batch_reason: str,
    agree: Callable[[str], str] = lambda reason: reason,
) -> tuple[Pack, Entry | None]:
    """Packed rows where the model can, else rows behind the prefix's cache, else plain ones; with a log entry why.

    `longest`: tokens of the longest row with its prefix. `plain_batch_reason`: why packed rows are ruled out already.
    `agree` gives all workers the first one's reason. Raises TrainingError for gist tokens without packed rows.
    """
    if not train.share_prefix:
        return batches.plain_batch, None
    flex = shared_prefix.uses_flex_attention(train.attention, device)
    reason = agree(plain_batch_reason or batch_logits.packing_error(model, device, flex, longest))
    if not reason:
        return batches.packed_batch, None
    if train.gist:
        raise TrainingError(
            "model.base cannot be trained with gist tokens (train.gist), which need full attention in every layer: "
            f"{reason}"
        )
    undo = checkpoint_layers(model) if train.gradient_checkpointing else lambda: None
    why_plain = agree(batch_logits.suffix_error(model, device, longest))
    if not why_plain:
        return batches.suffix_batch, {"event": "suffix_batches", "reason": reason}
    undo()
    return batches.plain_batch, {"event": "plain_batches", "reason": f"{reason}, and {why_plain}"}
