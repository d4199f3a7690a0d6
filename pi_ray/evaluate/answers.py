"""The answers of a column, and the answerer that gives them: adapters on this cluster, or a service."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from pi_ray.config import RunConfig
from pi_ray.evaluate.columns import Column
from pi_ray.models import load_tokenizer
from pi_ray.prompt import PromptEncoder
from pi_ray.protocols import Row

RowWatch = Callable[[str, int, int], None]  # (column, rows done, rows in all)


class AnswerLengths(NamedTuple):
    """In tokens: the limit of an answer, and a typical length, with which requests are timed."""

    limit: int
    typical: int


@dataclass(frozen=True)
class Answers:
    """One column's answers in the order of the rows, with tokens and seconds of a request and results of probes."""

    texts: list[str]
    measured: dict[str, Any]


class Answerer(Protocol):
    """Answers the test rows of one run."""

    model: str  # the base model's name in the summary

    def fingerprint(self, columns: Sequence[Column]) -> str:
        """Hash of everything that the answers and their evaluation depend on."""

    def answer(self, columns: Sequence[Column], lengths: AnswerLengths, watch: RowWatch) -> dict[str, Answers]:
        """Column -> its answers to all rows."""

    def environment(self) -> dict[str, Any]:
        """ "versions" of the packages that matter, and "hardware" in words."""

    def training_facts(self, config: RunConfig) -> dict[str, Any]:
        """Updates, seconds, tokens and workers of a training, `config` being the run or its baseline."""


def answer_lengths(config: RunConfig, rows: Sequence[Row], bank: Sequence[Row] = ()) -> AnswerLengths:
    """A quarter more than the longest known answer, unless evaluate.max_new_tokens sets a limit; and the mean."""
    encoder = PromptEncoder(load_tokenizer(config.model), config.prompt)
    tokens = [len(encoder.answer(r.answer)) for r in rows]
    longest = max(tokens + [len(encoder.answer(r.answer)) for r in bank])
    limit = config.evaluate.max_new_tokens or longest + -(-longest // 4)
    return AnswerLengths(limit, round(sum(tokens) / len(tokens)))
