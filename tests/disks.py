"""Small disks that tests can fill."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest


@pytest.fixture
def small_disk(tmp_path: Path):
    """A folder on a disk of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m,mode=755", "none", folder], capture_output=True
    ).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path, leave: int) -> Path:
    """Fill the disk but for `leave` bytes. Returns the file to delete."""
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    (folder / "ballast").write_bytes(b"\0" * (free - leave))
    return folder / "ballast"


def leftovers(folder: Path) -> list[Path]:
    """Temporary files of writers that were stopped."""
    return [p for p in folder.rglob("*") if p.name.endswith((".tmp", ".old"))]
