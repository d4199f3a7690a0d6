"""jobs/data/tau_airline.py: conversations that solved their task, all trials of a task on one side."""

import importlib.util
import json
from pathlib import Path

import pytest

from pi_ray.config.run_file import load_run_file
from pi_ray.protocols import SPLITS, Row
from pi_ray.tasks.conversations import ConversationsTask

JOBS = Path(__file__).parents[3] / "jobs"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("tau_airline", JOBS / "data" / "tau_airline.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trajectory(task, trial, reward=1.0):
    return {"id": f"task-{task}-trial-{trial}", "reward": reward, "messages": [
        {"role": "system", "content": "# Policy\n\nBe brief.\n\n## Bags\n\nOne."},
        {"role": "user", "content": f"Task {task}, trial {trial}"}, {"role": "assistant", "content": "Done."},
    ]}


def test_the_rows_are_those_of_the_run_file(script, tmp_path):
    found = [trajectory(task, trial, reward=float(trial < 2)) for task in range(10) for trial in range(3)]
    (tmp_path / "conversations.jsonl").write_text("".join(json.dumps(t) + "\n" for t in found))
    (tmp_path / "tools.json").write_text('[{"type": "function", "function": {"name": "book"}}]')
    assert script.convert(tmp_path, tmp_path / "made") == {"train": 12, "dev": 4, "test": 4}
    named = load_run_file(JOBS / "runs" / "tau-airline.yaml").task
    here = {key: str(tmp_path / "made" / Path(getattr(named, key)).name) for key in (*SPLITS, "template", "tools")}
    task = ConversationsTask(named.model_copy(update=here))
    rows = {split: list(task.rows(split)) for split in SPLITS}
    assert all(isinstance(row, Row) for found in rows.values() for row in found)
    tasks = {split: {row.id.split("-trial")[0] for row in found} for split, found in rows.items()}
    assert {split: len(found) for split, found in tasks.items()} == {"train": 6, "dev": 2, "test": 2}
    assert not any("trial-2" in row.id for found in rows.values() for row in found)
    assert not tasks["train"] & (tasks["dev"] | tasks["test"]) and not tasks["dev"] & tasks["test"]
    assert task.template().instruction == "# Policy\n\nBe brief."


def test_an_id_of_another_form_is_refused(script):
    with pytest.raises(ValueError, match="does not name task and trial"):
        script.split_by_task([{**trajectory(1, 0), "id": "talk-1"}])


def test_a_folder_that_lacks_a_file_is_refused_by_name(script, tmp_path):
    (tmp_path / "tools.json").write_text("[]")
    with pytest.raises(ValueError, match=r"has no conversations.jsonl$"):
        script.convert(tmp_path, tmp_path / "made")
    assert not (tmp_path / "made").exists()
