"""What is minimised: paper equation 4, cross-entropy on the answer's tokens alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from pi_ray.train.batches import Batch


def sft_sum(model: Any, batch: Batch) -> torch.Tensor:
    """Summed cross-entropy (nats) over the answer tokens of the batch; the caller divides by the tokens of the whole update."""
    logits = model(**batch.inputs).logits
    return F.cross_entropy(logits.flatten(0, -2).float(), batch.labels, ignore_index=-100, reduction="sum")
