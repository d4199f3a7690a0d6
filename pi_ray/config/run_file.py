"""Reading run files and table files: overrides, checks, paths. A mistake is named with file, line, key and cure."""

import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from pi_ray.config import INPUTS, RunConfig, set_key
from pi_ray.errors import ConfigError

DOTTED_KEY = re.compile(r"[a-z_]+(?:\.[a-z_]+)+")
MAX_KEYS = 10_000  # of a run file, aliases resolved
M = TypeVar("M", bound=BaseModel)
RENAMED_KEYS = {"train.border": "train.phase_transition", "train.start": "train.init_adapter"}  # old -> new


def load_run_file(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read run.yaml, apply `section.key=value` overrides, check it (ConfigError), and make its paths absolute."""
    path = Path(path)
    return parse_run_file(read_run_file(path), str(path), overrides, folder=path.resolve().parent)


def read_run_file(path: Path) -> str:
    """The file's text. Raises ConfigError if there is none, or it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from None
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise ConfigError(f"{path}: no such file; 'pi-ray init FOLDER' writes one to start from") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); mend that, or name another file") from None


def parse_run_file(text: str, source: str, overrides: Sequence[str] = (), folder: Path | None = None) -> RunConfig:
    """As `load_run_file`, from text: messages name `source`; relative task paths start from `folder` or here."""
    return make_paths_absolute(validate_yaml(RunConfig, text, source, overrides), folder or Path.cwd())


def validate_yaml(model: type[M], text: str, source: str, overrides: Sequence[str] = ()) -> M:
    """YAML text -> an instance of `model`, such as RunConfig. Raises ConfigError, one line for each mistake."""
    with _explain_yaml(source):
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        lines = _line_numbers(node) if node else {}
        data = yaml.safe_load(text) or {}
    if not isinstance(data, dict):
        found = type(data).__name__
        raise ConfigError(f"{source}: expected labelled blocks such as 'task:' and 'train:', found {found}")
    places = {path: f"{source}:{line}" for path, line in lines.items()}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"'{override}': an override is section.key=value, such as train.lr=0.0003")
        with _explain_yaml(f"'{override}'"):
            set_key(data, key.strip(), yaml.safe_load(value) if value else "")
        path = tuple(key.strip().split("."))
        for depth in range(1, len(path)):  # a block that only the command line names
            places.setdefault(path[:depth], "command line")
        places[path] = "command line"
    if renamed := [
        f"{place}: key '{old}' is now called '{new}'"
        for old, new in RENAMED_KEYS.items()
        for path, place in places.items()
        if old == ".".join(path) or path[-1:] == (old,)  # nested, or dotted as under `set` of a table file
    ]:
        raise ConfigError("\n".join(renamed))
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e, source, places, model) for e in error.errors())) from None


def make_paths_absolute(config: RunConfig, folder: Path) -> RunConfig:
    """Resolve paths: those of `task` from `folder`; run directory, store and keys file from the current folder.

    Raises ConfigError for a ~user that is unknown here, and where a file stands in place of the run directory.
    """

    def resolve(base: Path, value: str) -> str:
        return str(base / expand_home(value)) if value and "://" not in value else value

    task, here = config.task, Path.cwd()
    for name in (config.model.base, config.compress.model, config.retrieve.encoder_model):
        expand_home(name)
    root = Path(resolve(here, config.run_dir or f"runs/{config.name}"))
    if wrong := next((path for path in (root, *root.parents) if path.is_file()), None):
        raise ConfigError(f"run_dir {root}: {wrong} is a file, and a run directory is a folder; name another one")
    paths = {key: resolve(folder, getattr(task, key)) for key in INPUTS} if task.name != "opsql" else {}
    metric = tuple(m.model_copy(update={"file": resolve(folder, m.file)}) for m in task.metric)
    return config.model_copy(update={
        "task": task.model_copy(update={**paths, "metric": metric}),
        "run_dir": str(root),
        "store": resolve(here, config.store or "store"),
        "serve": config.serve.model_copy(update={
            "keys_file": resolve(here, config.serve.keys_file), "usage_dir": resolve(here, config.serve.usage_dir),
        }),
    })


def expand_home(value: str) -> Path:
    """The path with its ~ or ~user. Raises ConfigError for a user who is unknown here."""
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise ConfigError(f"{value}: no such user, or no home, on this machine; write the path in full") from None


@contextmanager
def _explain_yaml(source: str) -> Iterator[None]:
    """Turn what the YAML parser raises into a ConfigError that names `source` and the line."""
    try:
        yield
    except RecursionError:
        raise ConfigError(f"{source}: not valid YAML for a run: its blocks are nested without end") from None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark and mark.line else source
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where}: not valid YAML: {reason}") from None


def _line_numbers(node: yaml.Node, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    """Path of each key, such as ("train", "lr") -> its line in the file, from 1.

    Raises MarkedYAMLError for a key that is there twice, ValueError where aliases make too many.
    """
    found = {path: node.start_mark.line + 1}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if first := found.get((*path, str(key.value))):
                lines = f"in lines {first} and {key.start_mark.line + 1}; keep one of them"
                problem = f"key '{'.'.join((*path, str(key.value)))}' is there twice, {lines}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            found.update(_line_numbers(value, (*path, str(key.value))))
            found[(*path, str(key.value))] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            found.update(_line_numbers(value, (*path, str(i))))
    if len(found) > MAX_KEYS:
        raise ValueError(f"aliases make more than {MAX_KEYS} keys of it")
    return found


def _explain(error: Mapping[str, Any], source: str, places: dict[tuple[str, ...], str], model: type[BaseModel]) -> str:
    """One of pydantic's mistakes in words; for an unknown key also the closest one, else all keys of its block."""
    path = whole = tuple(str(part) for part in error["loc"])
    unnumbered = tuple(part for part in path if not part.isdecimal())
    if unnumbered and unnumbered in places:  # a list's only entry, alone
        path = unnumbered
    while len(path) > 1 and path not in places:  # pydantic appends union branches to the location
        path = path[:-1]
    where, key = places.get(path, source), ".".join(path) or "run.yaml"
    if error["type"] == "missing":
        return f"{where}: key '{'.'.join(whole)}' is missing"
    if error["type"] == "extra_forbidden":
        known = _known_keys(model, path[:-1])
        close = get_close_matches(path[-1], known, n=1)
        hint = f"did you mean '{'.'.join((*path[:-1], *close))}'?" if close else f"known here: {', '.join(known)}"
        return f"{where}: unknown key '{key}'; {hint}"
    message, value = error["msg"].removeprefix("Value error, "), error.get("input")
    given = "" if isinstance(value, dict) or error["type"] == "value_error" else f" (given: {value!r})"
    if not path:  # of keys in several blocks: at the first one that is named and set
        named = (tuple(word.split(".")) for word in DOTTED_KEY.findall(message))
        where = next((places[keys] for keys in named if keys in places), source)
        return f"{where}: {message}"
    return f"{where}: {key}: {message}{given}"


def _known_keys(model: Any, path: Sequence[str]) -> list[str]:
    """The keys of the block at `path` below `model`."""
    for part in path:
        if part in getattr(model, "model_fields", {}):  # else a position in a list
            model = model.model_fields[part].annotation
            while options := typing.get_args(model):
                model = options[0]
    return sorted(getattr(model, "model_fields", {}))
