"""Rows of a packed sequence as padded batches."""

import pytest
import torch

from pi_ray.train import row_batch
from pi_ray.train.row_batch import RowBatch, row_batches

CPU = torch.device("cpu")


@pytest.mark.parametrize("lengths, batches", [
    ([5, 5, 5], [3]),
    ([8, 9, 10, 9], [4]),
    ([2, 2, 90, 2, 2], [2, 1, 2]),  # one long row between short ones makes nobody wait
    ([7], [1]),
    ([1, 100, 1, 100], [1, 1, 1, 1]),
])
def test_neighbours_of_like_lengths_share_a_batch(lengths, batches):
    made = row_batches(lengths, CPU)
    assert [batch.rows for batch in made] == batches
    assert sum(len(batch.place) for batch in made) == sum(lengths)  # every token, in the same order
    assert all(b.rows * b.longest <= row_batch.MOST_PADDED * len(b.place) for b in made)


def test_a_padded_batch_has_zeros_after_each_row():
    batch, heads, width = RowBatch.build([2, 3], CPU), 2, 4
    x = torch.randn(1, heads, 5, width)
    padded = batch.pad(x)
    assert padded.shape == (2, heads, 3, width)
    assert torch.equal(padded[0, :, :2], x[0, :, :2]) and not padded[0, :, 2:].any()
    assert torch.equal(padded[1], x[0, :, 2:])
    assert torch.equal(batch.unpad(padded), x)
