"""Chains of rows: the turns of one conversation, each of which begins with what the turn before it has read.

The first, longest row of a chain is read once. The others see the part of its keys and values that they share with it,
and read only the few tokens that are their own, so that answering n turns costs the reading of one conversation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from pi_ray.train.cached_prefix import KeysValues

# A row of a chain begins with at least so many tokens of the first one; few are its own, such as an answer's header.
SHARED_TOKENS, OWN_TOKENS = 64, 16
LEAST_SAVED, LEAST_SHARE = 512, 0.25  # tokens that chains must save, and their share of all, to be worth their copies

Chain = list[int]  # numbers of rows; the first one is read, and begins as the others do


def find_chains(rows: Sequence[Sequence[int]]) -> list[Chain]:
    """All rows, each in one chain, the chain with the longest row first. Rows without others like them are alone."""
    found: list[Chain] = []
    for number in sorted(range(len(rows)), key=lambda i: list(rows[i]), reverse=True):  # a longer row comes first
        shared = _shared(rows[number], rows[found[-1][0]]) if found else 0
        if shared >= max(SHARED_TOKENS, len(rows[number]) - OWN_TOKENS):
            found[-1].append(number)
        else:
            found.append([number])
    return sorted(found, key=lambda chain: (-len(rows[chain[0]]), chain[0]))


def chain_batches(rows: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """The numbers of rows in batches of at most `size`, the longest rows first. A chain stays together where it fits.
    """
    batches: list[list[int]] = [[]]
    for chain in find_chains(rows):
        if len(batches[-1]) + min(len(chain), size) > size:
            batches.append([])
        for number in chain:
            if len(batches[-1]) == size:
                batches.append([])
            batches[-1].append(number)
    return batches if batches[-1] else batches[:-1]


def chains_pay(rows: Sequence[Sequence[int]], chains: Sequence[Chain]) -> bool:
    """Whether reading the first row of each chain in place of all rows saves enough."""
    total, read = sum(map(len, rows)), sum(len(rows[chain[0]]) for chain in chains)
    return total - read >= max(LEAST_SAVED, LEAST_SHARE * total)


class ReadChains(NamedTuple):
    """Rows of which all but their last tokens lie in one cache: the prefix, then the first row of each chain."""

    layers: list[KeysValues]  # of C tokens
    seen: torch.Tensor  # (B, C) bool: which of them each row sees
    skipped: list[int]  # tokens of each row that are not read again


def read_chains(
    rows: Sequence[Sequence[int]], chains: Sequence[Chain], prefix: Sequence[KeysValues],
    read: Callable[[Sequence[int]], list[KeysValues]],
) -> ReadChains:
    """Join the prefix's keys and values with those that `read` finds for the first row of each chain behind it.

    An empty prefix has no layers.
    """
    parts = [list(prefix)] if prefix else []
    start = end = prefix[0][0].shape[2] if prefix else 0
    seen = torch.zeros(len(rows), start + sum(len(rows[chain[0]]) for chain in chains), dtype=torch.bool)
    seen[:, :start] = True
    skipped = [0] * len(rows)
    for chain in chains:
        parts.append(read(rows[chain[0]]))
        for number in chain:
            skipped[number] = min(_shared(rows[number], rows[chain[0]]), len(rows[number]) - 1)
            seen[number, end : end + skipped[number]] = True
        end += len(rows[chain[0]])
    layers = [
        (torch.cat([keys for keys, _ in of_layer], 2), torch.cat([values for _, values in of_layer], 2))
        for of_layer in zip(*parts, strict=True)
    ]
    return ReadChains(layers, seen.to(layers[0][0].device), skipped)


def _shared(row: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    different = (n for n, (token, one) in enumerate(zip(row, other, strict=False)) if token != one)
    return next(different, min(len(row), len(other)))
