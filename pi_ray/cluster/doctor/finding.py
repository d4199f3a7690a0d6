"""A finding: the result of one check, with its cure."""

from functools import partial
from typing import Literal, NamedTuple


class Finding(NamedTuple):
    """`what` was checked. "fail": a run cannot work so; "note": a person should know. `cure` comes with both."""

    state: Literal["ok", "note", "fail"]
    what: str
    message: str
    cure: str = ""


ok, note, fail = partial(Finding, "ok"), partial(Finding, "note"), partial(Finding, "fail")
