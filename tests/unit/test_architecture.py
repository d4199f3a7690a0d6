"""Imports go one way: no two files import each other in a circle, and no folder imports one that stands above it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From the ground up. What shares a line must not import its neighbours there.
FLOORS = [
    ["errors", "progress"],
    ["registry"],
    ["schedule"],
    ["config"],
    ["prompt"],
    ["protocols"],
    ["run"],
    ["models", "cluster"],
    ["tasks", "hosted"],
    ["compress", "retrieve"],
    ["data"],
    ["train"],
    ["evaluate"],
    ["report", "store"],
    ["plan", "serve.engine"],
    ["serve.http", "cluster.render", "cluster.doctor"],
    ["serve"],
    ["pipeline"],
    ["cluster.jobs", "experiments"],
    ["cli"],
]
FLOOR = {name: i for i, floor in enumerate(FLOORS) for name in floor}


def modules() -> dict[str, Path]:
    """Dotted name below pi_ray -> file; a folder's __init__ has the folder's name."""
    found = {}
    for path in (ROOT / "pi_ray").rglob("*.py"):
        parts = path.relative_to(ROOT / "pi_ray").with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules that a file imports anywhere: at its top, inside a function, or for types alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in (n.removeprefix("pi_ray.") for n in names if n.startswith("pi_ray.")):
            target = name if name in known else name.rpartition(".")[0]
            if target in known and target:
                found.add(target)
    return found


def folder_of(module: str) -> str:
    """The longest part of a module's name that stands on a floor."""
    while module and module not in FLOOR:
        module = module.rpartition(".")[0]
    return module


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(path, known) - {name} for name, path in known.items()}


def test_every_module_stands_on_a_floor(graph):
    assert [m for m in graph if m and not folder_of(m)] == []


def test_no_folder_imports_one_above_it(graph):
    up = [
        f"{module} imports {target}"
        for module, targets in graph.items()
        for target in targets
        if folder_of(module) != folder_of(target) and FLOOR.get(folder_of(target), -1) >= FLOOR.get(folder_of(module), -1)
    ]
    assert up == [], "\n".join(sorted(up))


def test_no_files_import_each_other_in_a_circle(graph):
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, (*path, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_few_modules_lie_at_the_top():
    assert len([p for p in (ROOT / "pi_ray").glob("*.py") if p.name != "__init__.py"]) <= 10
