"""Questions to an adapter about each unit of its prompt, from held-out queries and dev rows, never from test rows."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import pyarrow.compute as pc

from pi_ray.config import RunConfig, TaskConfig
from pi_ray.errors import DataError
from pi_ray.evaluate.columns import Column
from pi_ray.evaluate.knowledge import MAX_TEXT, AnsweredQuestion, Knowledge, UnitKnowledge
from pi_ray.metrics import RowScorer, exact_match
from pi_ray.models import load_tokenizer
from pi_ray.prompt import PromptEncoder
from pi_ray.protocols import UNLABELLED, Row
from pi_ray.run.artifact import MANIFEST_HASH, verify_artifact
from pi_ray.run.directory import RunDir
from pi_ray.run.fingerprint import wants_unlabelled
from pi_ray.run.row_store import read_range
from pi_ray.train import distilled_rows
from pi_ray.units import UnitIndex, find_units

MOST_TEXTS = 10_000  # rows, and queries, among which those about a unit are counted
DEV_ROWS_OF_UNIT = 4  # dev rows are asked until a unit has so many questions
EXAMPLES = 3
FULL = 1 - 1e-9  # a score from which an answer is right


@dataclass(frozen=True)
class Question:
    """A row of a split whose answer is expected to be `expected`, and the places of the units that it touches."""

    split: str
    number: int
    query: str
    expected: str
    source: Literal["teacher", "label"]
    units: tuple[int, ...]


@dataclass(frozen=True)
class UnitQuestions:
    """The questions about a prompt's units, and how many rows and queries touch each, by its place."""

    index: UnitIndex
    questions: list[Question] = field(default_factory=list)
    rows: Counter[int] = field(default_factory=Counter)
    queries: Counter[int] = field(default_factory=Counter)
    sure: Counter[int] = field(default_factory=Counter)

    def prompts(self, config: RunConfig, column: Column, encoder: PromptEncoder) -> list[list[int]]:
        """The ids of each question as the column is asked it, without the prefix."""
        run = RunDir(config.root)
        bank = {row.id: row for row in run.read_rows("train")} if column.shots else {}
        prompts = []
        for q in self.questions:
            (row,) = run.read_rows(q.split, column.rate, q.number, q.number + 1)
            shots = run.read_shots(q.split, bank, column.shots, q.number, q.number + 1)
            prompts.append(encoder.row(row.query, shots.get(row.id, ()), row.documents))
        return prompts

    def knowledge(self, answers: Sequence[str], adapter: str, task: TaskConfig) -> Knowledge:
        """The knowledge of the adapter in that folder, by its answers to the questions and the metrics of `task`."""
        asked: dict[int, list[AnsweredQuestion]] = {}
        rows = [Row(str(i), q.query, q.expected) for i, q in enumerate(self.questions)]
        marks = _mark_answers(RowScorer(task), rows, answers)
        for q, answer, right in zip(self.questions, answers, marks, strict=True):
            query, expected, given = map(_shorten, (q.query, q.expected, answer))
            for unit in q.units:
                asked.setdefault(unit, []).append(
                    AnsweredQuestion(query=query, expected=expected, source=q.source, answer=given, right=right)
                )
        units = [
            UnitKnowledge(
                section=_shorten(unit.section), text=_shorten(unit.text), kind=unit.kind, rows=self.rows[i],
                queries=self.queries[i], sure=self.sure[i], asked=len(asked.get(i, ())),
                agreed=sum(example.right for example in asked.get(i, ())),
                examples=tuple(sorted(asked.get(i, ()), key=lambda example: example.right)[:EXAMPLES]),
            )
            for i, unit in enumerate(self.index.units)
        ]
        return Knowledge(adapter_sha256=verify_artifact(Path(adapter))[MANIFEST_HASH], units=tuple(units))


def _mark_answers(scorer: RowScorer, rows: Sequence[Row], answers: Sequence[str]) -> list[bool]:
    """Whether each answer has a full score by the first metric, or by exact match where no metric fits the row.

    A teacher may have given an expected answer that no metric can score, since nobody has looked at it.
    """
    scores: list[float] = []
    for row, answer in zip(rows, answers, strict=True):
        try:
            scores.append(next(iter(scorer.score(row, answer).values())))
        except DataError:
            scores.append(exact_match(answer, row.answer))
    return [score >= FULL for score in scores]


def _shorten(text: str) -> str:
    """At most MAX_TEXT characters, without lone surrogates, which no JSON can hold."""
    return text[:MAX_TEXT].encode("utf-8", "replace").decode("utf-8")


def plan_questions(config: RunConfig) -> UnitQuestions:
    """The questions about the units of a trained run's whole template: held-out queries first, then dev rows."""
    run, encoder = RunDir(config.root), PromptEncoder(load_tokenizer(config.model), config.prompt)
    found = UnitQuestions(UnitIndex(find_units(run.read_templates()[1.0])))
    for row in islice(run.rows_of("train"), MOST_TEXTS):
        found.rows.update(found.index.touched(f"{row.query}\n{row.answer}"))
    if wants_unlabelled(config):
        _add_queries(found, run, encoder)
    count = Counter(unit for question in found.questions for unit in question.units)
    for number, row in enumerate(islice(run.rows_of("dev"), MOST_TEXTS)):
        touched = tuple(found.index.touched(f"{row.query}\n{row.answer}"))
        if any(count[unit] < DEV_ROWS_OF_UNIT for unit in touched):
            found.questions.append(Question("dev", number, row.query, row.answer, "label", touched))
            count.update(touched)
    return found


def _add_queries(found: UnitQuestions, run: RunDir, encoder: PromptEncoder) -> None:
    """Count the unlabelled queries by unit, and make questions of those that are held out."""
    columns = ["labelled", "number", "label_ids", "agreement", "held_out"]
    table = read_range(run.teacher_answers / distilled_rows.FILE, columns=columns)
    answered = {row["number"]: row for row in table.filter(pc.invert(table["labelled"])).to_pylist()}
    for number, row in enumerate(run.rows_of(UNLABELLED)):
        given = answered.get(number)
        if number >= MOST_TEXTS and not (given and given["held_out"]):
            continue
        answer = encoder.decode(given["label_ids"]) if given else ""
        touched = tuple(found.index.touched(f"{row.query}\n{answer}"))
        if number < MOST_TEXTS:
            found.queries.update(touched)
            if given and given["agreement"] == 1:
                found.sure.update(touched)
        if given and given["held_out"]:
            found.questions.append(Question(UNLABELLED, number, row.query, answer, "teacher", touched))
