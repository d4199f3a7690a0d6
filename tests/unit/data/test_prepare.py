"""Preparation: what is whole is kept, and what is damaged is set aside and made again."""

import json

import pytest

from pi_ray.data import prepare
from pi_ray.run.artifact import MANIFEST, staged
from pi_ray.run.directory import RunDir
from pi_ray.train.batches import prepared_row_tokens
from tests.prepared import tiny_config

NAMES = ["rows", "templates", "0", "1", "2", "dev"]


@pytest.fixture
def run(tiny_model, tmp_path, monkeypatch):
    """A run whose artifacts are all there, and whose steps note their names; said: the lines of progress."""
    config = tiny_config(tiny_model, tmp_path / "run", **{"task.name": "opsql"})
    run = RunDir(config.root)
    run.settings, run.made, run.said = config, [], []
    monkeypatch.setattr(prepare, "prepare_fingerprint", lambda *_: "f")
    monkeypatch.setattr(prepare, "has_neighbours", lambda *_: True)

    def make(*names):
        for name in names:
            folder = run.root / name if name in ("rows", "templates") else run.phase(name)
            if not folder.exists():
                run.made.append(name)
                tokens = {"prefix": 1, "row_max": 2, "label_max": 3}
                with staged(folder, fingerprint="f", rows={}, tokens=tokens) as tmp:
                    (tmp / "part-00000.parquet").write_bytes(b"rows of " + name.encode())

    monkeypatch.setattr(prepare, "ingest", lambda *_: make("rows"))
    monkeypatch.setattr(prepare, "compress_templates", lambda *_: make("templates"))
    monkeypatch.setattr(prepare, "_tokenise_phases", lambda *_: make("0", "1", "2", "dev"))
    make(*NAMES)
    run.made.clear()
    return run


def test_a_whole_run_is_left_as_it_is(run):
    prepare.prepare(run.settings, run.said.append)
    assert run.made == [] and run.said == ["prepare: nothing to do, the run directory is up to date"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("file", ["part-00000.parquet", MANIFEST])
def test_a_damaged_artifact_is_set_aside_and_made_again(run, name, file):
    folder = run.root / name if name in ("rows", "templates") else run.phase(name)
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[:-9])
    prepare.prepare(run.settings, run.said.append)
    assert run.made == [name] and (folder / file).read_bytes() == whole
    assert (folder.with_name(f"{name}.corrupt") / file).read_bytes() == whole[:-9]
    assert f"{name} set aside as {name}.corrupt" in run.said[0]
    assert prepared_row_tokens(run.phases) > 0, "which damaged ones do not count for"
    prepare.prepare(run.settings, run.said.append)
    assert run.made == [name]


def test_a_file_that_is_missing_is_damage_too(run):
    (run.phase(1) / "part-00000.parquet").unlink()
    prepare.prepare(run.settings, run.said.append)
    assert run.made == ["1"] and json.loads((run.phase(1) / MANIFEST).read_bytes())["fingerprint"] == "f"
