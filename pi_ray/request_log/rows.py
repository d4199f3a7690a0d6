"""Rows of a log: each conversation once, and split without near copies on two sides.

Rows wait on disk; memory holds a number for each turn, and the texts of held-out rows.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from heapq import nsmallest
from pathlib import Path
from typing import NamedTuple, TextIO

from pi_ray.answer.split import DEV_ONE_IN, MOST_DEV, MOST_TEST, NEAR, TEST_ONE_IN
from pi_ray.ask.near import NearDuplicates
from pi_ray.errors import DataError
from pi_ray.protocols import SPLITS
from pi_ray.request_log.growth import Growth, RequestKey
from pi_ray.request_log.recurrent import StrippedRequest
from pi_ray.request_log.request import Message

QUERIES = "queries"  # the file of rows without an answer
Turns = Sequence[Message]


class LoggedRow(NamedTuple):
    """A row on its way: its key, what its user says (by which rows are compared), and its turns up to the last answer.
    """

    key: int
    said: str
    turns: Turns

    @property
    def is_answered(self) -> bool:
        return self.turns[-1]["role"] == "assistant"


class RowFile:
    """Rows on their way to the splits: a file, and what of its rows must be known together."""

    def __init__(self, path: Path):
        self.path, self.growth = path, Growth()
        self.is_conversation = False  # whether a row has more than a query and its answer
        self._answered = set[int]()

    def write(self, found: Iterable[StrippedRequest]) -> None:
        with open(self.path, "w", encoding="utf-8") as file:
            for request, values, query, turns in found:
                answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
                kept = turns[: answers[-1] + 1] if answers else turns
                said = "\n".join([query, *(turn["content"] for turn in kept[1:] if turn["role"] == "user")])
                key = self.growth.add(request, values)
                if answers:
                    self._answered.add(key.asked)
                self.is_conversation |= len(kept) > 2 or any(turn.get("tool_calls") for turn in kept)
                file.write(json.dumps([key, said, kept], ensure_ascii=False) + "\n")

    def rows(self) -> Iterator[LoggedRow]:
        """The longest request of each conversation, once, with an answer where one has it."""
        seen = set[int]()
        with open(self.path, encoding="utf-8") as file:
            for line in file:
                key, said, turns = json.loads(line)
                row, key = LoggedRow(key[0], said, turns), RequestKey(*key)
                answerless = row.key in self._answered and not row.is_answered
                if not (self.growth.goes_on(key) or row.key in seen or answerless):
                    seen.add(row.key)
                    yield row


class Splitter:
    """Says for each row which file it belongs to. Held-out rows are those of the lowest keys, in any order of the log.

    No row of a side is a near copy of one on another: copies of test rows are in no other file, those of dev rows
    neither in train nor among the queries. Raises DataError for too few rows.
    """

    def __init__(self, rows: RowFile):
        keys = [row.key for row in rows.rows() if row.is_answered]
        if 0 < len(keys) < len(SPLITS):
            found = f"the log has {len(keys)} different conversations with an answer"
            raise DataError(f"{found}, and train, dev and test need one each; give a longer log")
        test = min(MOST_TEST, max(1, len(keys) // TEST_ONE_IN)) if keys else 0
        dev = min(MOST_DEV, max(1, len(keys) // DEV_ONE_IN)) if keys else 0
        held_out = nsmallest(test + dev, keys)
        self._keys = {"test": set(held_out[:test]), "dev": set(held_out[test:])}
        self._near = {split: NearDuplicates(NEAR) for split in self._keys}
        for row in rows.rows():
            for split, held in self._keys.items():
                if row.key in held:
                    self._near[split].add(row.said)

    def split_of(self, row: LoggedRow) -> str:
        """train, dev, test or queries; "" for a near copy of a row that is held out elsewhere."""
        own = next((split for split, keys in self._keys.items() if row.key in keys), "")
        others = [near for split, near in self._near.items() if split != own and own != "test"]
        if any(near.finds(row.said) for near in others):
            return ""
        return own or ("train" if row.is_answered else QUERIES)


class SplitCounts(NamedTuple):
    """Rows of each file, near copies that are in none, and the requests to a model that all rows stand for."""

    rows: dict[str, int]
    near_copies: int
    requests: int


def write_splits(rows: RowFile, folder: Path) -> SplitCounts:
    """Write train, dev, test and queries .jsonl; those that would be empty are left out."""
    splitter, counts, requests = Splitter(rows), Counter[str](), 0
    with ExitStack() as stack:
        files: dict[str, TextIO] = {}
        for row in rows.rows():
            requests += sum(turn["role"] == "assistant" for turn in row.turns) or 1
            split = splitter.split_of(row)
            counts[split] += 1
            if split and split not in files:
                files[split] = stack.enter_context(open(folder / f"{split}.jsonl", "w", encoding="utf-8"))
            if split:
                files[split].write(json.dumps(_as_row(row.turns, rows.is_conversation), ensure_ascii=False) + "\n")
    near_copies = counts.pop("", 0)
    if counts["test"] and not counts["train"]:
        raise DataError("all conversations of the log are near copies of a few; give a log with more kinds of queries")
    return SplitCounts(dict(counts), near_copies, requests)


def _as_row(turns: Turns, is_conversation: bool) -> dict[str, object]:
    if is_conversation:
        return {"messages": turns}
    return {"query": turns[0]["content"], **({"answer": turns[1]["content"]} if len(turns) > 1 else {})}
