"""The scorer of a user's own rows: applies the metrics of `task.metric`, or exact match without one."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pi_ray.config import MetricConfig, TaskConfig
from pi_ray.errors import DataError
from pi_ray.protocols import Metric, Row
from pi_ray.registry import metrics


class RowScorer:
    """Numbers from 0 to 1 for each row, by name, in the order of `task.metric`.

    A judge costs money and is not asked here: where it is the only metric, exact match stands in. Raises ConfigError
    for settings that no metric can work with, such as a pattern that is no regular expression.
    """

    def __init__(self, config: TaskConfig):
        named = [m for m in config.metric if not m.asks_service] or [MetricConfig(name="exact_match")]
        self.parts: list[tuple[str, Metric]] = [(m.key, metrics[m.name](m, config)) for m in named]

    def check(self, row: Row) -> str:
        """Why a metric cannot score outputs against this row's answer; "" where all can. Raises as `score_all`."""
        checks = (getattr(metric, "check", None) for _, metric in self.parts)
        return next(filter(None, (check(row) for check in checks if check)), "")

    def score(self, row: Row, output: str) -> dict[str, float]:
        return self.score_all([row], [output])[0]

    def score_all(self, rows: Sequence[Row], outputs: Sequence[str]) -> list[dict[str, float]]:
        """The scores of each row. Raises DataError for a row that cannot be scored, ConfigError as `Sandbox` does."""
        found: list[dict[str, float]] = [{} for _ in rows]
        for key, metric in self.parts:
            at_once = getattr(metric, "score_all", None)
            scores: Iterable[Any] = at_once(rows, outputs) if at_once else map(metric.score, rows, outputs)
            for row, own, score in zip(rows, found, scores, strict=True):
                for name, value in (score.items() if isinstance(score, Mapping) else [(key, score)]):
                    if name in own:
                        raise DataError(f"task.metric: two metrics give a number '{name}'; give one another name")
                    own[name] = _number(value, name, row)
        names = {tuple(own) for own in found}
        if len(names) > 1:
            first, second, *_ = (", ".join(given) for given in sorted(names))
            raise DataError(f"task.metric: one row has the numbers {first}, another {second}; give the same for each")
        return found


def _number(value: Any, name: str, row: Row) -> float:
    """A score as a float. Raises DataError where it is none from 0 to 1."""
    if isinstance(value, (int, float)) and 0 <= value <= 1:
        return float(value)
    shown = repr(value)[:40]
    raise DataError(f"task.metric: {name} of row '{row.id}' is {shown}, and a score is a number from 0 to 1")
