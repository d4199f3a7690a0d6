"""Seeded rows of the OpsQL task. `python -m pi_ray.tasks.opsql.generate` prints their numbers and some of them.

Three groups say how far a row is from training: "like train" (its service and metric stand together in training rows),
"new combinations" (each stands there, never together), "template only" (its service stands in the template alone).
"""

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import cycle, islice
from typing import NamedTuple

from pi_ray.protocols import UNLABELLED, Row
from pi_ray.tasks.opsql.language import LONGEST, SERVICES, SHORTEST, Statement

SIZES = {"train": 600, "dev": 90, "test": 150, UNLABELLED: 1200}
LIKE_TRAIN, NEW_COMBINATIONS, TEMPLATE_ONLY = GROUPS = ("like train", "new combinations", "template only")
TEMPLATE_ONLY_SERVICES = 10
HELD_OUT_METRICS = 2  # for each trained service, which give the new combinations
DEFAULT_WINDOW, DEFAULT_ROUTE = 15, "moss"


class Measure(NamedTuple):
    """A metric in people's words. `scale` turns the spoken amount into the metric's unit."""

    names: tuple[str, str]
    above: bool
    amounts: tuple[int, ...]
    unit: str
    scale: int


MEASURES = {
    "lat": Measure(("latency", "response time"), True, (1, 2, 3, 4, 6), "second", 1000),
    "err": Measure(("error rate", "failure rate"), True, (2, 3, 4, 6, 8), "percent", 100),
    "ram": Measure(("memory", "memory use"), True, (2, 3, 4, 6, 8), "gigabyte", 1000),
    "cpu": Measure(("cpu load", "processor load"), True, (50, 60, 70, 80, 90), "percent", 10),
    "lag": Measure(("queue", "backlog"), True, (200, 300, 400, 600, 800), "message", 1),
    "req": Measure(("traffic", "request rate"), False, (20, 30, 40, 60, 80), "request", 1),
}
SIDES = {True: ("above", "over"), False: ("below", "under")}
WINDOWS = {
    "1 minute": 1, "3 minutes": 3, "5 minutes": 5, "10 minutes": 10, "20 minutes": 20, "30 minutes": 30,
    "half an hour": 30, "45 minutes": 45, "1 hour": 60, "2 hours": 120, "3 hours": 180,
}
SEVERITIES = {"critical": "fern", "urgent": "fern", "serious": "kite", "minor": "moss", "low": "cobalt"}
UNNAMED = 0.25  # share of queries that leave the window (or the severity) to the default
WORDINGS = (
    "Alert when the {metric} of {service} is {side} {amount}{window}{severity}.",
    "{service}: warn if {metric} goes {side} {amount}{window}{severity}",
    "Tell us if {service} has its {metric} {side} {amount}{window}{severity}.",
    "We want an alert on {service} when {metric} stays {side} {amount}{window}{severity}.",
    "Watch {service} and fire if the {metric} is {side} {amount}{window}{severity}.",
    "If {metric} in {service} gets {side} {amount}{window}, raise an alert{severity}.",
)
WINDOW_WORDINGS = (" for {}", " for at least {}")
SEVERITY_WORDINGS = (", this is {}", ", severity {}", " and treat it as {}")


@lru_cache(maxsize=4)
def generate_rows(seed: int = 0) -> Mapping[str, tuple[Row, ...]]:
    """All rows of each split, ordered so that the first n of them are balanced for any n; no two rows share a query."""
    rng = random.Random(seed)
    pairs = _pairs(rng)
    queries: set[str] = set()
    streams = {split: [_rows(rng, pairs[group], group, queries) for group in GROUPS] for split in ("test", "dev")}
    streams["train"] = [_rows(rng, pairs[LIKE_TRAIN], "", queries)]  # groups are parts of dev and test
    trained = pairs[NEW_COMBINATIONS] + pairs[LIKE_TRAIN]
    all_services = [a + b for a, b in zip(trained, pairs[TEMPLATE_ONLY], strict=True)]
    streams[UNLABELLED] = [(replace(row, answer="") for row in _rows(rng, all_services, "", queries))]
    return {split: tuple(_interleave(split, groups)) for split, groups in streams.items()}


def _pairs(rng: random.Random) -> dict[str, list[list[tuple[str, str]]]]:
    """group -> rounds of (service, metric), each with every service once: 120 training rows hold all 30 x 4 pairs."""
    services = rng.sample(sorted(SERVICES), len(SERVICES))
    untrained, trained = services[:TEMPLATE_ONLY_SERVICES], services[TEMPLATE_ONLY_SERVICES:]
    order = {service: rng.sample(sorted(MEASURES), len(MEASURES)) for service in services}
    rounds: dict[str, list[list[tuple[str, str]]]] = {group: [] for group in GROUPS}
    for i in range(len(MEASURES)):
        rounds[NEW_COMBINATIONS if i < HELD_OUT_METRICS else LIKE_TRAIN].append([(s, order[s][i]) for s in trained])
        rounds[TEMPLATE_ONLY].append([(s, order[s][i]) for s in untrained])
    return rounds


def _rows(rng: random.Random, rounds: list[list[tuple[str, str]]], group: str, queries: set[str]) -> Iterator[Row]:
    """Rows of one group without end and without ids, round after round, services shuffled within a round."""
    for pairs in cycle(rounds):
        for service, metric in rng.sample(pairs, len(pairs)):
            query, statement = _draw(rng, service, metric)
            while query.casefold() in queries:
                query, statement = _draw(rng, service, metric)
            queries.add(query.casefold())
            yield Row("", query, str(statement), group)


def _interleave(split: str, groups: Sequence[Iterator[Row]]) -> Iterator[Row]:
    """One row of each group in turn, with its id."""
    for i, group in zip(range(SIZES[split]), cycle(groups), strict=False):
        yield replace(next(group), id=f"{split}-{i}")


def _draw(rng: random.Random, service: str, metric: str) -> tuple[str, Statement]:
    measure = MEASURES[metric]
    amount = rng.choice(measure.amounts)
    window = "" if rng.random() < UNNAMED else rng.choice(sorted(WINDOWS))
    severity = "" if rng.random() < UNNAMED else rng.choice(sorted(SEVERITIES))
    query = rng.choice(WORDINGS).format(
        service=service, metric=rng.choice(measure.names), side=rng.choice(SIDES[measure.above]),
        amount=f"{amount} {measure.unit}{'' if amount == 1 or measure.unit == 'percent' else 's'}",
        window=window and rng.choice(WINDOW_WORDINGS).format(window),
        severity=severity and rng.choice(SEVERITY_WORDINGS).format(severity),
    )
    minutes = min(max(WINDOWS[window], SHORTEST), LONGEST) if window else DEFAULT_WINDOW
    route = SEVERITIES[severity] if severity else DEFAULT_ROUTE
    return query, Statement(SERVICES[service], metric, measure.above, amount * measure.scale, minutes, route)


def main() -> None:
    for split, rows in generate_rows().items():
        print(f"{split}: {len(rows)} rows {dict(Counter(r.group for r in rows if r.group)) or ''}")
        for row in islice(rows, 6):
            print(f"  {row.group or split:16}  {row.query}\n  {'':16}  {row.answer}")


if __name__ == "__main__":
    main()
