"""Results that are kept line by line: a kill in mid-line loses that line alone, and full disks are said."""

import json

import pytest

from pi_ray.errors import StorageError
from pi_ray.run.artifact import write_listeners
from pi_ray.run.result_log import ResultLog
from tests.disks import small_disk  # noqa: F401 (a fixture)


def contents(path):
    log = ResultLog(path)
    return {key: log[key] for key in log}


def test_results_are_there_after_half_a_line_and_lines_of_another_kind(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    with ResultLog(path) as log:
        log.add("a", [1, 2])
        log.add("b", {"text": "Zürich\u2028"})
        assert log["a"] == [1, 2] and "c" not in log and len(log) == 2
    with open(path, "a", encoding="utf-8") as file:
        file.write('[1]\n{"key": "c"}\nnot JSON\n{"key": "d", "val')
    assert contents(path) == {"a": [1, 2], "b": {"text": "Zürich\u2028"}}
    with ResultLog(path) as log:
        log.add("d", 3)
        log.add("a", 4)
        assert (log["d"], log["a"]) == (3, 4)
    assert contents(path) == {"a": 4, "b": {"text": "Zürich\u2028"}, "d": 3}


def test_what_is_kept_alone_stays(tmp_path):
    with ResultLog(tmp_path / "log.jsonl") as log:
        for key in "abc":
            log.add(key, key)
    log.keep({"b", "not there"})
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == [{"key": "b", "value": "b"}]
    assert contents(log.path) == {"b": "b"} == {key: log[key] for key in log}


def test_storage_is_told_now_and_then_and_after_an_error(tmp_path):
    told = []
    write_listeners.append(told.append)
    try:
        with pytest.raises(ZeroDivisionError), ResultLog(tmp_path / "log.jsonl", notify_every=2) as log:
            for i in range(5):
                log.add(str(i), i)
            raise ZeroDivisionError
    finally:
        write_listeners.remove(told.append)
    assert told == [log.path] * 3 and len(ResultLog(log.path)) == 5


def test_a_large_file_is_sent_again_only_where_it_has_grown(tmp_path):
    sizes = []
    listener = lambda path: sizes.append(path.stat().st_size)  # noqa: E731
    write_listeners.append(listener)
    try:
        with ResultLog(tmp_path / "log.jsonl", notify_every=1) as log:
            for i in range(1000):
                log.add(str(i), "x" * 100)
    finally:
        write_listeners.remove(listener)
    assert 30 < len(sizes) < 80 and sum(sizes) < 13 * sizes[-1]


@pytest.mark.fault
def test_a_full_disk_is_said_and_what_was_written_stays(small_disk):  # noqa: F811
    with pytest.raises(StorageError, match=r"log\.jsonl: cannot be written \(No space left on device\)"):  # noqa: SIM117
        with ResultLog(small_disk / "log.jsonl") as log:
            for i in range(10_000):
                log.add(str(i), "x" * 100_000)
    assert 0 < len(ResultLog(small_disk / "log.jsonl")) < 10_000
