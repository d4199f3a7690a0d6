"""A finding: the result of one check, with its cure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """`what` was checked. "fail": a run cannot work so; "note": a person should know. `cure` comes with both."""

    what: str
    state: Literal["ok", "note", "fail"]
    message: str
    cure: str = ""


def ok(what: str, message: str) -> Finding:
    return Finding(what, "ok", message)


def note(what: str, message: str, cure: str) -> Finding:
    return Finding(what, "note", message, cure)


def fail(what: str, message: str, cure: str) -> Finding:
    return Finding(what, "fail", message, cure)
