"""The project about itself: the file map, what the package carries, and the two commands."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
README = (REPO / "README.md").read_text()
MAP = README.split("## File map")[1].split("\n## ")[0]


def tracked() -> list[str]:
    return subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize("path", sorted(p.relative_to(REPO / "pi_ray").as_posix() for p in (REPO / "pi_ray").rglob("*.py") if p.name != "__init__.py"))
def test_every_module_stands_in_the_file_map(path):
    name = path.rsplit("/", 1)[-1].removesuffix(".py")
    assert re.search(rf"\b{name}\b", MAP), f"README's file map does not name {path}"


def test_the_file_map_names_nothing_that_is_not_there():
    for name in re.findall(r"[\w/]+\.(?:py|html|yaml)\b", MAP):
        assert any(path == name or path.endswith(f"/{name}") for path in tracked()), f"README's file map names {name}, which does not exist"


def test_the_wheel_carries_the_demo_the_templates_and_the_report(tmp_path):
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, REPO], check=True, capture_output=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    assert {"pi_ray/demo.yaml", "pi_ray/report.html", "pi_ray/tasks/opsql/template.md", "pi_ray/tasks/nl2bash.md", "pi_ray/cli.py"} <= names
    assert not [n for n in names if n.startswith(("tests/", "jobs/", "serve/"))]


def test_help_is_instant_because_it_loads_neither_torch_nor_ray():
    program = "import sys; from pi_ray import cli; cli._parser().format_help(); print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_make_test_runs_the_tests_and_ci_calls_it():
    recipe = subprocess.run(["make", "-n", "-C", REPO, "test"], capture_output=True, text=True, check=True).stdout
    assert "-m pytest" in recipe
    assert "make test" in (REPO / ".ci" / "run").read_text()


def test_top_level_has_the_agreed_shape():
    assert {p.split("/")[0] for p in tracked() if "/" in p} <= {"pi_ray", "jobs", "cluster", "serve", "tests", ".ci"}
