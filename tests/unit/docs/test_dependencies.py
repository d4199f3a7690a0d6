"""The page of dependencies, and the versions that commands insist on, say what pyproject.toml says."""

import re
import tomllib
from pathlib import Path

import pytest

from pi_ray.cluster.requirements import FLOORS

REPO = Path(__file__).parents[3]
PAGE = REPO / "docs" / "dependencies.md"
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+(\[llm\])?)(\[[\w,]+\])?(?P<range>\S+)")


def required(requirements):
    found = [REQUIREMENT.fullmatch(r) for r in requirements]
    return {match["name"]: match["range"] for match in found}


def test_the_page_has_a_line_for_every_package_with_its_range_and_licence():
    line = re.compile(r"^\| ([\w.\[\]-]+) \| (>=\S+?)(, extra `\w+`)? \| (.+?) \| .+ \|$", re.MULTILINE)
    lines = line.findall(PAGE.read_text())
    extras = [r for name, group in PROJECT["optional-dependencies"].items() if name != "test" for r in group]
    assert {name: versions for name, versions, _, _ in lines} == required(PROJECT["dependencies"]) | required(extras)
    assert all(re.match(r"Apache 2\.0|BSD|MIT", licence) for _, _, _, licence in lines)


@pytest.mark.parametrize("name", FLOORS)
def test_commands_insist_on_the_floors_of_the_project(name):
    assert required(PROJECT["dependencies"])[name].split(",")[0] == f">={FLOORS[name]}"
