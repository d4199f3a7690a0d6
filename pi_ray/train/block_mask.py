"""Flex attention's block mask of a packed batch, computed from the places of its rows.

torch's `create_block_mask` evaluates the mask for all S x S pairs of tokens, for each batch anew. A token sees two
intervals at most, a part of the prefix and a part of its own row, so that counting what each token sees of each block
takes S x S / 128, on the CPU, with nothing to compile for new lengths.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # tokens of a block


def make_block_mask(
    prefix: int, visible: int, lengths: Sequence[int], window: int | None, mask_mod: Callable[..., torch.Tensor],
    device: torch.device | str,
) -> BlockMask:
    """The mask of `prefix` tokens and rows of these lengths, which see the last `visible` ones of the prefix.

    With a sliding window a token sees the last `window` tokens by their positions. `mask_mod` says the same of pairs.
    """
    seen = _seen_of_blocks(prefix, visible, lengths, window)
    size, padding = len(seen), -len(seen) % BLOCK
    seen = F.pad(seen, (0, 0, 0, padding)).view(-1, BLOCK, seen.shape[1])  # (query blocks, BLOCK, key blocks)
    full, some = (seen == BLOCK).all(1), (seen > 0).any(1)
    (count, blocks), (full_count, full_blocks) = _ordered(some & ~full, device), _ordered(full, device)
    return BlockMask.from_kv_blocks(
        count, blocks, full_count, full_blocks, BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(size, size)
    )


def _seen_of_blocks(prefix: int, visible: int, lengths: Sequence[int], window: int | None) -> torch.Tensor:
    """(S, ceil(S / BLOCK)): how many tokens of each block each token sees."""
    counts = torch.tensor(list(lengths), dtype=torch.long)
    size = prefix + int(counts.sum())
    place = torch.arange(size)
    own = torch.repeat_interleave(prefix + counts.cumsum(0) - counts, counts)  # where each token's row begins
    begin = torch.cat([torch.zeros(prefix, dtype=torch.long), own])
    position = torch.cat([place[:prefix], prefix + place[prefix:] - own])
    near = torch.full((size,), -size) if window is None else 1 - window
    seen = _overlap(torch.maximum(begin, place + near), place + 1)
    behind = _overlap(torch.maximum(torch.full((size,), prefix - visible), position + near), torch.tensor(prefix))
    behind[:prefix] = 0  # the prefix itself has it in its own interval
    return seen + behind


def _overlap(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """(S, blocks): how many tokens of each block lie in [low, high) of each token."""
    edges = torch.arange(0, len(low), BLOCK)
    return (torch.minimum(high.view(-1, 1), edges + BLOCK) - torch.maximum(low[:, None], edges)).clamp(min=0)


def _ordered(blocks: torch.Tensor, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """How many key blocks each query block has, (1, 1, Q), and their numbers first, (1, 1, Q, K)."""
    numbers = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
    return blocks.sum(-1).int()[None, None].to(device), numbers.int()[None, None].to(device)
