"""Artifacts: whole or not there, verified by hash, the old one kept when the new one fails."""

import errno
import json

import pytest

from pi_ray.errors import CorruptArtifactError, StorageError
from pi_ray.run.artifact import (
    MANIFEST,
    MANIFEST_HASH,
    digest_file,
    is_current,
    place_files,
    remove_leftovers,
    staged,
    verify_artifact,
    write_atomic,
)


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
        verify_artifact(tmp_path / "x")


@pytest.mark.parametrize("name", ["/", "/etc/hostname", "../beside.txt", "a/../../beside.txt"])
def test_a_manifest_that_names_a_file_outside_its_folder_is_refused_and_the_file_is_not_read(tmp_path, name):
    folder = tmp_path / "x"
    folder.mkdir()
    (tmp_path / "beside.txt").write_text("not its own")
    known = {"bytes": 11, "sha256": digest_file(tmp_path / "beside.txt")}
    (folder / MANIFEST).write_text(json.dumps({"files": {name: known}}))
    with pytest.raises(CorruptArtifactError, match=r"x/manifest.json: it names a file outside its folder, '"):
        verify_artifact(folder)


def test_half_a_manifest_is_an_error_not_a_crash(tmp_path):
    make(tmp_path / "x")
    (tmp_path / "x" / MANIFEST).write_text('{"files": {')
    with pytest.raises(CorruptArtifactError, match="not readable"):
        verify_artifact(tmp_path / "x")


def test_a_file_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    path = write_atomic(tmp_path / "f.json", json.dumps(1))
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("read-only")))
    with pytest.raises(OSError):
        write_atomic(path, json.dumps(2))
    assert json.loads(path.read_text()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "no space"), RuntimeError("I/O error: No space left on device (os error 28)")],
    ids=["python", "rust"],
)
def test_a_full_disk_is_an_error_with_its_cure_from_python_and_from_rust(tmp_path, error):
    with (
        pytest.raises(
            StorageError, match=r"x: cannot be written \(No space left on device\): the disk is full; free some space"
        ),
        staged(tmp_path / "x", fingerprint="g"),
    ):
        raise error
    assert not list(tmp_path.iterdir())


def test_a_file_where_a_folder_is_needed_is_an_error_with_its_cure(tmp_path):
    (tmp_path / "afile").write_text("x")
    for path in (tmp_path / "afile" / "x", tmp_path / "afile" / "deep" / "x"):
        with pytest.raises(StorageError, match="a file stands where a folder is needed; take another folder"):
            write_atomic(path, "")


def test_files_made_elsewhere_get_their_places_and_listeners_hear_of_them(tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr("pi_ray.run.artifact.write_listeners", [heard.append])
    made, folder = tmp_path / "made", tmp_path / "folder"
    for path in (made, folder):
        path.mkdir()
    for name in "ba":
        (made / name).write_text(name)
    assert place_files(made, folder) == heard == [folder / "a", folder / "b"]
    assert (folder / "b").read_text() == "b" and list(made.iterdir()) == []


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), staged(tmp_path / "x", fingerprint="g"):
        raise FileNotFoundError(errno.ENOENT, "not there")


def test_a_manifest_knows_its_own_hash_and_older_ones_without_it_are_read(tmp_path):
    make(tmp_path / "x")
    path = tmp_path / "x" / MANIFEST
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "fingerprint": "forged"}))
    with pytest.raises(CorruptArtifactError, match=r"manifest\.json: sha256 .* differs"):
        verify_artifact(tmp_path / "x")
    del manifest[MANIFEST_HASH]
    path.write_text(json.dumps(manifest))
    assert verify_artifact(tmp_path / "x")["fingerprint"] == "f"


def test_only_the_leftovers_of_killed_writers_are_removed(tmp_path):
    make(tmp_path / "x")
    for name in (f".x.{'0' * 32}.tmp", f".x.{'1' * 32}.old"):
        (tmp_path / name).mkdir()
    (tmp_path / ".keep").touch()
    remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".keep", "x"]
