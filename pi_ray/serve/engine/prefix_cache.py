"""The prefix cache: keys and values of prompts in blocks of 16 tokens, which prompts with the same beginning reuse.

Layers that keep a state have it at one position and not of every block. Their states are kept behind some blocks: where
a prompt was read in pieces, and where two prompts part. The first of two prompts that begin alike leaves its blocks.
The second finds how far they agree and keeps the states there. From the third on, blocks and states are reused.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import torch

BLOCK_SIZE = 16  # tokens
Block = tuple[torch.Tensor, ...]  # keys and values, (layers, heads, BLOCK_SIZE, dim) each; of layers of a shape
States = Mapping[Any, torch.Tensor]  # of one row at one position, by layer and kind
# (namespace of a first block or number of the block before, the block's tokens); tokens are compared, not their hashes
BlockKey = tuple[str | int, tuple[int, ...]]


class Prefix(NamedTuple):
    """The cached beginning of a prompt, at most up to its last token, which gives the logits."""

    blocks: Sequence[Block] = ()  # with which a row can begin
    states: States | None = None  # behind them, where layers keep some
    known: int = 0  # tokens whose blocks are there; without states behind the last ones a row cannot begin with all


@dataclass
class CachedBlock:
    number: int
    block: Block
    states: States | None = None  # behind the block

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.block, *(self.states or {}).values()))


class PrefixCache:
    """At most `limit` bytes of blocks, in a tree for each namespace; the least recently used leaf is evicted.

    A namespace is an adapter and a salt. With `needs_states` blocks are of use only up to one with states behind it.
    """

    def __init__(self, limit: int, needs_states: bool = False):
        self.limit, self.needs_states = limit, needs_states
        self.nbytes = 0
        self._numbers = count()
        # least recently used first, each block before the one that it follows
        self._blocks: OrderedDict[BlockKey, CachedBlock] = OrderedDict()

    def find(self, namespace: str, prompt: Sequence[int]) -> Prefix:
        """The longest cached prefix of `prompt`."""
        path = self._path(namespace, prompt, (len(prompt) - 1) // BLOCK_SIZE)
        self._mark_used(path)
        found, known = [self._blocks[key] for key in path], len(path) * BLOCK_SIZE
        while self.needs_states and found and found[-1].states is None:
            found.pop()
        return Prefix([each.block for each in found], found[-1].states if found else None, known)

    def add(
        self, namespace: str, prompt: Sequence[int], copy_block: Callable[[int, int], Block],
        states: States | None = None,
    ) -> None:
        """Cache the whole blocks of `prompt` that are not cached yet, copied by `copy_block(start, stop)`.

        `states` are those behind `prompt`, which then ends with a whole block.
        """
        if not self.limit:
            return
        path = self._path(namespace, prompt, len(prompt) // BLOCK_SIZE)
        for start in range(len(path) * BLOCK_SIZE, len(prompt) - BLOCK_SIZE + 1, BLOCK_SIZE):
            made = CachedBlock(next(self._numbers), copy_block(start, start + BLOCK_SIZE))
            follows = self._blocks[path[-1]].number if path else namespace
            path.append((follows, tuple(prompt[start : start + BLOCK_SIZE])))
            self._blocks[path[-1]] = made
            self.nbytes += made.nbytes
        if path and states is not None and (last := self._blocks[path[-1]]).states is None:
            last.states = states
            self.nbytes += sum(state.nbytes for state in states.values())
        self._mark_used(path)
        while self.nbytes > self.limit:
            _, evicted = self._blocks.popitem(last=False)
            self.nbytes -= evicted.nbytes

    def _path(self, namespace: str, prompt: Sequence[int], blocks: int) -> list[BlockKey]:
        """The keys of those of the first `blocks` blocks of `prompt` that are cached."""
        path: list[BlockKey] = []
        follows: str | int = namespace
        for start in range(0, blocks * BLOCK_SIZE, BLOCK_SIZE):
            key = (follows, tuple(prompt[start : start + BLOCK_SIZE]))
            if key not in self._blocks:
                break
            follows = self._blocks[key].number
            path.append(key)
        return path

    def _mark_used(self, path: Sequence[BlockKey]) -> None:
        for key in reversed(path):
            self._blocks.move_to_end(key)
