"""Tool calls: the output calls the functions of the answer with the same arguments, in any order.

Arguments are compared as trees after the normalisation of the Berkeley function-calling leaderboard (BFCL, its AST
checker): of texts, spaces and the characters `,./-_*^` do not count, nor does case, and ' is "; whole numbers equal
decimal ones; lists have an order and objects none. A dot in a function's name is an underscore, as for models whose API
takes no dots. An argument that is null counts as left out.
"""

import re
from collections import Counter
from collections.abc import Hashable
from typing import Any

from pi_ray.config import MetricConfig, TaskConfig
from pi_ray.conversation import parse_tool_calls
from pi_ray.conversation.tool_calls import START
from pi_ray.errors import DataError
from pi_ray.metrics.json_fields import parse_json_answer
from pi_ray.protocols import Row
from pi_ray.registry import metrics

IGNORED = re.compile(r"[ ,./\-_*^]")

Call = tuple[str, Hashable]  # name and arguments, both normalised


def find_calls(text: str) -> list[Call]:
    """The calls of an assistant's turn. Raises ValueError for one that is begun and cannot be read."""
    content, calls = parse_tool_calls(text)
    if START in content:
        raise ValueError(f"{START} is not followed by JSON with name and arguments and its end mark")
    try:
        return [_normalise_call(call["function"]) for call in calls]
    except RecursionError:
        raise ValueError("arguments are nested too deeply") from None


def normalise_argument(value: Any) -> Hashable:
    """A JSON value in a form in which equal arguments are equal."""
    if isinstance(value, str):
        return "text", IGNORED.sub("", value).lower().replace("'", '"')
    if isinstance(value, dict):
        return "object", frozenset((k, normalise_argument(v)) for k, v in value.items() if v is not None)
    if isinstance(value, list):
        return "list", tuple(map(normalise_argument, value))
    return "truth" if isinstance(value, bool) else "number", value


def _normalise_call(function: dict[str, str]) -> Call:
    return function["name"].strip().replace(".", "_"), normalise_argument(parse_json_answer(function["arguments"]))


class ToolCallMatch:
    """1 where output and answer have the same calls, each as often. Text beside calls does not count.

    A row whose answer calls nothing wants no call: then `otherwise` names the metric that scores the text.
    """

    def __init__(self, config: MetricConfig, task: TaskConfig):
        name = config.otherwise
        self.otherwise = metrics[name](MetricConfig(name=name), task) if name else None

    def check(self, row: Row) -> str:
        try:
            find_calls(row.answer)
        except ValueError as error:
            return f"its answer has a tool call that cannot be read: {error}"
        return ""

    def score(self, row: Row, output: str) -> float:
        try:
            wanted = find_calls(row.answer)
        except ValueError:
            raise DataError(f"row '{row.id}': {self.check(row)}") from None
        try:
            found = find_calls(output)
        except ValueError:
            return 0.0
        if not wanted and not found and self.otherwise:
            return self.otherwise.score(row, output)
        return float(Counter(found) == Counter(wanted))
