"""Values that vary from one request to the next within a prompt, such as a date: `{current_time}` in the template.

Training has them before each query, on a line `current_time: ...` each, and an empty line behind them
(request_log/recurrent.py). In a prompt that a client still sends a guard finds them, and puts them there too.
"""

import re
from collections.abc import Iterable, Sequence

from pi_ray.store.white_space import collapse_whitespace, text_behind

PLACEHOLDER = re.compile(r"\{([^\W\d]\w*)\}")
LEAST_ROWS = 0.9  # of all, that name values before their queries
MAX_VALUES = 16


def find_value_names(template: str, queries: Sequence[str]) -> list[str]:
    """The placeholders of `template` that the rows' queries begin with, in the template's order.

    None where less than LEAST_ROWS of them do: then a placeholder is a word of the prompt as any other.
    """
    names = list(dict.fromkeys(PLACEHOLDER.findall(template)))[:MAX_VALUES]
    found = [_named(query, names) for query in queries]
    if not 0 < LEAST_ROWS * len(found) <= sum(map(bool, found)):
        return []
    used = {name for head in found for name in head}
    return [name for name in names if name in used]


def _named(query: str, names: Iterable[str]) -> list[str]:
    """The names of the lines that a query begins with; none where its first paragraph has any other line."""
    lines = [line.partition(": ") for line in query.partition("\n\n")[0].splitlines()]
    return [name for name, _, _ in lines] if all(name in names and mark for name, mark, _ in lines) else []


class VaryingPrompt:
    """Finds the values of a template in a prompt that a client sends. White space does not count."""

    def __init__(self, template: str, names: Sequence[str]):
        self._template, flat = template, collapse_whitespace(template)
        placeholder = re.compile("|".join(re.escape(f"{{{name}}}") for name in names) or "(?!)")
        self._parts, self._names = placeholder.split(flat), [found[1:-1] for found in placeholder.findall(flat)]

    def take(self, text: str, whole: bool) -> tuple[str, str] | None:
        """(lines with the values, `text` with placeholders in their places); None where it is another prompt.

        With `whole` the prompt is all of `text`, else its beginning, which cannot end with a value.
        """
        first, *others = self._parts
        if not others or not (others[-1] or whole):
            return None
        flat = collapse_whitespace(text)
        if not flat.startswith(first):
            return None
        at, values = len(first), list[str]()
        for left, part in zip(reversed(range(len(others))), others, strict=True):
            least = at - (part[:1] == " " == flat[at - 1 : at])  # two spaces around an empty value are one
            ends = whole and not left
            place = len(flat) - len(part) if ends else flat.find(part, least)  # the first place: if any fits, this does
            if place < least or not flat.startswith(part, place):
                return None
            values.append(flat[at:place].strip())
            at = place + len(part)
        named = dict(zip(self._names, values, strict=True))
        if values != [named[name] for name in self._names]:  # one placeholder with two values
            return None
        lines = "\n".join(f"{name}: {value}" for name, value in named.items() if value)
        return lines, self._template + text_behind(text, flat[:at])


def put_before(head: str, query: str) -> str:
    """The query as training has it, behind its values."""
    return "\n\n".join(filter(None, [head, query]))
