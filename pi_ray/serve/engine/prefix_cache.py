"""The prefix cache: keys and values of prompts in blocks of 16 tokens, which prompts with the same beginning reuse."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import count

import torch

BLOCK_SIZE = 16  # tokens
Block = tuple[torch.Tensor, torch.Tensor]  # keys and values, (layers, heads, BLOCK_SIZE, dim) each
# (namespace of a first block or number of the block before, the block's tokens); tokens are compared, not their hashes
BlockKey = tuple[str | int, tuple[int, ...]]


class PrefixCache:
    """At most `limit` bytes of blocks, in a tree for each namespace; the least recently used leaf is evicted.

    A namespace is an adapter and a salt.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.nbytes = 0
        self._numbers = count()
        # -> (the block's number, block); least recently used first, each block before the one that it follows
        self._blocks: OrderedDict[BlockKey, tuple[int, Block]] = OrderedDict()

    def find(self, namespace: str, prompt: Sequence[int]) -> list[Block]:
        """Blocks of the longest cached prefix of `prompt`, without its last token, which gives the logits."""
        path = self._path(namespace, prompt, (len(prompt) - 1) // BLOCK_SIZE)
        self._mark_used(path)
        return [self._blocks[key][1] for key in path]

    def add(self, namespace: str, prompt: Sequence[int], copy_block: Callable[[int, int], Block]) -> None:
        """Cache the whole blocks of `prompt` that are not cached yet, copied by `copy_block(start, stop)`."""
        if not self.limit:
            return
        path = self._path(namespace, prompt, len(prompt) // BLOCK_SIZE)
        for start in range(len(path) * BLOCK_SIZE, len(prompt) - BLOCK_SIZE + 1, BLOCK_SIZE):
            keys, values = copy_block(start, start + BLOCK_SIZE)
            follows = self._blocks[path[-1]][0] if path else namespace
            path.append((follows, tuple(prompt[start : start + BLOCK_SIZE])))
            self._blocks[path[-1]] = next(self._numbers), (keys, values)
            self.nbytes += keys.nbytes + values.nbytes
        self._mark_used(path)
        while self.nbytes > self.limit:
            _, (_, (keys, values)) = self._blocks.popitem(last=False)
            self.nbytes -= keys.nbytes + values.nbytes

    def _path(self, namespace: str, prompt: Sequence[int], blocks: int) -> list[BlockKey]:
        """The keys of those of the first `blocks` blocks of `prompt` that are cached."""
        path: list[BlockKey] = []
        follows: str | int = namespace
        for start in range(0, blocks * BLOCK_SIZE, BLOCK_SIZE):
            key = (follows, tuple(prompt[start : start + BLOCK_SIZE]))
            if key not in self._blocks:
                break
            follows, _ = self._blocks[key]
            path.append(key)
        return path

    def _mark_used(self, path: Sequence[BlockKey]) -> None:
        for key in reversed(path):
            self._blocks.move_to_end(key)
