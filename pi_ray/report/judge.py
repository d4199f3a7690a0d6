"""How steady a judge of task.metric is: what the report says of its second pass."""

from collections.abc import Iterator
from typing import Any

from pi_ray.metrics.names import metric_name


def judge_sentences(column: dict[str, Any]) -> Iterator[str]:
    """A sentence or two on each judge of a column, by the facts that evaluate/judge.py leaves."""
    for key in [key.removesuffix("_second_pass") for key in column if key.endswith("_second_pass")]:
        agreed, rows, unread = (column[f"{key}_{fact}"] for fact in ("agreement", "second_pass", "unread"))
        text = f"{metric_name(key)}: asked again about {rows:,} of the adapter's answers, with reference and answer in "
        text += f"the other order, the judge gave the same grade, within a point of ten, to {agreed:.0%}."
        yield f"{text} {unread:,} of its replies had no grade and count as 0." if unread else text
