"""Artefacts: whole or not there, verified by hash, the old one kept when the new one fails."""

import json

import pytest

from pi_ray.artifact import MANIFEST, is_current, staged, verify, write_atomic
from pi_ray.errors import CorruptArtifactError


def make(folder, text="one", fingerprint="f"):
    with staged(folder, fingerprint=fingerprint) as tmp:
        (tmp / "a.txt").write_text(text)


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path):
    make(tmp_path / "x")
    make(tmp_path / "x", "two", "g")
    assert (tmp_path / "x" / "a.txt").read_text() == "two"
    assert is_current(tmp_path / "x", "g") and not is_current(tmp_path / "x", "f")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x"]


def test_an_error_leaves_the_old_folder_and_no_debris(tmp_path):
    make(tmp_path / "x")
    with pytest.raises(OSError), staged(tmp_path / "x", fingerprint="g") as tmp:
        (tmp / "a.txt").write_text("half")
        raise OSError("no space left on device")
    assert (tmp_path / "x" / "a.txt").read_text() == "one"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_is_named_with_the_file(tmp_path, damage):
    make(tmp_path / "x", "content")
    file = tmp_path / "x" / "a.txt"
    if damage == "delete":
        file.unlink()
    else:
        file.write_text("contenT" if damage == "flip" else "con")
    with pytest.raises(CorruptArtifactError, match=r"a\.txt"):
        verify(tmp_path / "x")


def test_half_a_manifest_is_an_error_not_a_crash(tmp_path):
    make(tmp_path / "x")
    (tmp_path / "x" / MANIFEST).write_text('{"files": {')
    with pytest.raises(CorruptArtifactError, match="not readable"):
        verify(tmp_path / "x")


def test_a_file_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    path = write_atomic(tmp_path / "f.json", json.dumps(1))
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("read-only")))
    with pytest.raises(OSError):
        write_atomic(path, json.dumps(2))
    assert json.loads(path.read_text()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]
