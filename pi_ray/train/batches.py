"""Rows of a phase -> tensors of one forward pass: packed behind a shared prefix, or plain padded rows.

Both give logits at the answer's tokens only, and equal losses and gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pi_ray.errors import CorruptArtifactError
from pi_ray.models import last
from pi_ray.run.artifact import read_manifest, read_parquet, verify
from pi_ray.train import gist, shared_prefix
from pi_ray.train.shared_prefix import Layout

TRIAL = [7, 3, 9, 2], [([5, 11, 4, 8, 13, 6], [10, 3]), ([12, 6, 9], [4, 14, 7, 2, 11])]  # a prefix and two rows (prompt, label) of any vocabulary
CLOSE, CLOSE_IN_HALF = 1e-3, 0.2  # of the logits' spread: rounding that packed and plain rows may differ by; in half precision a mixture may take other experts


@dataclass(frozen=True)
class Batch:
    """`inputs` go to the model; logits (1, N, V) or (B, K, V) come back and are flattened against `labels`; -100 is not counted."""

    inputs: dict[str, Any]
    labels: torch.Tensor
    tokens: int  # tokens that pass through the model
    plain_tokens: int  # tokens that rows with a prefix each would have


def manifest_of(folder: Path) -> dict[str, Any]:
    """What a prepared dataset says of itself, before a row is read. Raises CorruptArtifactError when it is not there."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise CorruptArtifactError(f"{folder}: no manifest, so it is not whole; 'pi-ray prepare' makes it again")
    return manifest


def longest_of(phases: Path) -> int:
    """Tokens of the longest row of any prepared dataset, with its prefix and an answer a quarter longer than any label, as a teacher's may be."""
    found = [manifest_of(folder)["tokens"] for folder in phases.iterdir() if not folder.name.startswith(".")]
    return max(t["prefix"] + t["row_max"] for t in found) + math.ceil(1.25 * max(t["label_max"] for t in found))


class PhaseRows:
    """The dataset of one phase, memory-mapped: prefix ids, and (prompt ids, label ids) by row number."""

    def __init__(self, folder: Path):
        import pyarrow as pa
        import pyarrow.compute as pc

        manifest_of(folder)
        manifest = verify(folder)
        self.prefix: list[int] = manifest["prefix_ids"]
        self.rate, self.shots = manifest["phase"]["rate"], manifest["phase"]["shots"]
        self.template: str = manifest["template"]
        self.tokens: dict[str, float] = manifest["tokens"]
        files = sorted(name for name in manifest["files"] if name.endswith(".parquet"))
        self._table = pa.concat_tables(read_parquet(Path(folder) / f, ["prompt_ids", "label_ids"], memory_map=True) for f in files)
        self.prompt_lengths, self.label_lengths = (pc.list_value_length(self._table[name]).to_numpy() for name in ("prompt_ids", "label_ids"))

    def __len__(self) -> int:
        return self._table.num_rows

    def take(self, numbers: Sequence[int]) -> list[tuple[list[int], list[int]]]:
        picked = self._table.take(list(numbers))
        return list(zip(picked["prompt_ids"].to_pylist(), picked["label_ids"].to_pylist(), strict=True))


def packed(prefix: list[int], rows: Sequence[tuple[list[int], list[int]]]) -> Batch:
    """One sequence [prefix][row 1]...[row B]; position ids start again after the prefix for every row. The last label is predicted, never fed.

    Of a prefix that ends with gist tokens the rows see these alone.
    """
    fed = [prompt + label[:-1] for prompt, label in rows]
    lengths = [len(ids) for ids in fed]
    ids = prefix + [token for row in fed for token in row]
    positions = [*range(len(prefix)), *(len(prefix) + i for n in lengths for i in range(n))]
    keep, labels, end = [], [], len(prefix)
    for (_, label), n in zip(rows, lengths, strict=True):
        end += n
        keep.extend(range(end - len(label), end))
        labels.extend(label)
    inputs = {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "logits_to_keep": torch.tensor(keep),
        "layout": Layout.build(len(prefix), lengths, visible=gist.count(prefix) or len(prefix)),
        "use_cache": False,
    }
    return Batch(inputs, torch.tensor(labels), len(ids), len(rows) * len(prefix) + sum(lengths))


def plain(prefix: list[int], rows: Sequence[tuple[list[int], list[int]]]) -> Batch:
    """B rows of prefix + prompt + label, padded on the left so that labels end together: logits of the last K positions suffice."""
    fed = [prefix + prompt + label[:-1] for prompt, label in rows]
    longest, most = max(map(len, fed)), max(len(label) for _, label in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full((len(rows), most), -100)
    for i, (row, (_, label)) in enumerate(zip(fed, rows, strict=True)):
        ids[i, longest - len(row):] = torch.tensor(row)
        mask[i, longest - len(row):] = 1
        labels[i, most - len(label):] = torch.tensor(label)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "logits_to_keep": last(most), "use_cache": False}
    return Batch(inputs, labels.flatten(), ids.numel(), sum(map(len, fed)))


def to_device(batch: Batch, device: str) -> Batch:
    moved = {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.inputs.items()}
    return Batch(moved, batch.labels.to(device), batch.tokens, batch.plain_tokens)


@torch.no_grad()
def differs(model: Any, device: str, flex: bool) -> str:
    """Have `model` take packed rows, and compute with it: "" where it gives what it gives for plain ones, else how far it is off, and it attends as before."""
    inner = getattr(model, "module", model)
    before = inner.config._attn_implementation
    model.eval()
    own = _logits(model, to_device(plain(*TRIAL), device))
    shared_prefix.enable(inner, flex)
    off = _logits(model, to_device(packed(*TRIAL), device)) - own
    model.train()
    share = (off.float().norm() / (own - own.mean()).float().norm()).item()
    if share < (CLOSE if own.dtype == torch.float32 else CLOSE_IN_HALF):
        return ""
    inner.set_attn_implementation(before)
    return f"in packed rows it computes something else (logits {share:.2g} of their spread apart)"


def _logits(model: Any, batch: Batch) -> torch.Tensor:
    """(N, V) at the answer tokens of a batch, row by row."""
    return model(**batch.inputs).logits.flatten(0, -2)[batch.labels != -100]
