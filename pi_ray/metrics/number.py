"""Number: the last number of the output is that of the answer, within a tolerance."""

import re
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, InvalidOperation

from pi_ray.config import MetricConfig, TaskConfig
from pi_ray.errors import DataError
from pi_ray.protocols import Row

# 1,234.5 is one number, "3, 4" and "3-4" are two. A sign counts where nothing that could be subtracted from is before.
NUMBER = re.compile(
    r"((?<![\w)\]])[-+\u2212])?[$\u20ac\u00a3\u00a5]?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)([eE][-+]?\d+)?"
)
# Decimals of any size are subtracted without an error: what is too large becomes infinite.
WIDE = Context(prec=60, Emax=MAX_EMAX, Emin=MIN_EMIN, traps=[])


def last_number(text: str) -> Decimal | None:
    """The last number of a text; None where there is none, or its exponent is beyond all numbers."""
    for found in reversed(NUMBER.findall(text)):
        try:
            number = Decimal("".join(found).replace(",", "").replace("\u2212", "-"))
        except InvalidOperation:
            continue
        if number.is_finite():
            return number
    return None


class NumberMatch:
    """Thousands may have commas; units, currencies and percent signs are passed over, so that 50% is 50."""

    def __init__(self, config: MetricConfig, task: TaskConfig):
        self.tolerance, self.relative = Decimal(str(config.tolerance)), Decimal(str(config.relative_tolerance))

    def check(self, row: Row) -> str:
        return "" if last_number(row.answer) is not None else "its answer has no number, which task.metric number needs"

    def score(self, row: Row, output: str) -> float:
        wanted, found = last_number(row.answer), last_number(output)
        if wanted is None:
            raise DataError(f"row '{row.id}': {self.check(row)}")
        if found is None:
            return 0.0
        allowed = max(self.tolerance, WIDE.multiply(self.relative, WIDE.abs(wanted)))
        return float(found == wanted or WIDE.abs(WIDE.subtract(found, wanted)) <= allowed)
