"""Regular expression: what a pattern finds in the output is what it finds in the answer.

A pattern with repeats in repeats can take for ever on a text that nobody foresaw, so each search has a time limit,
which the package `regex` keeps.
"""

import logging

import regex

from pi_ray.config import MetricConfig, TaskConfig
from pi_ray.errors import ConfigError
from pi_ray.protocols import Row

log = logging.getLogger(__name__)

SECONDS = 1.0  # of one search
PATIENCE = 20  # searches that may take so long; further ones have a tenth of it


class RegexMatch:
    """The first group of the first match is compared, or all of it where the pattern has no group.

    Where the answer has no match, the answer itself is what must be found. An output without a match scores 0, and so
    does one whose search takes too long.
    """

    def __init__(self, config: MetricConfig, task: TaskConfig):
        self.given_up = 0
        try:
            self.pattern = regex.compile(config.pattern)
        except regex.error as error:
            raise ConfigError(f"task.metric regex: '{config.pattern}' is no regular expression: {error}") from None

    def check(self, row: Row) -> str:
        nothing = "task.metric regex finds an empty text in its answer, as it would in any; let it take a character"
        return nothing if self._find(row.answer) == "" else ""

    def score(self, row: Row, output: str) -> float:
        found = self._find(output)
        if found is None:
            return 0.0
        wanted = self._find(row.answer)
        return float(found == (row.answer.strip() if wanted is None else wanted))

    def _find(self, text: str) -> str | None:
        """The text that the pattern finds, without white space around it; None for nothing, or nothing in time."""
        limit = SECONDS if self.given_up < PATIENCE else SECONDS / 10
        try:
            match = self.pattern.search(text, timeout=limit)
        except TimeoutError:
            self.given_up += 1
            if self.given_up in (1, PATIENCE):
                log.warning("task.metric regex: '%s' took over %g s on %d text(s), which count as no match; write it "
                    "without repeats inside repeats, such as (a+)+", self.pattern.pattern, limit, self.given_up)
            return None
        found = match[1 if self.pattern.groups else 0] if match else None
        return None if found is None else found.strip()
