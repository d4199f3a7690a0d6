"""Flex attention's block mask, made from places alone, is torch's, made from all pairs of tokens."""

import random

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from pi_ray.train import shared_prefix
from pi_ray.train.block_mask import BLOCK
from tests.unit.train.test_shared_prefix import LAYOUTS

RANDOM = random.Random(0)
LARGE = [
    (RANDOM.choice([0, 1, 127, 128, 300, 700]), RANDOM.random(), [RANDOM.randint(1, 400) for _ in range(n)], window)
    for n in (1, 2, 5, 9) for window in (None, 1, 100, 129, 500)
]


def numbers(counts, indices):
    """For each query block the key blocks that are computed."""
    return [sorted(row[:n].tolist()) for n, row in zip(counts.flatten(), indices[0, 0], strict=True)]


@pytest.mark.parametrize(
    "prefix, visible, lengths, window",
    [*LAYOUTS, *((p, p if share < 0.5 else int(p * share), lengths, window) for p, share, lengths, window in LARGE)],
)
def test_it_is_that_of_torch(prefix, visible, lengths, window):
    layout = shared_prefix.Layout.build(prefix, lengths, visible)
    size, found = prefix + sum(lengths), layout.block_mask(window)
    expected = create_block_mask(layout.mask_mod(window), None, None, size, size, device="cpu", BLOCK_SIZE=BLOCK)
    assert found.seq_lengths == expected.seq_lengths and found.BLOCK_SIZE == expected.BLOCK_SIZE
    for part in ("", "full_"):
        mine, theirs = (
            numbers(getattr(m, f"{part}kv_num_blocks"), getattr(m, f"{part}kv_indices")) for m in (found, expected)
        )
        assert mine == theirs
    for part in ("q", "full_q"):  # by which gradients of keys are computed
        mine, theirs = (
            numbers(getattr(m, f"{part}_num_blocks"), getattr(m, f"{part}_indices")) for m in (found, expected)
        )
        assert mine == theirs


def test_what_a_row_does_not_see_is_not_computed():
    mask = shared_prefix.Layout.build(1280, [128] * 8).block_mask()
    assert torch.equal(mask.full_kv_num_blocks[0, 0, 10:], torch.full((8,), 10, dtype=torch.int32)), "the prefix"
    assert torch.equal(mask.kv_num_blocks[0, 0, 10:], torch.ones(8, dtype=torch.int32)), "each its own block"
