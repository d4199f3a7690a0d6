"""The step `ask`: rounds of requests, replies kept in pieces, queries filtered, until every unit is covered."""

import shutil
import time
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pi_ray.ask.coverage import Coverage
from pi_ray.ask.filters import QueryFilter
from pi_ray.ask.needs import Partners, needed_units, touched_units
from pi_ray.ask.requests import RequestPlanner, WriteRequest, parse_reply
from pi_ray.ask.sources import Sources
from pi_ray.ask.train_writer import taught_sections, writer_config, writer_pairs
from pi_ray.ask.writers import Confirm, EndpointWriter, Listener, Tell, choose_writer, make_writer, written_kinds
from pi_ray.config import RunConfig
from pi_ray.data.pieces import partial_folder
from pi_ray.errors import DataError
from pi_ray.models import base_digest
from pi_ray.progress import EVERY_S
from pi_ray.run.artifact import is_current, read_manifest, staged
from pi_ray.run.directory import RunDir
from pi_ray.run.fingerprint import ask_fingerprint, learning_settings
from pi_ray.run.lock import run_lock
from pi_ray.run.queries import Asked, write_queries
from pi_ray.run.row_store import has_piece, write_piece
from pi_ray.units import UnitIndex

PIECE_REQUESTS = 64  # requests whose replies are one file, which survives a kill
REPLIES = pa.schema({"id": pa.string(), "reply": pa.string()})


def ask_queries(
    config: RunConfig, sources: Sources, confirm: Confirm, progress: Tell = print,
    watch: Listener = lambda entry: None,
) -> dict[str, Any]:
    """Write the artifact queries/ unless it is there, and return its manifest.

    `confirm` is asked before money is spent; `watch` gets the training log of an adapter that writes. The caller has
    joined the cluster. Raises DataError for a template without units or too few labelled rows.
    """
    run, fingerprint = RunDir(config.root), queries_fingerprint(config, sources)
    if is_current(run.queries, fingerprint):
        progress("ask: nothing to do, the queries are there")
        return read_manifest(run.queries) or {}
    with run_lock(config.root, "is generating queries of this run"):
        return _Asking(config, sources, fingerprint, confirm, progress, watch).ask()


def queries_fingerprint(config: RunConfig, sources: Sources) -> str:
    """The fingerprint of the artifact queries/ that `ask_queries` makes. Raises DataError as `choose_writer` does."""
    learns = choose_writer(config, len(sources.labelled)) == "adapter"
    learned = learning_settings(writer_config(config)) if learns else {}
    train = {key: value for key, value in learned.items() if key.startswith("train.")}
    return ask_fingerprint(config, sources.fingerprint(), base_digest(config.model), train)


class _Asking:
    """One way through the rounds."""

    def __init__(
        self, config: RunConfig, sources: Sources, fingerprint: str, confirm: Confirm, progress: Tell, watch: Listener,
    ):
        self.config, self.sources, self.fingerprint, self.progress = config, sources, fingerprint, progress
        units, self.started = sources.units(), time.monotonic()
        self.index, self.name = UnitIndex(units), choose_writer(config, len(sources.labelled))
        touched = touched_units(sources.labelled, self.index)
        needed, self.touched = needed_units(sources.labelled, touched, self.index), Counter(chain(*touched))
        sections = taught_sections(needed, units) if self.name == "adapter" else None
        self.coverage = Coverage(units, written_kinds(config, self.name), config.ask.queries, sections)
        labelled = [row.query for row in sources.labelled]
        self.filter = QueryFilter(self.index, config.ask.near, sources.held_out, labelled, sources.log)
        pairs = writer_pairs(sources.labelled, needed, units)
        self.writer = make_writer(config, self.name, sources, pairs, confirm, progress, watch)
        self.planner = RequestPlanner(
            self.coverage, Partners(self.index, needed), sources.labelled, config.ask.seed, self.writer.one_each,
        )

    def ask(self) -> dict[str, Any]:
        run, ask = RunDir(self.config.root), self.config.ask
        folder = partial_folder(run.queries, self.fingerprint)
        kept: list[tuple[int, Asked]] = []  # with the number of queries that its cell had before
        for number in range(ask.rounds):
            if not (requests := self.planner.plan(number)):
                break
            for request, reply in zip(requests, self._replies(requests, number, folder), strict=True):
                for i, query in enumerate(parse_reply(reply, request.count)):
                    if self.filter.keep(query, request.units, request.kind):
                        asked = Asked(f"{request.id}-{i}", query, request.kind, request.units)
                        kept.append((self.coverage.counts[request.cell], asked))
                        self.coverage.add(request.units, request.kind)
            uncovered = sum(1 for _ in self.coverage.missing())
            self.progress(f"round {number + 1}: {len(kept)} queries kept of "
                f"{self.filter.counts.total()}, {uncovered} of {len(self.coverage.cells)} cells have too few")
        kept.sort(key=lambda pair: pair[0])  # cells in turn, so that what is too many is missing nowhere
        queries = [asked for _, asked in kept[: ask.queries]]
        if not queries:
            raise DataError(f"ask: none of {self.filter.counts.total()} written queries was fit ({self._reasons()}); "
                "take another ask.writer, or a larger base")
        with staged(run.queries, fingerprint=self.fingerprint, **self._facts(queries)) as made:
            write_queries(made, queries)
        shutil.rmtree(folder, ignore_errors=True)
        self.progress(f"ask: {len(queries)} queries by {self.name}; left out: {self._reasons()}")
        return read_manifest(run.queries) or {}

    def _replies(self, requests: Sequence[WriteRequest], number: int, folder: Path) -> list[str]:
        """The replies of round `number` in the order of the requests; those in whole pieces are not written again."""
        pieces = [requests[i : i + PIECE_REQUESTS] for i in range(0, len(requests), PIECE_REQUESTS)]
        files = {folder / f"{piece[0].id}.parquet": piece for piece in pieces}
        todo = {path: piece for path, piece in files.items() if not has_piece(path, REPLIES, [r.id for r in piece])}
        if len(todo) < len(files):
            self.progress(f"ask: {len(files) - len(todo)} of {len(files)} pieces were already there")
        asked = list(chain.from_iterable(todo.values()))
        if asked and isinstance(self.writer, EndpointWriter):
            self.writer.confirm_cost(requests, number)
        found: dict[str, str] = {}
        told = time.monotonic()
        for place, reply in self.writer.write(asked) if asked else ():
            found[asked[place].id] = reply
            if time.monotonic() - told > EVERY_S:
                told = time.monotonic()
                self.progress(f"written: {len(found)} of {len(asked)} requests of this round")
            for path, piece in [*todo.items()]:
                if all(request.id in found for request in piece):
                    _write_replies(path, [(request.id, found[request.id]) for request in piece])
                    del todo[path]
        return [reply for path in files for reply in pq.read_table(path)["reply"].to_pylist()]

    def _reasons(self) -> str:
        left = {name: n for name, n in self.filter.counts.most_common() if name != "kept"}
        return ", ".join(f"{n} {name}" for name, n in left.items()) or "none"

    def _facts(self, queries: Sequence[Asked]) -> dict[str, Any]:
        """Collect the manifest's entries: writer, counts of the filters, units, and the matrix before and after."""
        before = self.touched + Counter(unit for query in self.sources.log for unit in self.index.touched(query))
        self.coverage.counts.clear()  # of those that are left
        for asked in queries:
            self.coverage.add(asked.units, asked.kind)
        return {
            "writer": self.name, "queries": len(queries), "written": self.filter.counts.total(),
            "filters": dict(self.filter.counts), "seconds": round(time.monotonic() - self.started, 1),
            "units": [str(unit) for unit in self.index.units], "coverage": self.coverage.facts(),
            "touched_before": [before[unit] for unit in range(len(self.index.units))],
        }


def _write_replies(path: Path, replies: Sequence[tuple[str, str]]) -> None:
    ids, texts = zip(*replies, strict=True)
    write_piece(path, pa.table([list(ids), list(texts)], schema=REPLIES))
