"""Artefacts on disk: written under a temporary name, synced, renamed, hashed, and verified before use.

A folder artefact holds `manifest.json`: `{"fingerprint": ..., "files": {path: {"sha256", "bytes"}}, ...extra}`.
It exists under its final name only when complete, so a reader never sees half of one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pi_ray.errors import CorruptArtifactError

MANIFEST = "manifest.json"


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces, so that equal values give equal text (and equal hashes)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value: Any) -> str:
    """Hex sha256 of a string, bytes, or anything JSON can hold."""
    data = value if isinstance(value, bytes) else (value if isinstance(value, str) else canonical_json(value)).encode("utf-8", "surrogatepass")
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, content: str | bytes) -> Path:
    """Write one file so that `path` is either the old content or all of the new one, even after a power cut."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(tmp, "wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
        _sync(path.parent)
    finally:
        tmp.unlink(missing_ok=True)
    return path


@contextmanager
def staged(final: Path, **manifest: Any) -> Iterator[Path]:
    """Yield a temporary folder beside `final`; on success hash its files, write the manifest, sync, and rename it into place.

    An older `final` is replaced only then; on any error it stays as it was and the temporary folder is removed.
    Keyword arguments go into the manifest.
    """
    final = Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    tmp = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")
    tmp.mkdir()
    try:
        yield tmp
        seal(tmp, **manifest)
        commit(tmp, final)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def commit(tmp: Path, final: Path) -> None:
    """Give a sealed folder its final name beside it, in place of an older one."""
    old = final.with_name(f".{final.name}.{uuid.uuid4().hex}.old")
    if final.exists():
        os.rename(final, old)
    os.rename(tmp, final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def seal(folder: Path, **manifest: Any) -> dict[str, Any]:
    """Hash every file under `folder` into its manifest.json (which is written last and atomically)."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        _sync(path)
        files[path.relative_to(folder).as_posix()] = {"sha256": digest_file(path), "bytes": path.stat().st_size}
    body = {**manifest, "files": files}
    write_atomic(folder / MANIFEST, json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    return body


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of `folder`, or None when there is none. Raises CorruptArtifactError when it is not readable JSON."""
    path = Path(folder) / MANIFEST
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CorruptArtifactError(f"{path}: not readable as JSON ({error}); delete the folder to make it again") from error


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of `folder` after checking the hash of every file in it. Raises CorruptArtifactError naming file and both hashes."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise CorruptArtifactError(f"{folder}: no {MANIFEST}; it is incomplete or not a pi-ray artefact")
    for name, recorded in manifest["files"].items():
        path = Path(folder) / name
        if not path.is_file():
            raise CorruptArtifactError(f"{path}: missing (manifest names it)")
        found = digest_file(path)
        if found != recorded["sha256"]:
            raise CorruptArtifactError(f"{path}: sha256 {found} differs from the recorded {recorded['sha256']}")
    return manifest


def is_current(folder: Path, fingerprint: str) -> bool:
    """True when `folder` is complete and was made from exactly this fingerprint, so that the step can be skipped."""
    manifest = read_manifest(folder)
    return bool(manifest) and manifest.get("fingerprint") == fingerprint
