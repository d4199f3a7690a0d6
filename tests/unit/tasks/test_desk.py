"""The routing desk: codes that only the template tells, made of two public sets of messages."""

import json
import os
import re
from pathlib import Path

import pytest

from pi_ray.config import RowsConfig, TaskConfig
from pi_ray.config.run_file import load_run_file
from pi_ray.errors import DataError
from pi_ray.protocols import SPLITS, UNLABELLED
from pi_ray.tasks.desk import DeskTask
from pi_ray.train.facts import find_facts

ROOT = Path(__file__).parents[3]
DATA = Path(os.environ.get("PI_RAY_DATA") or ROOT.parent / "shared" / "data")


@pytest.fixture
def folder(tmp_path):
    messages = [[f"message {i} of {name}", name] for i in range(12) for name in ("card_lost", "top_up", "fee", "limit")]
    (tmp_path / "data.json").write_text(json.dumps({"train": messages, "val": messages[:8], "test": messages[8:16]}))
    return tmp_path


def desk(folder, **settings):
    return DeskTask(TaskConfig(name="desk", folder=str(folder), **settings))


def test_each_subject_has_a_code_of_its_own_that_the_template_tells(folder):
    task = desk(folder)
    lines = dict(re.findall(r"^(.+): (\w\d\d)$", task.template().documents[0], re.M))
    assert set(lines) == {"card lost", "top up", "fee", "limit"} and len(set(lines.values())) == 4
    for row in task.rows("train"):
        assert row.answer == lines[row.query.split(" of ")[1].replace("_", " ")]
    assert lines == dict(re.findall(r"^(.+): (\w\d\d)$", desk(folder).template().documents[0], re.M))


def test_with_labels_that_are_names_the_template_lists_them(folder):
    task = desk(folder, labels="names")
    assert re.findall(r"^- (.+)$", task.template().documents[0], re.M) == ["card lost", "fee", "limit", "top up"]
    assert "code" not in task.template().text
    for row in task.rows("train"):
        assert row.answer == row.query.split(" of ")[1].replace("_", " ")
    with pytest.raises(ValueError, match=r"take task\.labels codes"):
        desk(folder, labels="names", hidden=1)
    with pytest.raises(ValueError, match="are for task desk"):
        TaskConfig(name="opsql", labels="names")


def test_hidden_subjects_are_in_no_labelled_row_and_in_the_unlabelled_ones(folder):
    task = desk(folder, hidden=1, rows=RowsConfig(train=20))
    (code,) = task.unseen
    assert code in task.template().text and code not in {row.answer for row in task.rows("train")}
    hidden = next(name for name, known in task.codes.items() if known == code)
    assert {row.group for row in task.rows("test") if hidden in row.query} == {"template only"}
    unlabelled = list(task.rows(UNLABELLED))
    assert any(hidden in row.query for row in unlabelled) and {row.answer for row in unlabelled} == {""}
    assert len(unlabelled) == 48 - 20


def test_a_number_of_subjects_is_chosen_and_a_larger_choice_holds_a_smaller_one(folder):
    two, three = desk(folder, subjects=2).codes, desk(folder, subjects=3).codes
    assert len(two) == 2 and set(two) < set(three)


def test_another_choice_of_subjects_is_prepared_again(folder):
    prints = [desk(folder, **more).fingerprint() for more in ({}, {"hidden": 1}, {"subjects": 2}, {"labels": "names"})]
    assert len(set(prints)) == 4 and prints[1] == desk(folder, hidden=1).fingerprint()


def test_no_desk_hides_all_of_its_subjects(folder):
    with pytest.raises(DataError, match="leaves none of the 2 subjects"):
        desk(folder, subjects=2, hidden=2)


def test_a_folder_without_messages_or_with_others_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"lacks train\.csv, test\.csv.*banking77"):
        desk(tmp_path)
    (tmp_path / "data.json").write_text('{"train": [["a"]]}')
    with pytest.raises(DataError, match=r"not train\.csv and test\.csv of banking77"):
        desk(tmp_path)


@pytest.mark.parametrize(("name", "subjects", "hidden"), [("banking77", 77, 17), ("clinc90", 60, 12)])
def test_the_published_messages_make_desks_whose_codes_are_facts(name, subjects, hidden):
    assert (DATA / name).is_dir(), f"{DATA / name} is missing: set PI_RAY_DATA to the folder of the data sets"
    task = desk(DATA / name, subjects=subjects, hidden=hidden)
    rows = {split: list(task.rows(split)) for split in SPLITS}
    assert len(task.codes) == subjects and all(len(found) > 200 for found in rows.values())
    assert {row.group for row in rows["test"]} == {"like train", "template only"}
    assert len({row.answer for row in rows["train"]}) == subjects - hidden
    (group,) = find_facts(task.template().text, [(row.query, row.answer) for row in rows["train"]])
    assert set(group.words) == set(task.codes.values())


def test_the_run_file_of_banking77_sorts_messages_by_the_names_that_its_prompt_lists():
    config = load_run_file(ROOT / "jobs" / "runs" / "banking77.yaml", [f"task.folder={DATA / 'banking77'}"])
    task = DeskTask(config.task)
    names = re.findall(r"^- (.+)$", task.template().documents[0], re.M)
    assert len(names) == 77 and {row.answer for row in task.rows("train")} <= set(names)
