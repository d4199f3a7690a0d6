"""Rows: each conversation on one side alone, whatever the order of the log, without near copies of what is held out."""

import random
import tracemalloc

import pytest

from pi_ray.answer.split import MOST_DEV, MOST_TEST, NEAR
from pi_ray.ask.near import NearDuplicates
from pi_ray.errors import DataError
from pi_ray.request_log.recurrent import StrippedRequest
from pi_ray.request_log.request import parse_request
from pi_ray.request_log.rows import RowFile, write_splits
from tests.unit.request_log.logs import grown_requests, query, read_lines, turn


def row(text, answer="x"):
    return {"messages": [turn("user", text), *([turn("assistant", answer)] if answer else [])]}


def stripped(request, *values):
    return StrippedRequest(request, values, request.turns[0]["content"], request.turns)


def split(folder, lines):
    folder.mkdir(exist_ok=True)
    rows = RowFile(folder / "rows")
    rows.write(stripped(parse_request(line)) for line in lines)
    counts = write_splits(rows, folder)
    return counts, {path.stem: read_lines(path) for path in folder.glob("*.jsonl")}


def test_every_row_is_in_one_file_and_the_choice_does_not_depend_on_the_order(tmp_path):
    lines = [row(query(i)) for i in range(60)]
    counts, made = split(tmp_path / "a", lines)
    assert counts.rows == {"train": 42, "test": 12, "dev": 6} and counts.requests == 60
    assert sorted(r["query"] for rows in made.values() for r in rows) == sorted(map(query, range(60)))
    random.Random(1).shuffle(lines)
    _, again = split(tmp_path / "b", lines)
    assert {name: {r["query"] for r in rows} for name, rows in made.items()} == {
        name: {r["query"] for r in rows} for name, rows in again.items()
    }


def test_no_near_copy_stands_on_another_side(tmp_path):
    lines = [row(f"{text} {mark}") for text in map(query, range(40)) for mark in ("", "please", "!", "PLEASE")]
    counts, made = split(tmp_path, lines)
    assert counts.near_copies and sum(map(len, made.values())) + counts.near_copies == len(lines)
    for name, others in (("test", ("train", "dev")), ("dev", ("train", "test"))):
        near = NearDuplicates(NEAR)
        for r in made[name]:
            near.add(r["query"])
        assert not [r for other in others for r in made[other] if near.finds(r["query"])]


def test_a_query_at_other_times_is_near_itself(tmp_path):
    """Rows are compared by what users say, not by the values before it."""
    rows = RowFile(tmp_path / "rows")
    requests = [(query(i), f"time {time}") for i in range(20) for time in range(100, 400, 100)]
    found = (stripped(parse_request(row(f"{time}\n\n{text}")), time)._replace(query=text) for text, time in requests)
    rows.write(found)
    counts = write_splits(rows, tmp_path)
    made = {name: read_lines(tmp_path / f"{name}.jsonl") for name in counts.rows}
    said = [{r["query"].partition("\n\n")[2] for r in rows} for rows in made.values()]
    assert len(said) == 3 and len(set.union(*said)) == sum(map(len, said)), "no query is in two files"
    assert sum(counts.rows.values()) + counts.near_copies == 60


def test_a_large_log_has_no_more_held_out_rows_than_can_be_scored(tmp_path):
    words = [f"w{i}" for i in range(500)]
    chosen = random.Random(0)
    counts, _ = split(tmp_path, [row(" ".join(chosen.sample(words, 12))) for _ in range(2000)])
    assert counts.rows == {"train": 2000 - MOST_TEST - MOST_DEV, "test": MOST_TEST, "dev": MOST_DEV}


def test_queries_without_an_answer_are_apart_and_near_no_held_out_row(tmp_path):
    lines = [row(query(i)) for i in range(30)] + [row(query(i) + " ?", "") for i in range(40)]
    _, made = split(tmp_path, lines)
    held_out = {r["query"] for name in ("dev", "test") for r in made[name]}
    assert len(made["queries"]) == 40 - len(held_out) and all(set(r) == {"query"} for r in made["queries"])
    assert not {r["query"].removesuffix(" ?") for r in made["queries"]} & held_out


def test_a_request_that_was_answered_once_is_no_query(tmp_path):
    lines = [row(query(i), answer) for i in range(10) for answer in ("", "x", "y")]
    counts, made = split(tmp_path, lines)
    assert "queries" not in made and sum(counts.rows.values()) == 10
    assert {r["answer"] for rows in made.values() for r in rows} == {"x"}


def test_growing_requests_become_one_row_up_to_the_last_answer(tmp_path):
    lines = [line for i in range(10) for line in grown_requests(i)]
    answer = lines[3]["response"]["choices"][0]["message"]
    lines.append({"messages": [*lines[3]["messages"], answer, turn("user", "Bye")]})
    counts, made = split(tmp_path, lines)
    assert counts.rows == {"train": 7, "test": 2, "dev": 1} and counts.requests == 40
    assert {len(r["messages"]) for rows in made.values() for r in rows} == {8}
    assert {r["messages"][-1]["role"] for rows in made.values() for r in rows} == {"assistant"}


def test_too_few_conversations_are_an_error(tmp_path):
    with pytest.raises(DataError, match="2 different conversations"):
        split(tmp_path, [row(query(1)), row(query(1)), row(query(2))])


def test_a_log_of_one_query_in_other_words_is_an_error(tmp_path):
    with pytest.raises(DataError, match="near copies"):
        split(tmp_path, [row(f"where is my parcel {'!' * i}") for i in range(9)])


def test_memory_does_not_grow_with_the_texts(tmp_path):
    """1,000 rows of about 20 kB are 20 MB; their keys are what is held."""
    def lines():
        for i in range(1000):
            yield parse_request(row(f"{query(i)} " + f"{i:x} " * 5000))

    rows = RowFile(tmp_path / "rows")
    tracemalloc.start()
    try:
        rows.write(map(stripped, lines()))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 << 20
