"""The files of base models: GGUF files, those that packages carry in parts, and digests of large ones."""

import hashlib
import importlib
import sys
from pathlib import Path

import pytest

from pi_ray.config import RunConfig
from pi_ray.errors import MissingExtraError, ModelError
from pi_ray.models import base_files
from pi_ray.models.base_files import PACKAGED, Packaged, gguf_file, resolve_base
from pi_ray.run import artifact
from pi_ray.run.artifact import staged

DEQUANTISE = base_files._dequantised


@pytest.fixture
def made(monkeypatch, tmp_path):
    """The GGUF files that were dequantised, each into a folder that holds what the file held."""
    found = []

    def dequantise(gguf: Path, folder: Path) -> Path:
        if not folder.is_dir():
            found.append(gguf.read_bytes())
            with staged(folder, source_sha256="x") as tmp:
                (tmp / "weights").write_bytes(gguf.read_bytes())
        return folder

    monkeypatch.setenv("PI_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(base_files, "_dequantised", dequantise)
    return found


def test_a_gguf_file_of_the_same_name_and_size_with_other_weights_is_dequantised_anew(made, tmp_path):
    gguf = tmp_path / "model.gguf"
    for content in (b"weights A", b"weights B", b"weights A"):
        gguf.write_bytes(content)
        assert (Path(resolve_base(str(gguf))) / "weights").read_bytes() == content
    assert made == [b"weights A", b"weights B"], "each once"


def test_a_copy_of_another_gguf_file_is_not_taken_whatever_its_folder_is_called(tmp_path, monkeypatch):
    import transformers

    class Loaded(Exception):
        pass

    def load(*args, **options):
        raise Loaded

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    gguf, folder = tmp_path / "model.gguf", tmp_path / "copy"
    gguf.write_bytes(b"weights")
    with staged(folder, source="model.gguf", source_sha256="0" * 64) as tmp:
        (tmp / "weights").write_bytes(b"others")
    with pytest.raises(Loaded):
        DEQUANTISE.__wrapped__(gguf, folder)
    with staged(folder, source="model.gguf", source_sha256=base_files.file_digest(gguf)) as tmp:
        (tmp / "weights").write_bytes(b"its own")
    assert DEQUANTISE.__wrapped__(gguf, folder) == folder


def test_the_digest_of_a_large_file_is_kept_until_the_file_changes(tmp_path, monkeypatch):
    hashed = []
    monkeypatch.setenv("PI_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(base_files, "LARGE_FILE", 4)
    monkeypatch.setattr(base_files, "digest_file", lambda path: hashed.append(path.name) or artifact.digest_file(path))
    weights, small = tmp_path / "weights", tmp_path / "small"
    weights.write_bytes(b"large file")
    small.write_bytes(b"abc")
    first = base_files.file_digest(weights), base_files.file_digest(small)
    base_files._digest_of.cache_clear()  # as in another process
    assert (base_files.file_digest(weights), base_files.file_digest(small)) == first
    assert hashed == ["weights", "small", "small"]
    weights.write_bytes(b"other file")
    assert base_files.file_digest(weights) != first[0]


@pytest.fixture
def in_parts(tmp_path, monkeypatch):
    """A packaged model "two-parts", in two packages that must not be imported. Returns the folders of its parts."""
    folders = [tmp_path / "site" / f"model_part{number}" / "data" for number in (1, 2)]
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").write_text("raise AssertionError('imported')\n")
        (folder / f"model.gguf.part0{number}").write_bytes(b"GGUF part %d" % number)
    sha256 = hashlib.sha256(b"GGUF part 0GGUF part 1").hexdigest()
    packaged = Packaged(("model_part1", "model_part2"), "*.gguf.part*", "the-model", "someone/model", sha256)
    monkeypatch.setitem(PACKAGED, "two-parts", packaged)
    monkeypatch.setenv("PI_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield folders
    for name in packaged.packages:
        sys.modules.pop(name, None)


def test_a_model_in_parts_is_joined_once_and_again_where_the_joined_file_is_damaged(in_parts, tmp_path):
    whole = gguf_file("two-parts")
    assert whole == tmp_path / "cache" / "models" / "two-parts.gguf"
    assert whole.read_bytes() == b"GGUF part 0GGUF part 1"
    made = whole.stat().st_mtime_ns
    assert gguf_file("two-parts") == whole and whole.stat().st_mtime_ns == made
    whole.write_bytes(b"GGUF part 0GGUF part x")
    assert gguf_file("two-parts").read_bytes() == b"GGUF part 0GGUF part 1"


def test_parts_that_make_another_file_than_the_known_one_are_refused(in_parts, tmp_path):
    (in_parts[1] / "model.gguf.part01").write_bytes(b"GGUF part 9")
    with pytest.raises(ModelError, match="pip install --force-reinstall the-model"):
        gguf_file("two-parts")
    assert not (tmp_path / "cache" / "models" / "two-parts.gguf").exists()


def test_a_packaged_model_that_is_not_installed_whole_is_named_with_its_cure(in_parts, tmp_path):
    (in_parts[1].parent).rename(tmp_path / "elsewhere")
    importlib.invalidate_caches()
    cure = r"pip install the-model, or set model\.base to the hub id someone/model"
    with pytest.raises(MissingExtraError, match=cure):
        gguf_file("two-parts")


@pytest.mark.parametrize("key", ["model.base", "compress.model"])
def test_a_licence_of_its_own_must_be_accepted_by_name(key):
    config = RunConfig(name="t")
    for accepted in ("", "apache-2.0"):
        refused = rf"{key}: gemma3-270m.*ai\.google\.dev/gemma/terms.*accept_licence: gemma"
        with pytest.raises(ValueError, match=refused):
            config.replace(**{key: "gemma3-270m", "model.accept_licence": accepted})
    assert config.replace(**{key: "gemma3-270m", "model.accept_licence": "gemma"})
