"""The prefix cache: keys and values of prompts in blocks of 16 tokens, which prompts with the same beginning reuse."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

BLOCK_SIZE = 16  # tokens
Block = tuple[torch.Tensor, torch.Tensor]  # keys and values, (layers, heads, BLOCK_SIZE, dim) each


class PrefixNode:
    """A block behind those on the path to it; a root has none. Tokens are compared, not their hashes."""

    def __init__(self, parent: PrefixNode | None = None, tokens: tuple[int, ...] = (), block: Block | None = None):
        self.parent, self.tokens, self.block = parent, tokens, block
        self.children: dict[tuple[int, ...], PrefixNode] = {}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.block or ())


class PrefixCache:
    """A tree of blocks for each adapter, at most `limit` bytes in all; the least recently used leaf is evicted."""

    def __init__(self, limit: int):
        self.limit = limit
        self.nbytes = 0
        self._roots: dict[str, PrefixNode] = {}
        self._lru: OrderedDict[PrefixNode, None] = OrderedDict()  # least recently used first, children before parents

    def find(self, adapter: str, prompt: Sequence[int]) -> list[Block]:
        """Blocks of the longest cached prefix of `prompt`, without its last token, which gives the logits."""
        path = self._path(adapter, prompt, (len(prompt) - 1) // BLOCK_SIZE)
        self._mark_used(path)
        return [node.block for node in path if node.block]

    def add(self, adapter: str, prompt: Sequence[int], copy_block: Callable[[int, int], Block]) -> None:
        """Cache the whole blocks of `prompt` that are not cached yet, copied by `copy_block(start, stop)`."""
        if not self.limit:
            return
        path = self._path(adapter, prompt, len(prompt) // BLOCK_SIZE)
        node = path[-1] if path else self._roots.setdefault(adapter, PrefixNode())
        for start in range(len(path) * BLOCK_SIZE, len(prompt) - BLOCK_SIZE + 1, BLOCK_SIZE):
            tokens = tuple(prompt[start : start + BLOCK_SIZE])
            node.children[tokens] = node = PrefixNode(node, tokens, copy_block(start, start + BLOCK_SIZE))
            self.nbytes += node.nbytes
            path.append(node)
        self._mark_used(path)
        while self.nbytes > self.limit:
            evicted, _ = self._lru.popitem(last=False)
            self.nbytes -= evicted.nbytes
            assert evicted.parent, "roots are not in the list"
            del evicted.parent.children[evicted.tokens]

    def _path(self, adapter: str, prompt: Sequence[int], blocks: int) -> list[PrefixNode]:
        """The cached ones of the first `blocks` blocks of `prompt`, from the root on."""
        node, path = self._roots.get(adapter), []
        for i in range(blocks):
            node = node and node.children.get(tuple(prompt[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE]))
            if not node:
                break
            path.append(node)
        return path

    def _mark_used(self, path: Sequence[PrefixNode]) -> None:
        for node in reversed(path):
            self._lru[node] = None
            self._lru.move_to_end(node)
