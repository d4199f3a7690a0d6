"""Documents that come with a row, such as passages retrieved for it, at the rate of each phase.

The template's documents are one text for all rows; these differ from row to row, so actors compress them, each with the
model loaded once, a range of rows at a time. Each document is compressed by itself, and an actor remembers those that
rows share: there may be millions, too many for a file each in the cache.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pi_ray.compress.template import compress_template
from pi_ray.config import CompressConfig, RunConfig
from pi_ray.data.pieces import Pieces, RowRange, partial_folder, run_pipeline
from pi_ray.models import load_tokenizer
from pi_ray.prompt import Template
from pi_ray.run.artifact import is_current, read_manifest, staged
from pi_ray.run.directory import RunDir, documents_file
from pi_ray.run.row_store import count_rows, join_pieces, read_range

# A piece is at least PIECE_ROWS rows, since a model may take seconds a document, and at most MAX_PIECE_ROWS: each costs
# Ray three tasks. PIECES of them balance the actors.
PIECE_ROWS, MAX_PIECE_ROWS, PIECES = 32, 512, 64
REMEMBERED = 4096  # documents, each at one rate, that an actor holds compressed
COUNTS = ("count", "tokens", "full_tokens", "off")  # of a row's documents; off: not within the tolerance of their rate
SCHEMA = pa.schema({"id": pa.string(), "documents": pa.list_(pa.string()), **dict.fromkeys(COUNTS, pa.int64())})


class CompressDocuments:
    """Inside an actor: compresses the documents of a range of rows, once for each template rate."""

    def __init__(self, config: RunConfig, rates: dict[str, list[float]]):
        import torch

        from pi_ray.registry import compressors

        # as many threads as Ray gives each actor CPUs, since a node may hold many actors
        torch.set_num_threads(max(1, int(config.cluster.prepare_resources.get("CPU", 1))))
        self.tokenizer = load_tokenizer(config.model)
        self.config, self.documents_config = config.compress, config.compress.for_documents
        self.compressor = compressors[self.documents_config.name](self.documents_config)
        self.rates = rates
        self._compressed = lru_cache(REMEMBERED)(self._compress_document)

    def __call__(self, table: pa.Table, rows: RowRange) -> dict[float, pa.Table]:
        texts = table["documents"].to_pylist()
        return {rate: self._compress(table["id"], texts, rate) for rate in self.rates[rows.split]}

    def _compress(self, ids: pa.ChunkedArray, texts: list[list[str] | None], template_rate: float) -> pa.Table:
        rate = rate_of_documents(self.config, template_rate)
        made = [[self._compressed(text, rate) for text in row or ()] for row in texts]
        tolerance = self.documents_config.tolerance
        columns = {
            "id": ids, "documents": [[c.text for c in row if c.text.strip()] for row in made],
            "count": [len(row) for row in made],
            "tokens": [sum(c.tokens for c in row) for row in made],
            "full_tokens": [sum(c.full_tokens for c in row) for row in made],
            "off": [sum(abs(c.achieved - c.asked) > tolerance for c in row) for row in made],
        }
        return pa.table(columns, schema=SCHEMA)

    def _compress_document(self, text: str, rate: float) -> Any:
        return compress_template(
            Template("", (text,)), rate, self.tokenizer, self.documents_config, lambda _: self.compressor,
            is_stored=False,
        )


def rate_of_documents(config: CompressConfig, rate: float) -> float:
    """The share of documents that stays where the template's rate is `rate`."""
    return config.documents.rate_at(rate) if config.documents else rate


def has_documents(run: RunDir, fingerprint: str, wanted: Iterable[tuple[str, float]]) -> bool:
    """Whether rows have no documents, or those of each (split, template rate) in `wanted` were compressed.

    None is wanted at rate 0, as in the baseline without a prompt.
    """
    manifest = read_manifest(run.rows)
    if not (manifest and manifest.get("documents")):
        return True
    files = [run.documents / documents_file(split, rate) for split, rate in wanted]
    return not files or (is_current(run.documents, fingerprint) and all(file.exists() for file in files))


def compress_documents(
    config: RunConfig, run: RunDir, fingerprint: str, wanted: Iterable[tuple[str, float]],
    progress: Callable[[str], None],
) -> None:
    """Write the artifact documents/: one file for each (split, template rate), row by row as the split has them."""
    folder = partial_folder(run.documents, fingerprint)
    rates: dict[str, list[float]] = {}
    for split, rate in dict.fromkeys(wanted):
        rates.setdefault(split, []).append(rate)
    outputs = {
        split: {rate: f"{folder}/{documents_file(split, rate).removesuffix('.parquet')}-" for rate in some}
        for split, some in rates.items()
    }
    rows = max(count_rows(run.rows_of(split).path) for split in outputs)
    pieces = Pieces(run, SCHEMA, max(PIECE_ROWS, min(MAX_PIECE_ROWS, rows // PIECES)), outputs)
    todo = pieces.unfinished("documents", progress)
    run_pipeline(config, pieces, todo, CompressDocuments, config, rates, actors=-(-len(todo) // 4))
    totals: dict[float, Counter[str]] = {}
    with staged(run.documents, fingerprint=fingerprint, compressor=config.compress.for_documents.name) as made:
        for split, some in rates.items():
            for rate in some:
                file = made / documents_file(split, rate)
                join_pieces(pieces.files(split, rate), file, SCHEMA)
                table = read_range(file, columns=COUNTS)
                totals.setdefault(rate, Counter()).update({name: pc.sum(table[name]).as_py() or 0 for name in COUNTS})
    shutil.rmtree(folder, ignore_errors=True)
    for rate, total in totals.items():
        tolerance = f"{config.compress.tolerance:g} (protected or very short text)"
        off = f"; {total['off']} came no closer than {tolerance}" if total["off"] else ""
        achieved = f"achieved {total['tokens'] / max(total['full_tokens'], 1):.2f}"
        progress(
            f"documents: rate {rate_of_documents(config.compress, rate):g} -> {achieved} ({total['tokens']} of "
            f"{total['full_tokens']} tokens of {total['count']} documents of rows){off}"
        )
