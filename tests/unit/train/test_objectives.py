"""The loss of a student against a teacher's likeliest tokens and the bucket of all others."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from pi_ray.train.batches import Batch
from pi_ray.train.distilled_rows import Targets
from pi_ray.train.objectives import distill_loss

VOCABULARY, TOKENS = 11, 5


def distributions(scale=2.0):
    """Logits of a student, which take a gradient, and a teacher's probabilities."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (scale * torch.randn(TOKENS, VOCABULARY, generator=generator) for _ in range(2))
    return student.requires_grad_(), torch.softmax(teacher, -1)


def bucketed_loss(student, teacher, top_k, shares=None):
    values, ids = teacher.topk(top_k)
    ones = torch.ones(TOKENS)
    targets = Targets(ids, values, (1 - values.sum(-1)).clamp(min=0), ones, ones if shares is None else shares)
    labels = torch.arange(TOKENS)
    batch = Batch({}, labels, TOKENS, TOKENS)
    return distill_loss(lambda: SimpleNamespace(logits=student[None]), batch, targets)


def entropy(probs):
    return -(probs * probs.log()).sum()


def test_with_all_tokens_but_one_the_loss_and_its_gradient_are_those_of_the_dense_kl():
    student, teacher = distributions()
    dense = F.kl_div(torch.log_softmax(student, -1), teacher, reduction="sum")
    (expected,) = torch.autograd.grad(dense, student)
    loss = bucketed_loss(student, teacher, VOCABULARY - 1)
    (found,) = torch.autograd.grad(loss, student)
    assert (loss - entropy(teacher)).item() == pytest.approx(dense.item(), abs=1e-5)
    assert torch.allclose(found, expected, atol=1e-6)


def test_the_other_tokens_count_as_one_bucket():
    student, teacher = distributions()
    values, ids = teacher.topk(3)
    probs = torch.softmax(student, -1).gather(1, ids)
    ours, theirs = (torch.cat([p, 1 - p.sum(-1, keepdim=True)], 1) for p in (probs, values))
    (expected,) = torch.autograd.grad(F.kl_div(ours.log(), theirs, reduction="sum"), student, retain_graph=True)
    loss = bucketed_loss(student, teacher, 3)
    (found,) = torch.autograd.grad(loss, student)
    dense = F.kl_div(ours.log(), theirs, reduction="sum")
    assert (loss - entropy(theirs)).item() == pytest.approx(dense.item(), abs=1e-5)
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_student_that_leaves_nearly_nothing_to_other_tokens_has_a_finite_loss_and_gradient():
    """1 minus the likeliest tokens' probabilities would be 0 in float32 here, and its logarithm infinite."""
    student, teacher = torch.zeros(TOKENS, VOCABULARY), torch.full((TOKENS, VOCABULARY), 0.1 / (VOCABULARY - 1))
    student[:, 0], teacher[:, 0] = 60.0, 0.9
    student.requires_grad_()
    loss = bucketed_loss(student, teacher, 1)
    (found,) = torch.autograd.grad(loss, student)
    # 0.1 of the mass at log-probability log(10) - 60
    assert loss.item() == pytest.approx(TOKENS * 0.1 * (60 - torch.tensor(10.0).log().item()), rel=1e-4)
    assert torch.isfinite(found).all() and (found[:, 0] > 0).all()


def test_the_label_has_the_share_that_the_teacher_leaves_it():
    student, teacher = distributions()
    shares = torch.tensor([1.0, 0.0, 0.25, 1.0, 0.5])
    alone = [bucketed_loss(student, teacher, 4, torch.full((TOKENS,), share)) for share in (1.0, 0.0)]
    labels = F.cross_entropy(student, torch.arange(TOKENS), reduction="sum")
    assert alone[1].item() == pytest.approx(labels.item(), rel=1e-5)
    by_token = torch.stack([
        torch.stack([bucketed_loss_of_token(student, teacher, t, s) for t in range(TOKENS)]) for s in (1.0, 0.0)
    ])
    expected = (shares * by_token[0] + (1 - shares) * by_token[1]).sum()
    assert bucketed_loss(student, teacher, 4, shares).item() == pytest.approx(expected.item(), rel=1e-5)


def bucketed_loss_of_token(student, teacher, token, share):
    """The loss of one token alone: the others have weight 0."""
    values, ids = teacher.topk(4)
    weights = F.one_hot(torch.tensor(token), TOKENS).float()
    targets = Targets(ids, values, 1 - values.sum(-1), weights, torch.full((TOKENS,), share))
    batch = Batch({}, torch.arange(TOKENS), TOKENS, TOKENS)
    return distill_loss(lambda: SimpleNamespace(logits=student[None]), batch, targets)
