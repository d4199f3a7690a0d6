"""What one look found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """`state` "fail" means that a run cannot work so, "note" that a person should know. `cure` says how to mend it; it stands with everything that is not "ok"."""

    what: str
    state: Literal["ok", "note", "fail"]
    said: str
    cure: str = ""


def ok(what: str, said: str) -> Finding:
    return Finding(what, "ok", said)


def note(what: str, said: str, cure: str) -> Finding:
    return Finding(what, "note", said, cure)


def fail(what: str, said: str, cure: str) -> Finding:
    return Finding(what, "fail", said, cure)
