"""The oldest versions that pi-ray works with, looked up without importing anything; the same as pyproject.toml's, for machines where something else was installed over them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from pi_ray.errors import MissingExtraError

FLOORS = {"ray": "2.55", "torch": "2.6", "transformers": "5.3", "peft": "0.18", "deepspeed": "0.18"}
PYTHON = (3, 11)


def check_requirements() -> None:
    """Raises MissingExtraError, with the pip command, for a package that is missing or too old."""
    for name, found in packages_too_old():
        raise MissingExtraError(f"{name} {found or 'is missing'}: pi-ray needs {name} {FLOORS[name]} or newer; {cure(name)}")


def packages_too_old() -> Iterator[tuple[str, str]]:
    """(package, its version, or "" where it is missing) of what is below its floor."""
    for name, floor in FLOORS.items():
        found = installed(name)
        if _numbers(found) < _numbers(floor):
            yield name, found


def installed(name: str) -> str:
    """The version, or "" where the package is missing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def cure(name: str) -> str:
    return f"'{sys.executable} -m pip install \"{name}>={FLOORS[name]}\"' brings it"


def _numbers(text: str) -> tuple[int, ...]:
    """ "2.6.0+cpu" -> (2, 6, 0). What is before a release (2.6.0rc1) counts as the release."""
    numbers: list[int] = []
    for part in text.split("+")[0].split("."):
        digits = part[: next((i for i, c in enumerate(part) if not c.isdigit()), len(part))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
