"""The quality floor (`schedule.floor`): which phase has the shortest prompt that keeps the first phase's dev score.

Training goes through all phases, whatever the floor: what an adapter misses under one shortened prompt it may learn
under the next, so that a phase below the floor ends nothing. The choice comes last.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pi_ray.config import RunConfig
from pi_ray.schedule import plan_phases
from pi_ray.train.phase_scores import read_phase_scores

TOKEN_ACCURACY, SENTENCE_BLEU = "token_accuracy", "sentence_bleu"
FEW_ROWS = 50  # dev rows below which the sentence says that the comparison is noisy
WEAK = 0.1  # a mean below this tells phases apart badly
RESAMPLES = 2000
NAMES = {TOKEN_ACCURACY: "share of answer tokens right", SENTENCE_BLEU: "sentence BLEU", "bleu": "sentence BLEU"}


@dataclass(frozen=True)
class PhaseShare:
    """A phase's prompt, its mean score on dev rows, and that as a share of the first phase's."""

    phase: int
    rate: float
    shots: int
    score: float  # 0 to 1
    share: float
    interval: tuple[float, float]  # of the share, 95%, over the choice of dev rows (paired bootstrap)
    holds: bool  # whether the share is not below the floor

    @property
    def prompt(self) -> tuple[float, int]:
        """(rate, shots), by which prompts are ordered: the template counts first."""
        return self.rate, self.shots

    @property
    def examples(self) -> str:
        return f"with {self.shots} fixed example{'s' * (self.shots != 1)}" if self.shots else "without examples"


@dataclass(frozen=True)
class FloorVerdict:
    """The decision of the floor: the phase at which the run ends."""

    floor: float
    metric: str
    rows: int  # dev rows that were scored
    phases: tuple[PhaseShare, ...]
    chosen: int

    def facts(self) -> dict[str, Any]:
        """All of it for logs and summaries, with the sentence."""
        return {**asdict(self), "sentence": str(self)}

    def __str__(self) -> str:
        """The verdict in words."""
        first, mine = self.phases[0], self.phases[self.chosen]
        shorter = [p for p in self.phases if p.prompt < mine.prompt]
        named = [f"rate {p.rate:g}" + (f" {p.examples}" if p.shots != mine.shots else "") for p in shorter]
        held = [f"{name} held {_percent(p.share)}" for name, p in zip(named, shorter, strict=True)]
        missed = f"{' and '.join(held)}, below the floor of {_percent(self.floor)}" if held else ""
        is_whole, rate = first.rate == 1, f"(template rate {first.rate:g})"
        if mine.prompt == first.prompt:
            text = f"Keep the {'whole prompt' if is_whole else f'prompt of the first phase {rate}'}"
            text += f": of its dev score {missed}"
        else:
            whose = "the full prompt's" if is_whole else f"the first phase's {rate}"
            text = f"The run ends at template rate {mine.rate:g} {mine.examples}"
            text += f": {_percent(mine.share)} of {whose} dev score"
            text += f"; {missed}" if missed else ""
        return f"{text} ({self._measure(mine)})."

    def _measure(self, mine: PhaseShare) -> str:
        first, rows = self.phases[0], f"on {self.rows:,} dev rows"
        name = NAMES.get(self.metric, self.metric.replace("_", " "))
        if mine.prompt == first.prompt:
            text = f"{name} {_percent(first.score)} {rows}"
        else:
            low, high = map(_percent, mine.interval)
            text = f"{name} {_percent(mine.score)} against {_percent(first.score)} {rows}; "
            text += f"95% interval of the share {low} to {high}"
        if self.rows < FEW_ROWS:
            text += f"; {self.rows} rows are few, so another choice of them could decide otherwise"
        return text + ("; so low a score says little" if first.score < WEAK else "")


def decide_floor(config: RunConfig) -> FloorVerdict:
    """The verdict on a run whose phases all have their adapters: of those that hold the floor the one with the smallest
    template rate, of these with the fewest shots, of equal prompts with the best score.
    """
    floor, plan, scores = config.schedule.floor, plan_phases(config.schedule), read_phase_scores(config)
    metric = next(iter(scores[0])) if config.training_metric else main_dev_metric(scores[0])
    values = np.array([s[metric] for s in scores])
    shares, intervals = _shares(values, config.train.seed)
    phases = tuple(
        PhaseShare(i, p.rate, p.shots, float(values[i].mean()), shares[i], intervals[i], shares[i] >= floor - 1e-9)
        for i, p in enumerate(plan)
    )
    chosen = min((p for p in phases if p.holds), key=lambda p: (*p.prompt, -p.score, -p.phase))
    return FloorVerdict(floor, metric, values.shape[1], phases, chosen.phase)


def main_dev_metric(scores: Mapping[str, list[float]]) -> str:
    """Exact match, else the task's own metric, else sentence BLEU: the first whose mean is not near 0, or the last."""
    own = sorted(scores.keys() - {"exact_match", SENTENCE_BLEU})
    names = [name for name in ("exact_match", *own, SENTENCE_BLEU) if name in scores]
    return next((name for name in names if np.mean(scores[name]) >= WEAK), names[-1])


def _shares(values: np.ndarray, seed: int) -> tuple[list[float], list[tuple[float, float]]]:
    """Each phase's mean as a share of the first one's, with its 95% interval; `values` is (phases, rows)."""
    picked = np.random.default_rng(seed).integers(0, values.shape[1], (RESAMPLES, values.shape[1]))
    means = np.stack([row[picked].mean(1) for row in values])  # (phases, resamples)
    first, known = values[0].mean(), means[0] > 0
    if not first:
        return [1.0] * len(values), [(1.0, 1.0)] * len(values)
    resampled = means[:, known] / means[0, known]
    low, high = np.percentile(resampled, (2.5, 97.5), axis=1)
    return (values.mean(1) / first).tolist(), list(zip(low.tolist(), high.tolist(), strict=True))


def _percent(share: float) -> str:
    """Percents with at most one decimal, cut off, so that nothing below the floor looks as if it held it."""
    return f"{math.floor(1000 * share + 1e-6) / 10:g}%"
