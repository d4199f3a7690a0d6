"""The oldest versions that pi-ray works with, as in pyproject.toml: a later `pip install` may have gone below them."""

import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from pi_ray.errors import MissingExtraError

FLOORS = {"ray": "2.60", "torch": "2.9", "transformers": "5.24", "peft": "0.21", "deepspeed": "0.19.4"}


def check_requirements() -> None:
    """Raise MissingExtraError, with the pip command, for a package that is missing or too old."""
    for problem, cure in packages_too_old():
        raise MissingExtraError(f"{problem}; {cure}")


def packages_too_old() -> Iterator[tuple[str, str]]:
    """(what is wrong, its cure) of each package that is missing or below its floor."""
    for name, floor in FLOORS.items():
        found = installed_version(name)
        if not found or is_older(found, floor):
            problem = f"{name} {found or 'is missing'}, and pi-ray needs {floor} or newer"
            yield problem, f"'{sys.executable} -m pip install \"{name}>={floor}\"' brings it"


def is_older(found: str, floor: str) -> bool:
    """Whether a version is below a floor. A candidate or a local build (2.6.0rc1, 2.6.0+cpu) counts as its release."""
    from packaging.version import Version

    return Version(Version(found).base_version) < Version(floor)


def installed_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
