"""Training losses: cross-entropy on the answers' tokens alone (paper equation 4), or to a teacher's distribution."""

import math
from typing import Any

import torch
import torch.nn.functional as F

from pi_ray.train.batch_logits import answer_logits, run_batch
from pi_ray.train.batches import Batch
from pi_ray.train.distilled_rows import Targets


def sft_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Summed cross-entropy (nats) over the answer tokens of the batch; the caller divides by those of the update."""
    logits = run_batch(model, batch)
    return F.cross_entropy(logits.flatten(0, -2).float(), batch.labels, ignore_index=-100, reduction="sum")


def loss_and_correct(model: Any, batch: Batch) -> tuple[float, float]:
    """(summed cross-entropy, number of answer tokens that the model holds likeliest)."""
    logits = run_batch(model, batch).flatten(0, -2).float()
    loss = F.cross_entropy(logits, batch.labels, ignore_index=-100, reduction="sum")
    return loss.item(), (logits.argmax(-1) == batch.labels).sum().item()


def distill_loss(model: Any, batch: Batch, targets: Targets) -> torch.Tensor:
    """Summed cross-entropy (nats): to the teacher's distribution by `targets.shares`, to the labels by the rest.

    Its gradient is that of the forward KL over the teacher's likeliest tokens and, with `targets.tail`, one bucket of
    all others.
    """
    logprobs = torch.log_softmax(answer_logits(model, batch).float(), -1)
    loss = -(targets.probs * logprobs.gather(1, targets.ids)).sum(-1)
    if targets.tail is not None:
        # a sum over the other tokens, since 1 minus the likeliest ones' probabilities would cancel
        others = logprobs.scatter(1, targets.ids, -math.inf).logsumexp(-1)
        loss = loss - targets.tail * others
    labels = batch.labels[batch.labels != -100]
    loss = targets.shares * loss + (1 - targets.shares) * F.nll_loss(logprobs, labels, reduction="none")
    return (targets.weights * loss).sum()
