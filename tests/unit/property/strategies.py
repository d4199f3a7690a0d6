"""What hostile or broken input looks like: any JSON, any text, and valid content in which something was changed."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

# Characters that parsers stumble over: NUL, quotes, line ends of Unicode, combining marks, emoji, halves of surrogates.
ODD = "\0\t\n\r\u2028\u0301\ufeff\U0001f3a8\ud800\udc00'\"\\{}[]<>/.:=#&*!|%@`~$"
texts = st.text(max_size=40) | st.text(st.sampled_from(ODD + "ab1 "), max_size=12)
numbers = st.integers() | st.floats() | st.sampled_from([10**400, -(2**63), 2**64, 1e308, -0.0])
scalars = st.none() | st.booleans() | numbers | texts


def json_values(leaves: int = 12) -> st.SearchStrategy[Any]:
    """Any value of JSON, also with NaN, infinite and huge numbers and halves of surrogate pairs."""

    def around(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4)

    return st.recursive(scalars, around, max_leaves=leaves)


def deep(levels: int) -> list[Any]:
    """A list in a list, so many times."""
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


@st.composite
def changed(draw: st.DrawFn, valid: Any, most: int = 3) -> Any:
    """`valid` (of dicts, lists and scalars) with up to `most` parts replaced, removed, doubled or added."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(0, most))):
        inside = _places(value)
        if not inside:
            return draw(json_values())
        parent, key = draw(st.sampled_from(inside))
        match draw(st.sampled_from(("replace", "replace", "remove", "double", "add"))):
            case "replace":
                parent[key] = draw(json_values())
            case "remove":
                del parent[key]
            case "double":
                if isinstance(parent, list):
                    parent.insert(key, copy.deepcopy(parent[key]))
                else:
                    parent[draw(texts)] = copy.deepcopy(parent[key])
            case "add":
                if isinstance(parent, list):
                    parent.append(draw(json_values()))
                else:
                    parent[draw(texts)] = draw(json_values())
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(parent, key or index) of everything within `value`."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [place for key in keys for place in [(value, key), *_places(value[key])]]
