"""The project about itself: the file map, what the package carries, and the two commands."""

import re
import subprocess
import sys
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


def test_an_installed_package_has_the_command_and_carries_the_demo(tmp_path):
    """`pip install .` without its dependencies, which are here already; then used from a folder that is not the checkout."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", tmp_path / "site", REPO]
    subprocess.run(pip, check=True, capture_output=True)
    program = "import pi_ray, sys; from pi_ray.tasks.opsql import OpsqlTask; from importlib.resources import files\n" \
        "from pi_ray.config.run_file import parse; c = parse(files('pi_ray.cli').joinpath('demo.yaml').read_text(), 'demo.yaml'); print(pi_ray.__file__, c.task.name, len(OpsqlTask(c.task).template().text))"

    def python(*arguments):
        environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path / "site")}
        return subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout

    assert python("-c", program).startswith(f"{tmp_path}/site/pi_ray/__init__.py opsql ")
    assert "demo" in python(tmp_path / "site" / "bin" / "pi-ray", "--help")
    assert {p.name for p in (tmp_path / "site").iterdir() if p.is_dir() and not p.name.endswith(".dist-info")} == {"pi_ray", "bin"}
    assert (tmp_path / "site" / "pi_ray" / "report.html").is_file() and (tmp_path / "site" / "pi_ray" / "tasks" / "nl2bash.md").is_file()


def test_help_is_instant_because_it_loads_neither_torch_nor_ray():
    program = "import sys; from pi_ray import cli; cli._parser().format_help(); print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_make_test_runs_the_tests_and_ci_calls_it():
    recipe = subprocess.run(["make", "-n", "-C", REPO, "test"], capture_output=True, text=True, check=True).stdout
    assert "-m pytest" in recipe
    assert "make test" in (REPO / ".ci" / "run").read_text()


def test_top_level_has_the_agreed_shape():
    assert {p.split("/")[0] for p in tracked() if "/" in p} <= {"pi_ray", "jobs", "cluster", "serve", "tests", ".ci"}
