"""Scores of a column's answers: metrics with intervals, by group, and against another column on the same rows."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from pi_ray.config import RunConfig
from pi_ray.evaluate.statistics import corpus_bleu, paired_bleu, paired_mean, score_interval
from pi_ray.protocols import Row
from pi_ray.tasks.conversations import conversation_of


@dataclass(frozen=True)
class ScoredAnswers:
    """Rows, one answer to each, and the metrics of each answer."""

    rows: Sequence[Row]
    texts: Sequence[str]
    scores: Sequence[dict[str, float]]
    bootstrap: int  # resamples for the intervals
    seed: int
    clusters: Sequence[str] | None = None  # of each row, where rows are alike, such as its conversation
    has_bleu: bool = True  # whether BLEU over all rows is one of the metrics

    def summarise(self) -> dict[str, Any]:
        """Every metric with its 95% interval over rows; BLEU on 0..100, the others in 0..1."""
        how = (self.bootstrap, self.seed, self.clusters)
        found = {m: score_interval([s[m] for s in self.scores], *how) for m in self.scores[0]}
        if self.has_bleu:  # in place of the mean of sentences, where metrics have one
            found["bleu"] = corpus_bleu(self.texts, [r.answer for r in self.rows], *how)
        values = {metric: value for metric, (value, _, _) in found.items()}
        return {**values, "intervals": {metric: [low, high] for metric, (_, low, high) in found.items()}}

    def summarise_groups(self, groups: Mapping[str, int]) -> dict[str, Any]:
        """Group -> the number of its rows and their summary."""
        found = {}
        for group, n in groups.items():
            chosen = [i for i, row in enumerate(self.rows) if row.group == group]
            rows, texts = [self.rows[i] for i in chosen], [self.texts[i] for i in chosen]
            clusters = self.clusters and [self.clusters[i] for i in chosen]
            own = replace(self, rows=rows, texts=texts, scores=[self.scores[i] for i in chosen], clusters=clusters)
            found[group] = {"rows": n, **own.summarise()}
        return found

    def compare(self, other: Self) -> dict[str, list[float]]:
        """Metric -> [difference, low, high, p] of self minus `other`, which answers the same rows."""
        how = (self.bootstrap, self.seed, self.clusters)
        found = {
            m: paired_mean([s[m] for s in self.scores], [s[m] for s in other.scores], *how) for m in self.scores[0]
        }
        if self.has_bleu:
            answers = [r.answer for r in self.rows]
            found["bleu"] = paired_bleu(self.texts, other.texts, answers, *how)
        return {metric: list(values) for metric, values in found.items()}


def clusters_of(config: RunConfig, ids: Sequence[str]) -> list[str] | None:
    """The conversation of each row, where every turn of a test conversation is a row; None where rows stand alone."""
    every_turn = config.prompt.conversation and config.task.learn == "all"
    return [conversation_of(i) for i in ids] if every_turn else None


def output_lines(rows: Sequence[Row], columns: Mapping[str, ScoredAnswers]) -> Iterator[str]:
    """outputs.jsonl: each row with the answer and the metrics of every column."""
    for i, r in enumerate(rows):
        outputs = {name: c.texts[i] for name, c in columns.items()}
        scores = {name: c.scores[i] for name, c in columns.items()}
        row = {"id": r.id, "group": r.group, "query": r.query, "answer": r.answer}
        yield json.dumps({**row, "outputs": outputs, "scores": scores}, ensure_ascii=False) + "\n"
