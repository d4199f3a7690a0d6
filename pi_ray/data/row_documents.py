"""Documents that come with a row, such as passages retrieved for it, at the rate of each phase.

The template's documents are one text for all rows; these differ from row to row, so actors compress them, each with the model loaded once, a
range of rows at a time. Each document is compressed by itself: where rows share one, the cache gives it again.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pi_ray.cluster import placement, storage_sync
from pi_ray.compress.template import compress_template
from pi_ray.config import RunConfig
from pi_ray.data.phase_dataset import working_folder
from pi_ray.data.ray_map import fan_out
from pi_ray.models import load_tokenizer
from pi_ray.prompt import Template
from pi_ray.protocols import Row
from pi_ray.run.artifact import is_current, read_manifest, staged
from pi_ray.run.directory import RunDir, documents_file
from pi_ray.run.row_store import count, has_piece, join, read_range, write_piece

PIECE_ROWS = 32  # rows of one call of an actor
COUNTS = ("count", "tokens", "full_tokens", "off")  # of a row's documents; off: how many came no closer to their rate than the tolerance
SCHEMA = pa.schema({"id": pa.string(), "documents": pa.list_(pa.string()), **dict.fromkeys(COUNTS, pa.int64())})

Want = tuple[str, float]  # split, template rate between 0 and 1


@dataclass(frozen=True)
class Piece:
    """The documents of rows [begin, end) of `split` as a template rate of `rate` leaves them, to be written to `path`."""

    split: str
    rate: float
    begin: int
    end: int
    path: str


class CompressDocuments:
    """Work of an actor."""

    def __init__(self, config: RunConfig):
        import torch

        from pi_ray.registry import compressors

        torch.set_num_threads(max(1, int(config.cluster.prepare_resources.get("CPU", 1))))  # what Ray gives each actor, of which a node may hold many
        self.run, self.tokenizer = RunDir(config.root), load_tokenizer(config.model)
        self.config, self.own = config.compress, config.compress.of_documents
        self.compressor = compressors[self.own.name](self.own)

    def __call__(self, item: dict[str, Any]) -> None:
        piece = Piece(**item)
        rows = self.run.rows_of(piece.split)[piece.begin : piece.end]
        write_piece(piece.path, pa.Table.from_pylist([self._row(row, rate_of_documents(self.config, piece.rate)) for row in rows], schema=SCHEMA))

    def _row(self, row: Row, rate: float) -> dict[str, Any]:
        made = [compress_template(self.compressor, Template("", (document,)), rate, self.tokenizer, self.own) for document in row.documents]
        return {
            "id": row.id, "documents": [c.text for c in made], "count": len(made), "tokens": sum(c.tokens for c in made),
            "full_tokens": sum(c.full_tokens for c in made), "off": sum(abs(c.achieved - c.asked) > self.own.tolerance for c in made),
        }


def rate_of_documents(config: Any, rate: float) -> float:
    """What stays of documents where the template's rate is `rate`."""
    return config.documents.at(rate) if config.documents else rate


def is_done(run: RunDir, fingerprint: str) -> bool:
    """Whether there is nothing to compress, or all of it was."""
    rows = read_manifest(run.rows)
    return not (rows and rows.get("documents")) or is_current(run.documents, fingerprint)


def compress_documents(config: RunConfig, run: RunDir, fingerprint: str, wanted: Iterable[Want], progress: Callable[[str], None]) -> None:
    """Write the artefact documents/: one file for each split and rate, row by row as the split has them."""
    folder = working_folder(run.documents, fingerprint)
    for left in run.root.glob(f".{run.documents.name}-*.partial"):
        if left != folder:
            shutil.rmtree(left, ignore_errors=True)
    pieces = {want: _plan(run, *want, str(folder)) for want in dict.fromkeys(wanted)}
    planned = [p for some in pieces.values() for p in some]
    todo = [p for p in planned if not has_piece(p.path, SCHEMA, run.rows_of(p.split).ids(p.begin, p.end))]
    if len(todo) < len(planned):
        progress(f"documents: {len(planned) - len(todo)} of {len(planned)} pieces were already there")
    fan_out([asdict(p) for p in todo], CompressDocuments, config, actors=-(-len(todo) // 4), mirror=storage_sync.sync_for(run.root), **placement.worker_options(config, "prepare"))
    totals: dict[float, Counter] = {}
    with staged(run.documents, fingerprint=fingerprint, compressor=config.compress.of_documents.name) as made:
        for (split, rate), some in pieces.items():
            file = made / documents_file(split, rate)
            join([p.path for p in some], file, SCHEMA)
            table = read_range(file, columns=COUNTS)
            totals.setdefault(rate, Counter()).update({name: pc.sum(table[name]).as_py() or 0 for name in COUNTS})
    shutil.rmtree(folder, ignore_errors=True)
    for rate, total in totals.items():
        off = f"; {total['off']} came no closer than {config.compress.tolerance:g} (protected or very short text)" if total["off"] else ""
        progress(
            f"documents: rate {rate_of_documents(config.compress, rate):g} -> achieved {total['tokens'] / max(total['full_tokens'], 1):.2f} "
            f"({total['tokens']} of {total['full_tokens']} tokens of {total['count']} documents of rows){off}"
        )


def _plan(run: RunDir, split: str, rate: float, folder: str) -> list[Piece]:
    rows = count(run.rows / f"{split}.parquet")
    name = documents_file(split, rate).removesuffix(".parquet")
    return [Piece(split, rate, a, min(a + PIECE_ROWS, rows), f"{folder}/{name}-{i:05d}.parquet") for i, a in enumerate(range(0, rows, PIECE_ROWS))]
