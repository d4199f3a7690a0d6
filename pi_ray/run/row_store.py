"""Rows on disk, in Parquet, read and written in parts, so that memory is bounded whatever their number.

What many workers make lies in whole pieces, a file for each range of rows; joined, they are the same whoever made them.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pi_ray.errors import CorruptArtifactError
from pi_ray.protocols import Row
from pi_ray.run.artifact import write_atomic

GROUP_ROWS = 4096  # rows that are read at once
SCHEMA = pa.schema({
    **dict.fromkeys(("id", "query", "answer", "group"), pa.string()), "documents": pa.list_(pa.string()),
})
PARQUET = {"compression": "zstd", "write_page_checksum": True}


def count_rows(path: Path) -> int:
    return pq.read_metadata(path).num_rows


def read_range(
    path: Path, begin: int = 0, end: int | None = None, columns: Sequence[str] | None = None, memory_map: bool = False,
) -> pa.Table:
    """Rows [begin, end), from their row groups alone. CorruptArtifactError: Arrow extension types may be pickles."""
    with pq.ParquetFile(path, memory_map=memory_map, page_checksum_verification=True) as file:
        if odd := [field.name for field in file.schema_arrow if "extension<" in str(field.type)]:
            cure = "which pi-ray never writes and does not read; delete the folder and prepare again"
            raise CorruptArtifactError(f"{path}: column {', '.join(odd)} has an Arrow extension type, {cure}")
        ends = list(accumulate(file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)))
        begin, end, _ = slice(begin, end).indices(ends[-1] if ends else 0)
        groups = [g for g, last in enumerate(ends) if last > begin and (ends[g - 1] if g else 0) < end]
        table = file.read_row_groups(groups, columns)
        first = ends[groups[0] - 1] if groups and groups[0] else 0
        return table.slice(begin - first, end - begin)


def to_rows(table: pa.Table) -> list[Row]:
    """The rows of a table with a row's columns; `documents` may be missing."""
    named = table.select([name for name in SCHEMA.names if name in table.column_names]).to_pylist()
    return [Row(**{**values, "documents": tuple(values.get("documents") or ())}) for values in named]


class StoredRows(Sequence[Row]):
    """The rows of a split on disk: a slice reads the rows that it names, and nothing else is held."""

    def __init__(self, path: Path):
        self.path = Path(path)

    def __len__(self) -> int:
        return count_rows(self.path)

    def __getitem__(self, part: Any) -> Any:
        if isinstance(part, int):
            return self[part : part + 1 or None][0]
        begin, end, step = part.indices(len(self))
        return to_rows(read_range(self.path, begin, end))[::step]

    def __iter__(self) -> Iterator[Row]:
        for begin in range(0, len(self), GROUP_ROWS):
            yield from self[begin : begin + GROUP_ROWS]

    def ids(self, begin: int = 0, end: int | None = None) -> list[str]:
        return read_range(self.path, begin, end, ["id"])["id"].to_pylist()


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as they come, a row group at a time."""
    rows = iter(rows)
    with pq.ParquetWriter(path, SCHEMA, **PARQUET) as writer:
        while group := list(islice(rows, GROUP_ROWS)):
            columns = {name: [getattr(row, name) for row in group] for name in SCHEMA.names}
            writer.write_table(pa.table(columns, schema=SCHEMA))


def write_piece(path: Path | str, table: pa.Table) -> None:
    """Write one file in one step, with a checksum in each page. Raises StorageError."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **PARQUET)
    write_atomic(Path(path), buffer.getvalue())


def has_piece(path: Path | str, schema: pa.Schema, ids: Sequence[str]) -> bool:
    """Whether the piece is there, undamaged, and holds the rows with these ids."""
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException):
        return False
    return table.schema.equals(schema) and table["id"].to_pylist() == list(ids)


def join_pieces(pieces: Iterable[Path | str], path: Path, schema: pa.Schema) -> None:
    """Write the pieces one after another into one file, a row group of GROUP_ROWS or a little more at a time."""
    waiting: list[pa.Table] = []
    held = 0
    with pq.ParquetWriter(path, schema, **PARQUET) as writer:
        for piece in pieces:
            waiting.append(pq.read_table(piece))
            held += waiting[-1].num_rows
            if held >= GROUP_ROWS:
                writer.write_table(pa.concat_tables(waiting).combine_chunks(), row_group_size=held)
                waiting, held = [], 0
        if waiting:
            writer.write_table(pa.concat_tables(waiting).combine_chunks(), row_group_size=max(held, 1))
