"""Choice: which one of the known answers the output names."""

import re

from pi_ray.config import MetricConfig, TaskConfig
from pi_ray.errors import ConfigError, DataError
from pi_ray.metrics.normalized import PUNCTUATION, normalize
from pi_ray.protocols import Row


class ChoiceMatch:
    """An output is a choice when it is equal to it, case and punctuation aside, or when it names it and no other.

    Within longer text a choice must stand as words of its own, a choice of one letter as it is written ("B", not "b"),
    and a longer one goes before a part of it. An output that names two choices has chosen none.
    """

    def __init__(self, config: MetricConfig, task: TaskConfig):
        self.choices = {_key(choice): choice for choice in config.choices}
        if len(self.choices) < max(2, len(config.choices)) or not all(choice.strip() for choice in config.choices):
            raise ConfigError("task.metric choice: choices are two or more texts that differ in more than case and "
                "punctuation")
        words = sorted(map(str.strip, config.choices), key=len, reverse=True)
        options = [re.escape(w) if len(w) == 1 else f"(?i:{re.escape(w)})" for w in words]
        self.named = re.compile(rf"(?<!\w)(?:{'|'.join(options)})(?!\w)")

    def check(self, row: Row) -> str:
        chosen, choices = self.choice_of(row.answer), [*self.choices.values()]
        shown = ", ".join(choices[:5]) + (", ..." if len(choices) > 5 else "")
        return "" if chosen else f"its answer is none of the choices of task.metric choice ({shown})"

    def score(self, row: Row, output: str) -> float:
        if not (wanted := self.choice_of(row.answer)):
            raise DataError(f"row '{row.id}': {self.check(row)}")
        return float(self.choice_of(output) == wanted)

    def choice_of(self, text: str) -> str:
        """The one choice that a text is or names; "" for none, and for several."""
        if (whole := _key(text)) in self.choices:
            return self.choices[whole]
        named = {_key(found) for found in self.named.findall(text)}
        return self.choices.get(named.pop(), "") if len(named) == 1 else ""


def _key(text: str) -> str:
    """The text by which a choice is known, whatever its case and punctuation: "a)" is A, and no article."""
    return normalize(text) or PUNCTUATION.sub("", text.casefold()).strip() or text.strip()
