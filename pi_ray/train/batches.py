"""Collation: rows of a phase become the tensors of one forward pass, packed behind a shared prefix or padded, or of two
passes, of which the second goes on from the prefix's cache.

Every kind of batch gives logits at the answers' tokens only (batch_logits.py), and equal losses and gradients.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pi_ray.errors import CorruptArtifactError
from pi_ray.models import last_logits_index
from pi_ray.run.artifact import CORRUPT, read_manifest, verify_artifact
from pi_ray.run.row_store import read_range
from pi_ray.train import gist
from pi_ray.train.shared_prefix import Layout


@dataclass(frozen=True)
class Batch:
    """`inputs` go to the model; its logits (1, N, V) or (B, K, V) are flattened against `labels`, -100 for none."""

    inputs: dict[str, Any]
    labels: torch.Tensor
    tokens: int  # tokens that pass through the model
    plain_tokens: int  # tokens of the same rows with a copy of the prefix each


LEAST_SUFFIX = 2  # tokens of a row behind a cache: one alone is taken for generation, which changes the cache in place

# (prompt ids without the prefix, label ids). A label may hold ids that are fed and not learned, such as a user's turn
# between two answers: these are stored as ~id, which is below 0.
TokenRow = tuple[list[int], list[int]]
Pack = Callable[[list[int], Sequence[TokenRow]], Batch]  # (prefix, rows) -> batch


def dataset_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared dataset, whose rows are not read. Raises CorruptArtifactError when it is missing."""
    if (manifest := read_manifest(folder)) is None:
        raise CorruptArtifactError(f"{folder}: no manifest, so it is not whole; 'pi-ray prepare' makes it again")
    return manifest


def prepared_row_tokens(phases: Path) -> int:
    """Tokens of the longest prepared row, with an answer a quarter longer than any label, as a teacher's may be."""
    whole = (folder for folder in phases.iterdir() if not folder.name.startswith(".") and folder.suffix != CORRUPT)
    tokens = [dataset_manifest(folder)["tokens"] for folder in whole]
    return max(t["prefix"] + t["row_max"] for t in tokens) + math.ceil(1.25 * max(t["label_max"] for t in tokens))


class PhaseDataset:
    """The memory-mapped rows of one phase: its prefix ids, and (prompt ids, label ids) by row number."""

    def __init__(self, folder: Path):
        dataset_manifest(folder)
        manifest = verify_artifact(folder)
        self.prefix: list[int] = manifest["prefix_ids"]
        self.rate: float = manifest["phase"]["rate"]
        self.tokens: dict[str, float] = manifest["tokens"]
        files, columns = sorted(f for f in manifest["files"] if f.endswith(".parquet")), ["prompt_ids", "label_ids"]
        self._table = pa.concat_tables(read_range(Path(folder) / f, columns=columns, memory_map=True) for f in files)
        self.prompt_lengths, self.label_lengths = (pc.list_value_length(self._table[c]).to_numpy() for c in columns)
        fed = count_fed(self._table["label_ids"])
        self.prompt_lengths, self.label_lengths = self.prompt_lengths + fed, self.label_lengths - fed

    def __len__(self) -> int:
        return self._table.num_rows

    def take(self, numbers: Sequence[int]) -> list[TokenRow]:
        rows = self._table.take(pa.array(numbers, pa.int64()))
        return list(zip(rows["prompt_ids"].to_pylist(), rows["label_ids"].to_pylist(), strict=True))


def count_fed(labels: pa.ChunkedArray) -> np.ndarray:
    """How many ids of each label are fed and not learned."""
    counts = [np.zeros(0, np.int64)]
    for chunk in labels.chunks:
        is_fed = pc.less(pc.list_flatten(chunk), 0)
        rows = pc.list_parent_indices(chunk).filter(is_fed) if pc.any(is_fed).as_py() else np.zeros(0, np.int64)
        counts.append(np.bincount(rows, minlength=len(chunk)))
    return np.concatenate(counts)


def fed_ids(label: Sequence[int]) -> list[int]:
    """The ids of a label as they are fed."""
    return [i if i >= 0 else ~i for i in label]


def packed_batch(prefix: list[int], rows: Sequence[TokenRow]) -> Batch:
    """One sequence [prefix][row 1]...[row B], in which every row's position ids go on from the prefix.

    The last token of a label is predicted, never fed. If the prefix ends with gist tokens, rows see these alone of it.
    """
    ids, positions = list(prefix), list(range(len(prefix)))
    lengths, keep, labels = list[int](), list[int](), list[int]()
    for prompt, label in rows:
        lengths.append(len(prompt) + len(label) - 1)
        ids += prompt + fed_ids(label[:-1])
        positions += range(len(prefix), len(prefix) + lengths[-1])
        keep += [place for place, i in enumerate(label, start=len(ids) - len(label)) if i >= 0]
        labels += [i for i in label if i >= 0]
    inputs = {
        "input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions]),
        "logits_to_keep": torch.tensor(keep), "use_cache": False,
        "layout": Layout.build(len(prefix), lengths, visible=gist.count_gist_tokens(prefix) or len(prefix)),
    }
    return Batch(inputs, torch.tensor(labels), len(ids), len(rows) * len(prefix) + sum(lengths))


def plain_batch(prefix: list[int], rows: Sequence[TokenRow]) -> Batch:
    """B rows of prefix + prompt + label, padded on the left: labels end together, so the last K logits suffice."""
    fed = [prefix + prompt + fed_ids(label[:-1]) for prompt, label in rows]
    longest, longest_label = max(map(len, fed)), max(len(label) for _, label in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full((len(rows), longest_label), -100)
    for i, (row, (_, label)) in enumerate(zip(fed, rows, strict=True)):
        ids[i, longest - len(row) :] = torch.tensor(row)
        mask[i, longest - len(row) :] = 1
        labels[i, longest_label - len(label) :] = torch.tensor([i if i >= 0 else -100 for i in label])
    inputs = {
        "input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "logits_to_keep": last_logits_index(longest_label), "use_cache": False,
    }
    return Batch(inputs, labels.flatten(), ids.numel(), sum(map(len, fed)))


def suffix_batch(prefix: list[int], rows: Sequence[TokenRow]) -> Batch:
    """The prefix by itself, and B rows of prompt + label behind it, padded on the right, where nothing is learned."""
    if not all(prompt for prompt, _ in rows):  # a label's first token is predicted at the token before it
        prefix, rows = prefix[:-1], [([*prefix[-1:], *prompt], label) for prompt, label in rows]
    fed = [prompt + fed_ids(label[:-1]) for prompt, label in rows]
    longest = max(LEAST_SUFFIX, *map(len, fed))
    starts = [len(prompt) - 1 for prompt, _ in rows]  # of the token after which a label begins
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full((len(rows), longest), -100)
    for i, (row, start, (_, label)) in enumerate(zip(fed, starts, rows, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, start : start + len(label)] = torch.tensor([i if i >= 0 else -100 for i in label])
    inputs = {
        "prefix_ids": torch.tensor([prefix], dtype=torch.long), "input_ids": ids,
        "position_ids": torch.arange(len(prefix), len(prefix) + longest).expand(len(rows), -1),
        "logits_to_keep": torch.arange(min(starts), longest),
    }
    tokens, plain_tokens = len(prefix) + ids.numel(), len(rows) * len(prefix) + sum(map(len, fed))
    return Batch(inputs, labels[:, min(starts) :].flatten(), tokens, plain_tokens)


def to_device(batch: Batch, device: str) -> Batch:
    moved = {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.inputs.items()}
    return replace(batch, inputs=moved, labels=batch.labels.to(device))
