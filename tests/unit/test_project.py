"""The project about itself: what the package carries, the two commands, the top level. Documents: tests/unit/docs."""

import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[2]


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()


INSTALLED = """
import yaml
from importlib.resources import files
import pi_ray
from pi_ray.config import RunConfig
from pi_ray.registry import tasks
config = RunConfig.model_validate(yaml.safe_load(files("pi_ray.cli").joinpath("demo.yaml").read_text()))
print(pi_ray.__file__, config.task.name, len(tasks[config.task.name](config.task).template().text))
"""
HELP = """
import sys
from pi_ray.cli import main
try:
    main(["--help"])
except SystemExit as done:
    print(done.code, [m for m in ("torch", "ray", "transformers") if m in sys.modules])
"""


def test_an_installed_package_has_the_command_and_carries_the_demo(tmp_path):
    """`pip install .` without its dependencies, which are here; then used from a folder that is not the checkout."""
    options = ["-q", "--no-deps", "--no-build-isolation", "--target", tmp_path / "site"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, REPO], check=True, capture_output=True)

    def python(*arguments):
        run = {"cwd": tmp_path, "env": {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path / "site")}}
        return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True, **run).stdout

    site = tmp_path / "site"
    assert python("-c", INSTALLED).startswith(f"{site}/pi_ray/__init__.py opsql ")
    assert "demo" in python(site / "bin" / "pi-ray", "--help")
    assert {p.name for p in site.iterdir() if p.is_dir() and not p.name.endswith(".dist-info")} == {"pi_ray", "bin"}
    for name in ("report/page.html", "serve/http/page.html", "tasks/nl2bash.md", "evaluate/off_task.txt"):
        assert (site / "pi_ray" / name).is_file(), name
    assert list((site / "pi_ray" / "cluster" / "render").rglob("*.j2"))


def test_help_is_instant_because_it_loads_neither_torch_nor_ray():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []" and "plan" in done.stdout


def test_make_test_runs_the_tests_and_ci_calls_it():
    recipe = subprocess.run(["make", "-n", "-C", REPO, "test"], capture_output=True, text=True, check=True).stdout
    assert "-m pytest" in recipe
    assert "make test" in (REPO / ".ci" / "run").read_text()


def test_top_level_has_the_agreed_shape():
    agreed = {"pi_ray", "jobs", "cluster", "serve", "tests", "docs", ".ci", ".github"}
    assert {p.split("/")[0] for p in tracked() if "/" in p} <= agreed
