"""`pi-ray init FOLDER`: copies the small task in new_task/, which runs as it is, for a user to fill in."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from pi_ray.errors import ConfigError
from pi_ray.run.artifact import write_atomic


def write_task(folder: Path) -> list[Path]:
    """Write run.yaml, template.md and three files of rows into `folder`, and return their paths.

    Raises ConfigError, and writes nothing, if one of them is already there.
    """
    folder = Path(folder)
    task = files("pi_ray.cli") / "new_task"
    contents = {file.name: file.read_text(encoding="utf-8") for file in task.iterdir() if file.is_file()}
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: not a folder; give the name of a new or empty one")
    if existing := sorted(name for name in contents if (folder / name).exists()):
        names = ", ".join(existing)
        raise ConfigError(f"{folder}: {names} already there, nothing was overwritten; give the name of a new folder")
    return [write_atomic(folder / name, text) for name, text in contents.items()]
