"""What is minimised: cross-entropy on the answer's tokens alone (paper equation 4), or towards what a teacher holds likely there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from pi_ray.train.batches import Batch

if TYPE_CHECKING:
    from pi_ray.train.distill import Targets


def sft_sum(model: Any, batch: Batch) -> torch.Tensor:
    """Summed cross-entropy (nats) over the answer tokens of the batch; the caller divides by the tokens of the whole update."""
    logits = model(**batch.inputs).logits
    return F.cross_entropy(logits.flatten(0, -2).float(), batch.labels, ignore_index=-100, reduction="sum")


def loss_and_hits(model: Any, batch: Batch) -> tuple[float, float]:
    """(summed cross-entropy, answer tokens to which the model gives the largest probability)."""
    logits = model(**batch.inputs).logits.flatten(0, -2).float()
    loss = F.cross_entropy(logits, batch.labels, ignore_index=-100, reduction="sum")
    return loss.item(), (logits.argmax(-1) == batch.labels).sum().item()


def distill_sum(model: Any, batch: Batch, targets: Targets, share: float) -> torch.Tensor:
    """As `sft_sum`, with weight `share` on the cross-entropy (nats) to the teacher's likeliest tokens, and the rest on the answer's own."""
    logits = model(**batch.inputs).logits.flatten(0, -2).float()
    labels = batch.labels[batch.labels != -100]
    logprobs = torch.log_softmax(logits[batch.labels != -100], -1)
    soft = -(targets.probs * logprobs.gather(1, targets.ids)).sum()
    if share == 1:
        return soft
    return share * soft + (1 - share) * F.nll_loss(logprobs, labels, reduction="sum")
