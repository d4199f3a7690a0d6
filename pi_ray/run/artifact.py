"""Artifacts on disk: written under a temporary name, synced, renamed, hashed, and verified before use.

A folder artifact holds `manifest.json`:
    {"fingerprint": ..., "files": {path: {"sha256", "bytes"}}, "manifest_sha256": ..., ...extra}
It has its final name only when it is complete, so a reader never sees half of one.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, TypeVar

from pi_ray.errors import CorruptArtifactError, StorageError

MANIFEST = "manifest.json"
MANIFEST_HASH = "manifest_sha256"  # the key that holds the hash of the rest of the manifest
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.(tmp|old)")  # names that `temporary_path` gives
CORRUPT = ".corrupt"  # ending of artifacts that were found damaged
# Called with each file and artifact that this process has given its final name.
write_listeners: list[Callable[[Path], None]] = []
FULL = "the disk is full; free some space and give the same command again"
FORBIDDEN = "this user may not write there; mend its owner or permissions, or take another folder"
DISK_CURES = {
    errno.ENOSPC: FULL, errno.EDQUOT: FULL, errno.EACCES: FORBIDDEN, errno.EPERM: FORBIDDEN,
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), "a file stands where a folder is needed; take another folder"),
    errno.EROFS: "the disk is mounted read-only; mount it for writing, or take another folder",
}
AnyPath = TypeVar("AnyPath", bound=PurePath)


def digest(value: Any) -> str:
    """Hex sha256 of bytes, a string, or the canonical JSON of a value, so that equal values have equal hashes."""
    if not isinstance(value, bytes | str):
        value = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value).hexdigest()


def digest_file(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def temporary_path(path: AnyPath, ending: str = "tmp") -> AnyPath:
    """A hidden name beside `path` that no other writer takes."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.{ending}")


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def translate_disk_errors(path: Path) -> Iterator[None]:
    """Turn the errors of a full, read-only or foreign disk into a StorageError that names `path` and the cure."""
    try:
        yield
    except Exception as error:
        # safetensors and other Rust code give the error number in their text alone
        in_text = re.search(r"\(os error (\d+)\)", str(error))
        number = getattr(error, "errno", None) or (int(in_text[1]) if in_text else None)
        if number not in DISK_CURES:
            raise
        named = Path(os.fsdecode(getattr(error, "filename", None) or path))
        is_other = not named.is_relative_to(path.parent)  # a file that is read meanwhile, such as one to be copied
        what = f"{named}: cannot be read" if is_other else f"{path}: cannot be written"
        raise StorageError(f"{what} ({os.strerror(number)}): {DISK_CURES[number]}") from error


def write_atomic(path: Path, content: str | bytes, sync: bool = True) -> Path:
    """Write a file so that `path` is the old content or all of the new, even after a power cut. Raises StorageError.

    Without `sync` a power cut may damage it: that is for content with a hash that can be made again, such as a cache.
    """
    path = Path(path)
    tmp = temporary_path(path)
    with translate_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            tmp.write_bytes(content.encode() if isinstance(content, str) else content)
            if sync:
                _sync(tmp)
            os.replace(tmp, path)
            if sync:
                _sync(path.parent)
        finally:
            with suppress(OSError):
                tmp.unlink(missing_ok=True)
    notify_written(path)
    return path


def place_files(made: Path, folder: Path) -> list[Path]:
    """Sync the files of the folder `made`, on the same disk, and give them their names in `folder`. Returns these."""
    with translate_disk_errors(folder):
        placed = [folder / path.name for path in sorted(made.iterdir())]
        for path in placed:
            _sync(made / path.name)
            os.replace(made / path.name, path)
        _sync(folder)
    for path in placed:
        notify_written(path)
    return placed


@contextmanager
def staged(final: Path, **manifest: Any) -> Iterator[Path]:
    """Yield a temporary folder; on success write its manifest (with `manifest`), sync, and rename it to `final`.

    An older `final` is replaced only then, and stays as it was on any error. Raises StorageError.
    """
    tmp = temporary_path(final)
    with translate_disk_errors(final):
        tmp.mkdir(parents=True)
        try:
            yield tmp
            seal_folder(tmp, **manifest)
            commit_folder(tmp, final)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what writers that were killed left in `folder`. Only for its one writer."""
    for left in folder.glob(".*"):
        if TEMPORARY.fullmatch(left.name):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def commit_folder(tmp: Path, final: Path, notify: bool = True) -> None:
    """Give a sealed folder its final name beside it, in place of an older one."""
    old = temporary_path(final, "old")
    if final.exists():
        os.rename(final, old)
    os.rename(tmp, final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)
    if notify:
        notify_written(final)


def discard_folder(folder: Path) -> None:
    """Remove a folder. It loses its name first, so that nobody finds half of it under that."""
    gone = temporary_path(folder, "old")
    with suppress(OSError):
        os.rename(folder, gone)
        shutil.rmtree(gone)


def notify_written(path: Path) -> None:
    for listener in tuple(write_listeners):
        listener(path)


def seal_folder(folder: Path, **manifest: Any) -> dict[str, Any]:
    """Hash every file under `folder` into its manifest.json, which is written last and atomically."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        _sync(path)
        files[path.relative_to(folder).as_posix()] = {"sha256": digest_file(path), "bytes": path.stat().st_size}
    body = json.loads(json.dumps({**manifest, "files": files}))  # as it will be read
    body[MANIFEST_HASH] = digest(body)
    write_atomic(folder / MANIFEST, json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    return body


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of `folder`, or None when there is none. Raises CorruptArtifactError when it is no JSON object."""
    path, cure = Path(folder) / MANIFEST, "delete the folder to make it again"
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise CorruptArtifactError(f"{path}: not readable as JSON ({error}); {cure}") from error
    if not isinstance(manifest, dict):
        raise CorruptArtifactError(f"{path}: it is no JSON object; {cure}")
    return manifest


def leads_out(name: str) -> bool:
    """Whether a name that a manifest has for a file is of one outside its folder."""
    return PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts


def verify_artifact(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`, after a check of every file's hash. Raises CorruptArtifactError with both hashes."""
    path, manifest = Path(folder) / MANIFEST, read_manifest(folder)
    if manifest is None:
        raise CorruptArtifactError(f"{folder}: no {MANIFEST}; it is incomplete or not a pi-ray artifact")
    if not isinstance(manifest.get("files"), dict):
        raise CorruptArtifactError(f"{path}: it lists no files")
    found = digest({k: v for k, v in manifest.items() if k != MANIFEST_HASH})
    if (recorded := manifest.get(MANIFEST_HASH, found)) != found:
        raise CorruptArtifactError(f"{path}: sha256 {found} of its content differs from the recorded {recorded}")
    for name, recorded in manifest["files"].items():
        if leads_out(name):
            raise CorruptArtifactError(f"{Path(folder) / MANIFEST}: it names a file outside its folder, {name[:80]!r}")
        path = Path(folder) / name
        if not path.is_file():
            raise CorruptArtifactError(f"{path}: missing (manifest names it)")
        expected = recorded.get("sha256") if isinstance(recorded, dict) else None
        found = digest_file(path)
        if found != expected:
            raise CorruptArtifactError(f"{path}: sha256 {found} differs from the recorded {str(expected)[:64]}")
    return manifest


def set_aside(folder: Path, why: CorruptArtifactError, warn: Callable[[str], None]) -> None:
    """Rename a damaged artifact to NAME.corrupt, to be looked at, so that it is made again; `warn` gets a sentence."""
    corrupt = folder.with_name(folder.name + CORRUPT)
    shutil.rmtree(corrupt, ignore_errors=True)
    folder.rename(corrupt)
    warn(f"{folder.parent.name}/{folder.name} set aside as {corrupt.name}: {why}")


def set_aside_damaged(folder: Path, fingerprint: str, warn: Callable[[str], None]) -> None:
    """Verify an artifact that was made from this fingerprint, and set it aside where a file of it is damaged."""
    try:
        if is_current(folder, fingerprint):
            verify_artifact(folder)
    except CorruptArtifactError as error:
        set_aside(folder, error, warn)


def is_current(folder: Path, fingerprint: str) -> bool:
    """Whether `folder` is complete and was made from exactly this fingerprint, so that the step can be skipped."""
    return (read_manifest(folder) or {}).get("fingerprint") == fingerprint
