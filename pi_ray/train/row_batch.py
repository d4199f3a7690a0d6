"""Rows of a packed sequence as padded batches, since attention takes a batch in less time than its rows one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

MOST_PADDED = 1.25  # tokens of a padded batch, as a multiple of its rows' own


def row_batches(lengths: Sequence[int], device: torch.device) -> list[RowBatch]:
    """All rows in their order, as many neighbours in a batch as `MOST_PADDED` allows."""
    runs: list[list[int]] = []
    for length in lengths:
        longer = [*(runs[-1] if runs else []), length]
        if runs and len(longer) * max(longer) <= MOST_PADDED * sum(longer):
            runs[-1] = longer
        else:
            runs.append([length])
    return [RowBatch.build(run, device) for run in runs]


@dataclass(frozen=True)
class RowBatch:
    """B rows that lie one after another in a packed sequence of T tokens, as a batch padded to the longest: L."""

    rows: int  # B
    longest: int  # L
    place: torch.Tensor  # (T,) int64: each token's place among the B * L of the batch

    @classmethod
    def build(cls, lengths: Sequence[int], device: torch.device) -> RowBatch:
        own = [torch.arange(n) + i * max(lengths) for i, n in enumerate(lengths)]
        return cls(len(lengths), max(lengths), torch.cat(own).to(device))

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """x (1, H, T, D) -> (B, H, L, D), zeros after the end of a row."""
        _, heads, _, width = x.shape
        padded = x.new_zeros(1, heads, self.rows * self.longest, width).index_copy(2, self.place, x)
        return padded.view(heads, self.rows, self.longest, width).transpose(0, 1)

    def unpad(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, L, D) -> (1, H, T, D)"""
        return x.transpose(0, 1).flatten(1, 2)[None].index_select(2, self.place)
