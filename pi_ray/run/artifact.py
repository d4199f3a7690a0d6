"""Artefacts on disk: written under a temporary name, synced, renamed, hashed, and verified before use.

A folder artefact holds `manifest.json`: `{"fingerprint": ..., "files": {path: {"sha256", "bytes"}}, "manifest_sha256": ..., ...extra}`.
It exists under its final name only when complete, so a reader never sees half of one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pi_ray.errors import CorruptArtifactError, StorageError

MANIFEST = "manifest.json"
written: list[Callable[[Path], None]] = []  # who is told of each file and artefact that got its final name in this process (mirror.py)
OWN_HASH = "manifest_sha256"  # of the rest of the manifest
FULL, FORBIDDEN = "the disk is full; free some space and give the same command again", "this user may not write there; mend its owner or permissions, or take another folder"
CURES = {
    errno.ENOSPC: FULL, errno.EDQUOT: FULL, errno.EACCES: FORBIDDEN, errno.EPERM: FORBIDDEN,
    errno.EROFS: "the disk is mounted read-only; mount it for writing, or take another folder",
}  # fmt: skip


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


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what a full, read-only or foreign disk raises meanwhile into a StorageError that names `path` and the cure. Other errors pass."""
    try:
        yield
    except Exception as error:
        # safetensors and other Rust code say the number in their text alone
        found = getattr(error, "errno", None) or next((int(n) for n in re.findall(r"\(os error (\d+)\)", str(error))), None)
        if found not in CURES:
            raise
        raise StorageError(f"{path}: cannot be written ({os.strerror(found)}): {CURES[found]}") from error


def write_atomic(path: Path, content: str | bytes) -> Path:
    """Write one file so that `path` is either the old content or all of the new one, even after a power cut. Raises StorageError."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(tmp, "wb") as f:
                f.write(content.encode() if isinstance(content, str) else content)
                f.flush()
                os.fsync(f.fileno())
            os.replace(tmp, path)
            _sync(path.parent)
        finally:
            with suppress(OSError):
                tmp.unlink(missing_ok=True)
    tell_of(path)
    return path


@contextmanager
def staged(final: Path, **manifest: Any) -> Iterator[Path]:
    """Yield a temporary folder beside `final`; on success hash its files, write the manifest, sync, and rename it into place.

    An older `final` is replaced only then; on any error it stays as it was and the temporary folder is removed.
    Keyword arguments go into the manifest. Raises StorageError where the disk does not take it.
    """
    final = Path(final)
    tmp = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")
    with writing(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        tmp.mkdir()
        try:
            yield tmp
            seal(tmp, **manifest)
            commit(tmp, final)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what writers that were killed left in `folder`. Only for its one writer."""
    for left in folder.glob(".*"):
        if re.fullmatch(r"\..+\.[0-9a-f]{32}\.(tmp|old)", left.name):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def commit(tmp: Path, final: Path, tell: bool = True) -> None:
    """Give a sealed folder its final name beside it, in place of an older one. `tell`: it is news."""
    old = final.with_name(f".{final.name}.{uuid.uuid4().hex}.old")
    if final.exists():
        os.rename(final, old)
    os.rename(tmp, final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)
    if tell:
        tell_of(final)


def tell_of(path: Path) -> None:
    """A file or artefact has got its final name."""
    for listener in tuple(written):
        listener(path)


def seal(folder: Path, **manifest: Any) -> dict[str, Any]:
    """Hash every file under `folder` into its manifest.json (which is written last and atomically)."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        _sync(path)
        files[path.relative_to(folder).as_posix()] = {"sha256": digest_file(path), "bytes": path.stat().st_size}
    body = json.loads(json.dumps({**manifest, "files": files}))  # as it will be read
    body[OWN_HASH] = digest(body)
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
    _check_own_hash(Path(folder) / MANIFEST, manifest)
    for name, recorded in manifest["files"].items():
        path = Path(folder) / name
        if not path.is_file():
            raise CorruptArtifactError(f"{path}: missing (manifest names it)")
        found = digest_file(path)
        if found != recorded["sha256"]:
            raise CorruptArtifactError(f"{path}: sha256 {found} differs from the recorded {recorded['sha256']}")
    return manifest


def _check_own_hash(path: Path, manifest: Any) -> None:
    """Manifests of earlier versions have no hash of their own, but they name files."""
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise CorruptArtifactError(f"{path}: it lists no files")
    recorded, found = manifest.get(OWN_HASH), digest({k: v for k, v in manifest.items() if k != OWN_HASH})
    if recorded is not None and recorded != found:
        raise CorruptArtifactError(f"{path}: sha256 {found} of its content differs from the recorded {recorded}")


def is_current(folder: Path, fingerprint: str) -> bool:
    """True when `folder` is complete and was made from exactly this fingerprint, so that the step can be skipped."""
    manifest = read_manifest(folder)
    return bool(manifest) and manifest.get("fingerprint") == fingerprint


def read_parquet(path: Path, columns: list[str] | None = None, **options: Any) -> Any:
    """A table of plain columns, by pyarrow.parquet. Raises CorruptArtifactError for Arrow extension types: Ray has some whose values are pickles."""
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=columns, **options)
    check_plain(path, table.schema)
    return table


def check_plain(path: Path, schema: Any) -> None:
    """Raises CorruptArtifactError for Arrow extension types in a schema."""
    if odd := [field.name for field in schema if "extension<" in str(field.type)]:
        raise CorruptArtifactError(f"{path}: column {', '.join(odd)} has an Arrow extension type, which pi-ray never writes and does not read; delete the folder and prepare again")
