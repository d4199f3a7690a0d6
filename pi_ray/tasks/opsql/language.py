"""OpsQL, a small in-house alert language: vocabulary, parser, and an interpreter over a fixed synthetic metrics table.

`from r9 | lat > 2000 | for 10m | to fern`: on service r9, when `lat` has been above 2000 in each of the last 10
minutes, tell route fern. `from` comes first, the other three clauses stand once each in any order, and `1h` means
`60m`. Model output is untrusted: parsing and execution are bounded and total; any other text raises OpsqlError.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pi_ray.errors import DataError

SERVICES = {
    "checkout": "r9", "search": "r5", "login": "f9", "billing": "x4", "catalog": "d9", "cart": "k4", "shipping": "c2",
    "returns": "w8", "reviews": "w2", "wishlist": "t3", "coupons": "b2", "loyalty": "g5", "inventory": "t5",
    "pricing": "x6", "taxes": "s2", "invoices": "y3", "refunds": "q3", "fraud": "z6", "email": "m5", "chat": "a3",
    "video": "p3", "images": "k8", "maps": "y2", "profiles": "b9", "orders": "p8", "payments": "v5", "ledger": "m3",
    "reports": "a8", "exports": "d4", "imports": "h3", "archive": "f5", "gateway": "e8", "scheduler": "q5",
    "mobile": "v6", "partners": "g9", "suppliers": "j2", "warehouse": "c3", "delivery": "n9", "feeds": "e9",
    "ads": "s3",
}
METRICS = {"lat": 6000, "err": 800, "ram": 8000, "cpu": 900, "lag": 800, "req": 80}  # name -> largest threshold used
ROUTES = ("fern", "kite", "moss", "cobalt")
SHORTEST, LONGEST = 5, 60  # minutes of a window
MINUTES = 1440  # length of the metrics table
MAX_CHARACTERS = 200

_CLAUSE = re.compile(
    r"from (?P<service>[a-z][0-9])|(?P<metric>[a-z]{3}) ?(?P<side>[<>]) ?(?P<value>[0-9]{1,6})"
    r"|for (?P<window>[0-9]{1,3})(?P<unit>[mh])|to (?P<route>[a-z]+)"
)


class OpsqlError(DataError):
    """The text is not a valid OpsQL statement; the message says why."""


@dataclass(frozen=True)
class Statement:
    """One alert. `value` is in the metric's unit, `window` in minutes. `str()` gives the canonical wording."""

    service: str
    metric: str
    above: bool
    value: int
    window: int
    route: str

    def __str__(self) -> str:
        condition = f"{self.metric} {'>' if self.above else '<'} {self.value}"
        return f"from {self.service} | {condition} | for {self.window}m | to {self.route}"


def parse_statement(text: str) -> Statement:
    """Text -> Statement. Raises OpsqlError for anything else; the work is linear in at most MAX_CHARACTERS."""
    if len(text) > MAX_CHARACTERS:
        raise OpsqlError(f"{len(text)} characters; a statement has at most {MAX_CHARACTERS}")
    clauses = [_CLAUSE.fullmatch(" ".join(clause.split())) for clause in text.split("|")]
    found = {name: word for clause in clauses if clause for name, word in clause.groupdict().items() if word}
    if len(clauses) != 4 or len(found) != _CLAUSE.groups or clauses[0] is None or not clauses[0]["service"]:
        raise OpsqlError("a statement is 'from', and then once each, in any order, a condition, 'for' and 'to'")
    minutes = int(found["window"]) * (60 if found["unit"] == "h" else 1)
    if not SHORTEST <= minutes <= LONGEST:
        raise OpsqlError(f"a window of {minutes}m; it must be {SHORTEST}m to {LONGEST}m")
    for kind, known in (("service", SERVICES.values()), ("metric", METRICS), ("route", ROUTES)):
        if found[kind] not in known:
            raise OpsqlError(f"no {kind} is called '{found[kind]}'")
    above, value = found["side"] == ">", int(found["value"])
    return Statement(found["service"], found["metric"], above, value, minutes, found["route"])


def execute_statement(statement: Statement) -> tuple[tuple[int, ...], str]:
    """Minutes t at which the alert fires (the condition holds in each of t - window + 1 .. t), and the route told."""
    series = _series(statement.service, statement.metric)
    holds = series > statement.value if statement.above else series < statement.value
    total = np.concatenate(([0], np.cumsum(holds)))
    within = total[statement.window :] - total[: -statement.window]
    return tuple((np.flatnonzero(within == statement.window) + statement.window - 1).tolist()), statement.route


@lru_cache(maxsize=len(SERVICES) * len(METRICS))
def _series(service: str, metric: str) -> np.ndarray:
    """A column of the metrics table, int64 (MINUTES,): three waves, which cross every usual threshold at own times."""
    parts = np.frombuffer(hashlib.sha256(f"{service} {metric}".encode()).digest()[:6], dtype=np.uint8) / 256
    periods, phases = np.array([600, 190, 70]) * (1 + 0.4 * parts[:3]), 2 * np.pi * parts[3:]
    waves = np.sin(2 * np.pi * np.arange(MINUTES)[:, None] / periods + phases) @ np.array([0.8, 0.15, 0.05])
    level = (waves - waves.min()) / (waves.max() - waves.min())
    return np.rint(level * 1.3 * METRICS[metric]).astype(np.int64)
