"""Architecture: imports go one way and never round in a circle, and a name means one thing in all of pi_ray."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From the ground up. Folders on one line must not import each other.
FLOORS = [
    ["errors", "progress"],
    ["registry"],
    ["schedule"],
    ["config"],
    ["conversation"],
    ["prompt"],
    ["units"],
    ["protocols"],
    ["run"],
    ["models", "cluster", "tasks.sandbox"],
    ["hosted", "metrics"],
    ["tasks"],
    ["compress", "retrieve"],
    ["data"],
    ["train"],
    ["evaluate", "ask"],
    ["report", "store", "answer"],
    ["plan", "serve.engine", "request_log"],
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
    floor = {module: FLOOR.get(folder_of(module), -1) for module in graph}
    up = [
        f"{module} imports {target}"
        for module, targets in graph.items()
        for target in targets
        if folder_of(module) != folder_of(target) and floor[target] >= floor[module]
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


def definitions(kind: type | tuple[type, ...]) -> dict[str, list[str]]:
    """Name -> the modules that define a class or function of that name at their top level."""
    found: dict[str, list[str]] = {}
    for module, path in modules().items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, kind):
                found.setdefault(node.name, []).append(module)
    return found


def test_no_two_classes_share_a_name():
    assert {name: where for name, where in definitions(ast.ClassDef).items() if len(where) > 1} == {}


def test_no_two_modules_have_a_public_function_of_one_name():
    """Verbs of the command line and steps of the pipeline are named alike on purpose."""
    shared = {}
    for name, where in definitions((ast.FunctionDef, ast.AsyncFunctionDef)).items():
        others = [m for m in where if m != "pipeline" and not m.startswith("cli.")]
        if len(others) > 1 and name != "main" and not name.startswith("_"):
            shared[name] = others
    assert shared == {}


def test_nobody_imports_a_private_name_of_another_folder():
    found = []
    for module, path in modules().items():
        folder = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pi_ray"):
                other = node.module.removeprefix("pi_ray").removeprefix(".").rpartition(".")[0]
                private = [a.name for a in node.names if a.name.startswith("_") and not a.name.startswith("__")]
                found += [f"{module} imports {node.module}.{name}" for name in private if other != folder]
    assert found == []


def test_every_folder_says_what_it_holds():
    folders = [path for path in modules().values() if path.name == "__init__.py"]
    assert [str(p) for p in folders if not ast.get_docstring(ast.parse(p.read_text(encoding="utf-8")))] == []
    assert {p.parent for p in folders} == {p.parent for p in modules().values()}


def test_few_modules_lie_at_the_top():
    assert len([p for p in (ROOT / "pi_ray").glob("*.py") if p.name != "__init__.py"]) <= 10
