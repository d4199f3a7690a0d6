"""Keys and values of prompts that were read, in blocks of 16 tokens: a prompt that begins alike takes them over and reads only the rest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

BLOCK = 16
Block = tuple[torch.Tensor, torch.Tensor]  # keys and values, (layers, heads, BLOCK, dim) each


class Node:
    """A block behind the blocks on the way to it; the tokens themselves are compared, so that no two prompts can be taken for one another."""

    def __init__(self, parent: Node | None, tokens: tuple[int, ...], block: Block | None):
        self.parent, self.tokens, self.block = parent, tokens, block
        self.children: dict[tuple[int, ...], Node] = {}


class Prefixes:
    """A tree of blocks for each adapter, which changes keys and values. Holds at most `limit` bytes; the least recently used end goes first."""

    def __init__(self, limit: int):
        self.limit = limit
        self.nbytes = 0
        self._roots: dict[str, Node] = {}
        self._used: OrderedDict[Node, None] = OrderedDict()  # least recently used first; a node always before those it hangs on

    def find(self, adapter: str, prompt: Sequence[int]) -> list[Block]:
        """The longest known beginning of `prompt`, block by block. The last token is never part of it: someone has to compute the logits."""
        path = self._path(adapter, prompt, (len(prompt) - 1) // BLOCK)
        self._touch(path)
        return [node.block for node in path]

    def add(self, adapter: str, prompt: Sequence[int], copy: Callable[[int, int], Block]) -> None:
        """Keep the whole blocks of `prompt` that are not known yet; `copy(start, stop)` gives those of some positions."""
        if not self.limit:
            return
        path = self._path(adapter, prompt, len(prompt) // BLOCK)
        node = path[-1] if path else self._roots.setdefault(adapter, Node(None, (), None))
        for start in range(len(path) * BLOCK, len(prompt) - BLOCK + 1, BLOCK):
            tokens = tuple(prompt[start : start + BLOCK])
            block = copy(start, start + BLOCK)
            node.children[tokens] = node = Node(node, tokens, block)
            self.nbytes += _size(block)
            path.append(node)
        self._touch(path)
        while self.nbytes > self.limit:
            self._drop()

    def _path(self, adapter: str, prompt: Sequence[int], blocks: int) -> list[Node]:
        node, path = self._roots.get(adapter), []
        for i in range(blocks):
            node = node and node.children.get(tuple(prompt[i * BLOCK : (i + 1) * BLOCK]))
            if not node:
                break
            path.append(node)
        return path

    def _touch(self, path: Sequence[Node]) -> None:
        for node in reversed(path):
            self._used[node] = None
            self._used.move_to_end(node)

    def _drop(self) -> None:
        node, _ = self._used.popitem(last=False)
        self.nbytes -= _size(node.block)
        del node.parent.children[node.tokens]


def _size(block: Block) -> int:
    return block[0].nbytes + block[1].nbytes
