"""Rows on disk are read and written in parts, and what is read is what was written."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pi_ray.protocols import Row
from pi_ray.run import row_store
from pi_ray.run.row_store import StoredRows, has_piece, join_pieces, read_range, write_piece, write_rows

SCHEMA = pa.schema({"id": pa.string(), "n": pa.int32()})


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr(row_store, "GROUP_ROWS", 4)


def rows(count):
    return [
        Row(f"r{i}", f"query {i}", f"answer {i}", "g" * (i % 2), tuple(f"doc {d}" for d in range(i % 3)))
        for i in range(count)
    ]


@pytest.mark.parametrize("count", [0, 1, 4, 11])
def test_rows_come_back_whole_and_in_any_part(tmp_path, count):
    write_rows(tmp_path / "rows.parquet", rows(count))
    found = StoredRows(tmp_path / "rows.parquet")
    assert len(found) == count and list(found) == found[:] == rows(count)
    for begin in range(count + 2):
        for end in range(begin, count + 2):
            assert found[begin:end] == rows(count)[begin:end] and found.ids(begin, end) == [
                r.id for r in rows(count)[begin:end]
            ]
    assert [found[i] for i in range(-count, count)] == rows(count) * 2


def test_only_the_groups_that_hold_a_part_are_read(tmp_path, monkeypatch):
    write_rows(tmp_path / "rows.parquet", rows(11))
    asked, original = [], pq.ParquetFile.read_row_groups
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_groups",
        lambda self, groups, *a, **k: asked.append(list(groups)) or original(self, groups, *a, **k),
    )
    StoredRows(tmp_path / "rows.parquet")[5:7]
    read_range(tmp_path / "rows.parquet", 3, 5)
    assert asked == [[1], [0, 1]]


def test_rows_of_earlier_runs_have_no_documents(tmp_path):
    pq.write_table(pa.table({"id": ["a"], "query": ["q"], "answer": ["x"], "group": [""]}), tmp_path / "rows.parquet")
    assert StoredRows(tmp_path / "rows.parquet")[:] == [Row("a", "q", "x")]


def test_a_piece_is_there_whole_and_with_its_rows_or_not_at_all(tmp_path):
    path = tmp_path / "piece.parquet"
    assert not has_piece(path, SCHEMA, ["a"])
    ids = [f"row {i * 7919}" for i in range(300)]
    write_piece(path, pa.table({"id": ids, "n": list(range(300))}, schema=SCHEMA))
    assert has_piece(path, SCHEMA, ids) and not has_piece(path, SCHEMA, ids[1:])
    content = bytearray(path.read_bytes())
    content[len(content) // 4] ^= 0xFF
    path.write_bytes(content)
    assert not has_piece(path, SCHEMA, ids)


def test_pieces_of_any_size_are_joined_in_order(tmp_path):
    sizes, at, paths = [3, 0, 9, 1, 2], 0, []
    for i, size in enumerate(sizes):
        paths.append(tmp_path / f"{i}.parquet")
        write_piece(
            paths[-1],
            pa.table({"id": [f"r{n}" for n in range(at, at + size)], "n": list(range(at, at + size))}, schema=SCHEMA),
        )
        at += size
    join_pieces(paths, tmp_path / "all.parquet", SCHEMA)
    assert pq.read_table(tmp_path / "all.parquet")["n"].to_pylist() == list(range(15))
    join_pieces([], tmp_path / "none.parquet", SCHEMA)
    assert read_range(tmp_path / "none.parquet").num_rows == 0
