"""Find what an adapter knows of its prompt: in the evaluation of a run, or beside a published adapter."""

from collections.abc import Sequence
from pathlib import Path

from pi_ray.config.run_file import load_run_file, parse_run_file
from pi_ray.errors import AdapterError, DataError
from pi_ray.evaluate.knowledge import KNOWLEDGE_FILE, Knowledge, read_knowledge
from pi_ray.run.directory import RunDir
from pi_ray.store.adapters import AdapterStore


def find_knowledge(target: str, overrides: Sequence[str]) -> Knowledge:
    """Return the knowledge of an adapter that a run file, a run directory or a name in the store points to.

    Raises DataError where the run was not evaluated, AdapterError where the adapter was published without knows.json.
    """
    path = Path(target)
    file = path / "run.yaml" if path.is_dir() else path
    if file.is_file():
        evaluation = RunDir(load_run_file(file, overrides).root).evaluation
        if found := read_knowledge(evaluation):
            return found
        cure = f"'pi-ray evaluate {target}' writes it, unless evaluate.knows is false"
        raise DataError(f"{evaluation}: no {KNOWLEDGE_FILE}; {cure}")
    store = parse_run_file("name: knows", "knows", overrides).store
    adapter = AdapterStore(store).open(target)
    if found := read_knowledge(adapter.path):
        return found
    cure = "evaluate its run and publish it again, unless serve.knows is false"
    raise AdapterError(f"'{adapter.name}@{adapter.version}' was published without {KNOWLEDGE_FILE}; {cure}")
