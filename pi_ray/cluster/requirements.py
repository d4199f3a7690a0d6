"""The oldest versions that pi-ray works with, as in pyproject.toml, looked up without importing anything.

pip does not notice when another package is installed over them later.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from pi_ray.errors import MissingExtraError

FLOORS = {"ray": "2.60", "torch": "2.6", "transformers": "5.3", "peft": "0.18", "deepspeed": "0.18"}


def check_requirements() -> None:
    """Raise MissingExtraError, with the pip command, for a package that is missing or too old."""
    for name, found in packages_too_old():
        needed = f"pi-ray needs {name} {FLOORS[name]} or newer; {install_command(name)}"
        raise MissingExtraError(f"{name} {found or 'is missing'}: {needed}")


def packages_too_old() -> Iterator[tuple[str, str]]:
    """(package, its version or "" where it is missing) of each package below its floor."""
    for name, floor in FLOORS.items():
        found = installed_version(name)
        if not found or is_older(found, floor):
            yield name, found


def is_older(found: str, floor: str) -> bool:
    """Whether a version is below a floor. A candidate or a local build (2.6.0rc1, 2.6.0+cpu) counts as its release."""
    from packaging.version import Version

    return Version(Version(found).base_version) < Version(floor)


def installed_version(name: str) -> str:
    """The version of a package, or "" where it is missing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def install_command(name: str) -> str:
    return f"'{sys.executable} -m pip install \"{name}>={FLOORS[name]}\"' brings it"
