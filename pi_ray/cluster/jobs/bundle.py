"""The job bundle that travels to a cluster: the run file, the inputs that it names by relative path, and no secret."""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from pi_ray.config import RunConfig, dump_config
from pi_ray.config.run_file import expand_home
from pi_ray.errors import ConfigError
from pi_ray.models.base_files import PACKAGED
from pi_ray.run.artifact import digest, digest_file

FOLDER = "inputs"
LIMIT = 90 << 20  # bytes; the Jobs API takes no upload above 100 MiB
SECRET_KEY = re.compile(r"(^|[._])(api_?key|token|secret|password|passwd|credentials?)$", re.I)
SECRET_NAMES = {"cluster.kubernetes.secret"}  # keys that take a secret's name, which is none itself
SECRET_VALUE = re.compile(
    r"\b(pr-[\w-]{43}|sk-[\w-]{16,}|hf_\w{16,}|gh[pousr]_\w{16,}|AKIA[A-Z0-9]{12,}|AIza[\w-]{30,})"
)
SECRET_VARIABLE = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)$")


def gather_inputs(config: RunConfig, folder: Path) -> tuple[RunConfig, dict[str, Path]]:
    """(the config with its inputs named as in the bundle, name in the bundle -> file).

    Inputs are what `task` names by a path relative to `folder`. Each gets the name of its key, such as train.jsonl;
    optional ones that do not exist keep theirs. Raises ConfigError above what the Jobs API takes.
    """
    names: dict[str, str] = {}
    found: dict[str, Path] = {}
    for key, value in config.task.inputs.items():
        path = expand_home(value)
        if value and not path.is_absolute() and (source := folder / path).exists():
            _refuse_links(source, folder)
            name = f"{key}{source.suffix}" if source.is_file() else key
            names[f"task.{key}"] = f"{FOLDER}/{name}"
            found |= files_of(name, source)
    size = sum(path.stat().st_size for path in found.values())
    if size > LIMIT:
        largest = max(found.values(), key=lambda path: path.stat().st_size)
        sizes = f"{size / (1 << 20):.0f} MiB (most of it {largest}), and a job takes {LIMIT >> 20} MiB along"
        cure = "put large data on storage that the cluster sees, and name it by its absolute path there"
        raise ConfigError(f"what run.yaml names by relative path is {sizes}: {cure}")
    return config.replace(**names), found


def files_of(name: str, source: Path) -> dict[str, Path]:
    """Name in the bundle -> file: a file, or a folder's without hidden ones (.git, Ray's ignore files) and caches.

    Raises ConfigError for a symbolic link that leads out of the folder, or to a folder.
    """
    if source.is_file():
        return {name: source}
    paths = (path for path in sorted(source.rglob("*")) if path.is_file() or (path.is_symlink() and path.is_dir()))
    inside = [path.relative_to(source) for path in paths]
    seen = [p for p in inside if not any(part.startswith(".") or part == "__pycache__" for part in p.parts)]
    for path in seen:
        _refuse_links(source / path, source)
        if (source / path).is_dir():
            raise ConfigError(f"{source / path}: a job takes no linked folder along; put the folder itself there")
    return {f"{name}/{path.as_posix()}": source / path for path in seen}


def _refuse_links(path: Path, folder: Path) -> None:
    """Raise ConfigError where `path` leads out of `folder` by a symbolic link: what is there was not asked for."""
    plain, real, inside = (Path(os.path.realpath(folder), path.relative_to(folder)), path.resolve(), folder.resolve())
    if real != Path(os.path.normpath(plain)) and not real.is_relative_to(inside):
        cure = "put the file itself there, or name where it lies in run.yaml"
        raise ConfigError(f"{path}: a symbolic link leads out of {folder}, and a job takes along what is in it; {cure}")


def copy_files(found: dict[str, Path], target: Path) -> None:
    for name, source in found.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target / name)


def bundle_fingerprint(found: dict[str, Path]) -> str:
    """Hash of the names and contents of the files of `gather_inputs`."""
    return digest({name: digest_file(path) for name, path in found.items()})


def write_bundle(config: RunConfig, folder: Path, target: Path) -> str:
    """Write run.yaml and the inputs into `target`. Returns the hash of both, which tells equal submissions."""
    settings, found = gather_inputs(config, folder)
    copy_files(found, target / FOLDER)
    (target / "run.yaml").write_text(dump_config(settings), encoding="utf-8")
    return digest([settings.model_dump(mode="json"), bundle_fingerprint(found)])


def refuse_secrets(overrides: Sequence[str], config: RunConfig | None = None) -> None:
    """Raise ConfigError for what looks like a secret. Overrides are checked alone first: later messages show them."""
    secrets = {value for name, value in os.environ.items() if SECRET_VARIABLE.search(name) and len(value) >= 8}
    given = [override.partition("=")[::2] for override in overrides]
    settings = [*given, *(_texts(config.model_dump(mode="json")) if config else ())]
    by_name = [key for key, _ in given if SECRET_KEY.search(key) and key not in SECRET_NAMES]
    by_value = [k for k, value in settings if SECRET_VALUE.search(value) or any(secret in value for secret in secrets)]
    for key in by_name + by_value:
        cure = "put it into the environment of the cluster's nodes, where every job finds it"
        raise ConfigError(f"'{key}' looks like a secret, and all who use the cluster can read a job's settings: {cure}")


def refuse_local_models(config: RunConfig) -> None:
    """Raise ConfigError for a base model that is a relative folder: weights do not travel with a job."""
    for key in ("model.base", "compress.model", "retrieve.encoder_model"):
        name = attrgetter(key)(config)
        if name not in PACKAGED and not Path(name).is_absolute() and not name.startswith("~") and Path(name).exists():
            cure = "give a hub id, a packaged name, or an absolute path that every node of the cluster can read"
            raise ConfigError(f"{key}: {name} lies on this machine, and weights do not travel with a job; {cure}")


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, text) for every text in a config."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, key)
    elif isinstance(value, str):
        yield key, value
