"""run.yaml and table files: read, override, check. Every mistake is named with file, line, key and closest match."""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from pi_ray.config import INPUTS, RunConfig, assign
from pi_ray.errors import ConfigError

M = TypeVar("M", bound=BaseModel)


def load(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read run.yaml, apply `section.key=value` overrides, check, and make its paths absolute.

    Raises ConfigError: unknown key (with the closest match), wrong type, impossible value; each with file, line and key.
    """
    path = Path(path)
    return parse(read(path), str(path), overrides, folder=path.resolve().parent)


def read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"{path}: no such file; 'pi-ray init FOLDER' writes one to start from") from None


def parse(text: str, source: str, overrides: Sequence[str] = (), folder: Path | None = None) -> RunConfig:
    """As `load`, from text; `source` is the name used in messages, `folder` what relative task paths start from."""
    return absolute(check(RunConfig, text, source, overrides), folder or Path.cwd())


def check(model: type[M], text: str, source: str, overrides: Sequence[str] = ()) -> M:
    """YAML text -> a model such as RunConfig, with its mistakes explained."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: expected labelled blocks such as 'task:' and 'train:', found {type(data).__name__}")
    lines = _lines(node) if node else {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"'{override}': an override is section.key=value, such as train.lr=0.0003")
        assign(data, key.strip(), yaml.safe_load(value) if value else "")
        lines[tuple(key.strip().split("."))] = 0
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e, source, lines, model) for e in error.errors())) from None


def absolute(config: RunConfig, folder: Path) -> RunConfig:
    """The config with every path absolute: those of `task` start from `folder`, run directory, store and keys file from the current one."""
    def at(base: Path, value: str) -> str:
        return str(base / Path(value).expanduser()) if value and "://" not in value else value

    task = config.task
    paths = {k: at(folder, getattr(task, k)) for k in INPUTS} if task.name != "opsql" else {}
    return config.model_copy(update={
        "task": task.model_copy(update=paths),
        "run_dir": at(Path.cwd(), config.run_dir or f"runs/{config.name}"),
        "store": at(Path.cwd(), config.store or "store"),
        "serve": config.serve.model_copy(update={"keys_file": at(Path.cwd(), config.serve.keys_file)}),
    })


def _lines(node: yaml.Node, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    found = {path: node.start_mark.line + 1}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            found.update(_lines(value, (*path, key.value)))
            found[(*path, key.value)] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            found.update(_lines(value, (*path, str(i))))
    return found


def _explain(error: dict[str, Any], source: str, lines: dict[tuple[str, ...], int], model: type[BaseModel]) -> str:
    path = tuple(str(p) for p in error["loc"])
    while path and path not in lines and len(path) > 1:  # pydantic appends union branches to the location
        path = path[:-1]
    line = lines.get(path)
    where = "command line" if line == 0 else f"{source}:{line}" if line else source
    key = ".".join(path) or "run.yaml"
    if error["type"] == "extra_forbidden":
        close = get_close_matches(path[-1], _known_keys(model, path[:-1]), n=1)
        return f"{where}: unknown key '{key}'" + (f"; did you mean '{'.'.join((*path[:-1], close[0]))}'?" if close else f"; known here: {', '.join(_known_keys(model, path[:-1]))}")
    if error["type"] == "missing":
        return f"{where}: key '{'.'.join(str(p) for p in error['loc'])}' is missing"
    message = error["msg"].removeprefix("Value error, ")
    given = "" if isinstance(error.get("input"), dict) or error["type"] == "value_error" else f" (given: {error.get('input')!r})"
    return f"{where}: {key}: {message}{given}"


def _known_keys(model: Any, path: Sequence[str]) -> list[str]:
    for part in path:
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            continue
        model = field.annotation
        while not isinstance(model, type) or isinstance(model, types.GenericAlias):
            model = typing.get_args(model)[0]
    return sorted(getattr(model, "model_fields", {}))
