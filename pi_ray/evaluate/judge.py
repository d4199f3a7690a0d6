"""The judges of task.metric at work: their cost before anything is answered, their grades, and how steady these are.

A judge is a model at the service of the block `closed`. Its replies are kept in closed/answers.jsonl by the hash of the
question, so that none is paid for twice. A second pass over some rows, with the two answers in the other order, says
how much of a grade is the judge's mood.
"""

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from pi_ray.config import MetricConfig, RunConfig
from pi_ray.hosted.client import Service, replies
from pi_ray.hosted.price import require_consent
from pi_ray.metrics.judge import BEST, JudgeRubric
from pi_ray.models import load_tokenizer
from pi_ray.progress import format_money
from pi_ray.protocols import Row

CHOSEN_BY = "task.metric judge"
GRADE_TOKENS = 32  # of a reply
SECOND_PASS = 100  # rows of a column, evenly spread, that are graded twice
NEAR = 1 / BEST + 1e-9  # grades no further apart agree


class Judge:
    """One judge of a run. Raises ConfigError without the service's key, MissingExtraError without its client."""

    def __init__(self, config: RunConfig, metric: MetricConfig):
        Service(config.closed, chosen_by=CHOSEN_BY)
        self.config, self.key, self.model = config, metric.key, metric.model or config.closed.model
        self.rubric = JudgeRubric(metric, config.task)

    def grade(self, rows: Sequence[Row], texts: Sequence[str]) -> tuple[list[float], dict[str, Any]]:
        """(grade of each answer from 0 to 1, facts of the column). A reply without a grade counts as 0.

        Facts, by the judge's name: the share of agreement with the second pass and its rows, replies without a grade.
        """
        again = range(0, len(rows), math.ceil(len(rows) / SECOND_PASS))
        questions = [self.rubric.question(row, text) for row, text in zip(rows, texts, strict=True)]
        questions += [self.rubric.question(rows[i], texts[i], swapped=True) for i in again]
        asked = replies(self.config, self.model, questions, GRADE_TOKENS, chosen_by=CHOSEN_BY)
        grades = [self.rubric.read_grade(reply.text) for reply in asked]
        first, second = grades[: len(rows)], grades[len(rows) :]
        pairs = [(first[i], other) for i, other in zip(again, second, strict=True)]
        agreed = fmean(a is not None and b is not None and abs(a - b) <= NEAR for a, b in pairs)
        facts = {"agreement": agreed, "second_pass": len(pairs), "unread": sum(grade is None for grade in grades)}
        return [grade or 0.0 for grade in first], {f"{self.key}_{name}": fact for name, fact in facts.items()}


def judges_of(config: RunConfig) -> list[Judge]:
    """The judges of task.metric. Raises as Judge, so that a run can look for its key before it starts."""
    return [Judge(config, metric) for metric in config.task.metric if metric.asks_service]


def confirm_judging(
    config: RunConfig, judges: Sequence[Judge], rows: Sequence[Row], columns: int, limit: int,
    confirm: Callable[[str], bool],
) -> None:
    """Have the most that judges can cost confirmed, before `columns` answer each row in at most `limit` tokens.

    Raises TrainingError if declined.
    """
    if not judges:
        return
    tokenizer, closed = load_tokenizer(config.model), config.closed
    passes = columns * (1 + min(1.0, SECOND_PASS / len(rows)))
    texts = [judge.rubric.question(row, "") for judge in judges for row in rows]
    read = round(passes * sum(len(tokenizer.encode(text)) + limit for text in texts))
    written = round(passes * len(texts)) * GRADE_TOKENS
    cost = format_money((read * closed.input_price + written * closed.output_price) / 1e6, config.cost.currency)
    models = " and ".join(dict.fromkeys(judge.model for judge in judges))
    sentence = (
        f"Having {models} judge {len(rows):,} rows in each of {columns} columns, up to {SECOND_PASS} of them twice, "
        f"takes at most {read:,} input and {written:,} output tokens, {cost} at the prices of the block 'closed', "
        f"tokens counted as {config.model.base} has them. Grades that are paid for are kept."
    )
    require_consent(config, sentence, "judged", print, confirm)


def add_judgements(
    judges: Sequence[Judge], first: Sequence[MetricConfig], rows: Sequence[Row], texts: Sequence[str],
    scores: list[dict[str, float]],
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """(scores with the judges' grades, facts of a column). The `first` metric's number comes first."""
    facts: dict[str, Any] = {}
    for judge in judges:
        grades, found = judge.grade(rows, texts)
        facts |= found
        leads = any(metric.key == judge.key for metric in first)
        added = [{judge.key: grade} for grade in grades]
        scores = [grade | own if leads else own | grade for own, grade in zip(scores, added, strict=True)]
    return scores, facts
