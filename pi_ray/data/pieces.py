"""The Ray Data pipeline of preparation: row ranges are read, mapped and written, one file for each range and output.

A range is the unit that survives a kill: ranges whose files are all there and undamaged are left out of the next read.
Ray Data's own checkpointing (2.60) puts the rows that are left into other files under random names, trusts damaged
files and wants a disk that all nodes share, so a resumed phase would not have the bytes of one that ran through.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from ray.data import ActorPoolStrategy, Datasink, Datasource, read_datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from pi_ray.cluster import placement, session, storage_sync
from pi_ray.config import RunConfig
from pi_ray.data.ray_map import Attach, attach_of, from_payload, quiet_context, to_payload
from pi_ray.errors import PiRayError
from pi_ray.run.directory import RunDir
from pi_ray.run.row_store import count_rows, has_piece, read_range, write_piece

ERROR, PATH = "error", "path"  # columns: of a PiRayError on its way to the driver, and of the file that a row goes to

WRITERS = 2  # processes that write what actors make

Outputs = Mapping[Any, str]  # output, such as a phase -> the path of its files up to their number


class RowRange(NamedTuple):
    """Rows [begin, end) of a split, `number` ranges after its first row."""

    split: str
    begin: int
    end: int
    number: int

    def path(self, prefix: str) -> str:
        """The file of these rows, for an output whose files begin with `prefix`."""
        return f"{prefix}{self.number:05d}.parquet"


Work = Callable[[pa.Table, RowRange], Mapping[Any, pa.Table]]  # a range's rows -> output -> its table


@dataclass(frozen=True)
class Pieces:
    """The row ranges of a step. `outputs` names the files that the rows of each split become, all of one `schema`."""

    run: RunDir
    schema: pa.Schema
    size: int  # rows of a range
    outputs: Mapping[str, Outputs]

    def ranges(self, split: str) -> Iterator[RowRange]:
        rows = count_rows(self.run.rows_of(split).path)
        for number, begin in enumerate(range(0, rows, self.size)):
            yield RowRange(split, begin, min(begin + self.size, rows), number)

    def files(self, split: str, output: Any) -> list[str]:
        """The files of one output, in the order of the rows."""
        return [rows.path(self.outputs[split][output]) for rows in self.ranges(split)]

    def is_finished(self, rows: RowRange) -> bool:
        """Whether all files of the range are there, undamaged, with its rows."""
        paths = [Path(rows.path(prefix)) for prefix in self.outputs[rows.split].values()]
        if not all(path.exists() for path in paths):
            return False
        ids = self.run.rows_of(rows.split).ids(rows.begin, rows.end)
        return all(has_piece(path, self.schema, ids) for path in paths)


    def unfinished(self, step: str, progress: Callable[[str], None]) -> list[RowRange]:
        """The ranges that are still to be made."""
        planned = [rows for split in self.outputs for rows in self.ranges(split)]
        todo = [rows for rows in planned if not self.is_finished(rows)]
        if len(todo) < len(planned):
            progress(f"{step}: {len(planned) - len(todo)} of {len(planned)} pieces were already there")
        return todo


def partial_folder(final: Path, fingerprint: str) -> Path:
    """Where the pieces of `final` gather until it is complete. Folders of other fingerprints are removed."""
    folder = final.with_name(f".{final.name}-{fingerprint[:12]}.partial")
    for left in final.parent.glob(f".{final.name}-*.partial"):
        if left != folder:
            shutil.rmtree(left, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run_pipeline(
    config: RunConfig, pieces: Pieces, todo: list[RowRange], make: Callable[..., Work], *args: Any, actors: int = 0,
) -> None:
    """Read the ranges in `todo`, map them by `make(*args)` and write their files.

    With `actors`, at most so many processes call `make` once each and end with the job: for work that loads a model or
    an index. Without, Ray's running workers call it for each range. Raises the PiRayError that a worker raised.
    """
    if not todo:
        return
    session.connect()
    import ray

    sync, options = storage_sync.sync_for(pieces.run.root), placement.worker_options(config, "prepare")
    attach = attach_of(sync)
    constructor: dict[str, Any] = {"make": make, "args": args, "outputs": pieces.outputs, "attach": attach}
    batches: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", "zero_copy_batch": True, **options}
    with quiet_context(ray) as context:
        context.target_max_block_size = None  # a range stays one block, whatever its bytes
        rows = read_datasource(RangeSource(pieces.run, todo, attach), override_num_blocks=len(todo), **options)
        if actors:
            pool = ActorPoolStrategy(min_size=1, max_size=actors)
            tables = rows.map_batches(MapRange, fn_constructor_kwargs=constructor, compute=pool, **batches)
            # actors may hold all that nodes have, so writes ask for nothing: every node sees the run directory
            options = {"num_cpus": 0, **{name: value for name, value in options.items() if name == "label_selector"}}
        else:
            tables = rows.map_batches(MapRange(**constructor).__call__, **batches)
        try:
            limit = min(WRITERS, len(todo)) if actors else None
            tables.write_datasink(PieceSink(pieces.schema, attach), ray_remote_args=options, concurrency=limit)
        except Exception as error:
            raise _find_error(error) or error from None
    if sync:
        sync.pull()


class RangeSource(Datasource):
    """Reads row ranges, each as one block with the columns of a row and of RowRange."""

    def __init__(self, run: RunDir, ranges: list[RowRange], attach: Attach | None):
        super().__init__()
        self.run, self.ranges, self.attach = run, ranges, attach

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        counts = [BlockMetadata(rows.end - rows.begin, None, None, None) for rows in self.ranges]
        reads = [partial(_read, self.run, rows, self.attach) for rows in self.ranges]
        return [ReadTask(read, metadata) for read, metadata in zip(reads, counts, strict=True)]


def _read(run: RunDir, rows: RowRange, attach: Attach | None) -> list[pa.Table]:
    try:
        if attach:
            attach()
        table = read_range(run.rows_of(rows.split).path, rows.begin, rows.end)
    except PiRayError as error:
        return [_to_table(error)]
    for name, value in rows._asdict().items():
        table = table.append_column(name, pa.repeat(value, table.num_rows))
    return [table]


class MapRange:
    """Maps one block: a range's rows become the rows of all its outputs, each with the path of its file."""

    def __init__(
        self, make: Callable[..., Work], args: tuple[Any, ...], outputs: Mapping[str, Outputs], attach: Attach | None,
    ):
        self.make, self.args, self.outputs, self.attach = make, args, outputs, attach
        self.work: Work | None = None

    def __call__(self, table: pa.Table) -> pa.Table:
        if ERROR in table.column_names:
            return table
        try:
            if self.attach:
                self.attach()
            self.work = self.work or self.make(*self.args)
            rows = RowRange(*(table[name][0].as_py() for name in RowRange._fields))
            made = self.work(table, rows)
        except PiRayError as error:
            return _to_table(error)
        paths = {output: rows.path(prefix) for output, prefix in self.outputs[rows.split].items()}
        return pa.concat_tables(made[o].append_column(PATH, pa.repeat(p, made[o].num_rows)) for o, p in paths.items())


class PieceSink(Datasink):
    """Writes each file in one step, and has it sent to object storage where nodes share no disk."""

    def __init__(self, schema: pa.Schema, attach: Attach | None = None):
        self.schema, self.attach = schema, attach

    def write(self, blocks: Iterable[pa.Table], ctx: Any) -> None:
        for block in blocks:
            if ERROR in block.column_names:
                raise WorkerError(block[ERROR].to_pylist())
            try:
                if self.attach:
                    self.attach()
                write_files(block, self.schema)
            except PiRayError as error:
                raise WorkerError(to_payload(error)) from None


def write_files(block: pa.Table, schema: pa.Schema) -> None:
    """Write the rows of a block into the files that its column `path` names. Raises StorageError."""
    for path in pc.unique(block[PATH]).to_pylist():
        rows = block.filter(pc.equal(block[PATH], path)).select(schema.names)
        write_piece(path, rows.cast(schema).combine_chunks())


class WorkerError(Exception):
    """Carries a PiRayError to the driver as a list: Ray Data appends its advice to an exception's text."""


def _to_table(error: PiRayError) -> pa.Table:
    return pa.table({ERROR: to_payload(error)})


def _find_error(error: Exception) -> PiRayError | None:
    """The PiRayError of a worker that made a job fail; None where the reason is another."""
    cause = getattr(error, "cause", None)
    return from_payload(cause.args[0]) if isinstance(cause, WorkerError) else None
