"""Verification of an adapter folder, before it is published or served: a plain LoRA adapter and nothing else.

The folder may have been copied from elsewhere, so it is treated as hostile. Nothing in it is unpickled, imported or
run, names written in its files are compared and never opened, and sizes are bounded before anything is read.
"""

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from pi_ray.config import ModelConfig, PromptConfig
from pi_ray.errors import AdapterError, CorruptArtifactError
from pi_ray.evaluate.knowledge import KNOWLEDGE_FILE, Knowledge
from pi_ray.models import base_digest
from pi_ray.models.fused_experts import is_of_experts
from pi_ray.run.artifact import MANIFEST, verify_artifact
from pi_ray.run.directory import CARD_FILE
from pi_ray.store.prompt_guard import PROMPT_FILE, PromptRecord
from pi_ray.train.lora import MODULE

LORA_TENSOR = re.compile(r"base_model\.model\.([\w.]+)\.lora_([AB])\.weight", re.ASCII)
WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
SUFFIXES = {".safetensors", ".json", ".md"}
FLOAT_TYPES = ("F32", "F16", "BF16")
MAX_JSON_BYTES, MAX_WEIGHT_BYTES = 8 << 20, 8 << 30
MAX_FILES = 16  # of an adapter
FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
MAX_RANK, MAX_TOKENS = 4096, 1 << 30
MAX_WORDING = 100_000  # characters of the prompt block
MAX_TARGETS = 64  # target_parameters, with each of which every tensor's name is compared
MAX_REPEATS = 4  # of the query or the answer in the wording of a prompt
CHUNK = 16_384  # elements: torch takes fewer than 32,768 in the calling thread; its others would slow decoding
# Settings of adapter_config.json that serving understands; any other one must be empty, since peft would act on it
# (import a module, change base weights, run a regular expression over module names).
KNOWN_SETTINGS = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "peft_type", "task_type", "bias",
    "inference_mode", "init_lora_weights", "base_model_name_or_path", "revision", "peft_version", "megatron_core",
    "qalora_group_size", "target_parameters",
    "fan_in_fan_out",  # the last one tells of GPT-2's layers, which serving knows by themselves
}
ONLY_LORA = "only plain LoRA and rsLoRA can be published and served (others can be evaluated)"
T = TypeVar("T")
Tokens = Annotated[float, Field(ge=0, lt=MAX_TOKENS, strict=True)]


class LoraSettings(BaseModel):
    """Fields of adapter_config.json."""

    r: Annotated[int, Field(ge=1, le=MAX_RANK, strict=True)]
    lora_alpha: Annotated[float, Field(allow_inf_nan=False, strict=True)]
    target_parameters: Annotated[list[str], Field(max_length=MAX_TARGETS)] | None = None  # weights of fused experts


class AdapterCard(BaseModel):
    """The fields of pi_ray.json on which serving relies."""

    base: str
    prompt: PromptConfig
    template: str
    full_prompt_tokens: Tokens
    query_prompt_tokens: Tokens
    max_answer_tokens: Annotated[int, Field(ge=1, lt=MAX_TOKENS, strict=True)]


def verify_adapter(path: Path, base: ModelConfig | None = None) -> dict[str, Any]:
    """The card (pi_ray.json) of the adapter folder `path`, after every check. Raises AdapterError with the reason.

    With `base`, an adapter of any other base model is refused.
    """
    names = _check_listing(path)
    files = read_json(path / MANIFEST).get("files")
    if not isinstance(files, dict) or set(files) != set(names) - {MANIFEST}:
        raise AdapterError(f"{MANIFEST} does not list exactly the files of the folder")
    try:
        verify_artifact(path)
    except (CorruptArtifactError, RecursionError) as error:
        raise AdapterError(str(error).removeprefix(f"{path}/")) from error
    settings = _check_config(read_json(path / CONFIG_FILE))
    card = read_json(path / CARD_FILE)
    _check_card(card, base)
    if PROMPT_FILE in names:
        validate(TypeAdapter(PromptRecord), read_json(path / PROMPT_FILE), PROMPT_FILE)
    if KNOWLEDGE_FILE in names:
        validate(TypeAdapter(Knowledge), read_json(path / KNOWLEDGE_FILE), KNOWLEDGE_FILE)
    _check_weights(path / WEIGHTS_FILE, settings)
    return card


def _check_listing(path: Path) -> list[str]:
    """File names of the folder, which are plain files of the allowed kinds, none of them too large."""
    names = []
    for entry in os.scandir(path):
        info = entry.stat(follow_symlinks=False)
        if not stat.S_ISREG(info.st_mode):
            raise AdapterError(f"{entry.name} is not a plain file")
        if Path(entry.name).suffix not in SUFFIXES:
            allowed = f"only {', '.join(sorted(SUFFIXES))} files are allowed"
            raise AdapterError(f"{entry.name}: {allowed}; weights must be safetensors, never a pickle")
        if info.st_size > (MAX_WEIGHT_BYTES if entry.name == WEIGHTS_FILE else MAX_JSON_BYTES):
            raise AdapterError(f"{entry.name} is too large ({info.st_size} bytes)")
        names.append(entry.name)
    if missing := {WEIGHTS_FILE, CONFIG_FILE, CARD_FILE, MANIFEST} - set(names):
        raise AdapterError(f"{', '.join(sorted(missing))} missing")
    return names


def _check_config(config: dict[str, Any]) -> LoraSettings:
    """Refuse everything that peft would do beyond plain LoRA."""
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{CONFIG_FILE}: peft_type is {config.get('peft_type')!r}; {ONLY_LORA}")
    wanted = {"bias": "none", "init_lora_weights": True, "task_type": "CAUSAL_LM"}
    refused = [k for k, v in config.items() if (v and k not in KNOWN_SETTINGS) or (k in wanted and v != wanted[k])]
    if refused:
        raise AdapterError(f"{CONFIG_FILE}: {', '.join(sorted(refused)[:8])} set; {ONLY_LORA}")
    for key in ("target_modules", "target_parameters"):
        names = [] if config.get(key) is None and key == "target_parameters" else config.get(key)
        if not isinstance(names, list) or not all(isinstance(name, str) and MODULE.fullmatch(name) for name in names):
            problem = "peft would run anything else as a regular expression over module names; train again"
            raise AdapterError(f"{CONFIG_FILE}: {key} must be a list of names; {problem}")
    return validate(TypeAdapter(LoraSettings), config, CONFIG_FILE)


def _check_card(card: dict[str, Any], base: ModelConfig | None) -> None:
    if card.get("gist"):
        baseline = "a baseline that can be evaluated ('pi-ray evaluate', 'pi-ray table') but not published or served"
        raise AdapterError(f"{CARD_FILE}: it was trained with gist tokens, {baseline}")
    prompt = validate(TypeAdapter(AdapterCard), card, CARD_FILE).prompt
    repeats = max(text.count(part) for text in (prompt.query, prompt.example) for part in ("{query}", "{answer}"))
    if repeats > MAX_REPEATS or len(prompt.model_dump_json()) > MAX_WORDING:
        problem = f"multiplies the query or an answer, or is longer than {MAX_WORDING} characters"
        raise AdapterError(f"{CARD_FILE}: the prompt block {problem}")
    if base and (card["base"], card.get("revision", "")) != (base.base, base.revision):
        name = Path(card["base"]).name[:64]
        raise AdapterError(f"it was trained for another base model ({name}) than the served one")
    content = card.get("base_content")
    if base and content and content != base_digest(base):
        raise AdapterError("it was trained on other weights of its base model, which were replaced since; train again")


@contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """Open a safetensors file, which reads no tensor yet. Raises AdapterError where its sizes do not fit each other."""
    from safetensors import SafetensorError, safe_open

    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
    if length > MAX_JSON_BYTES:
        raise AdapterError(f"{path.name}: the header claims {length} bytes, more than {MAX_JSON_BYTES}")
    try:
        with safe_open(path, framework="pt") as weights:
            yield weights
    except SafetensorError as error:
        raise AdapterError(f"{path.name}: not readable as safetensors ({error})") from error


def _check_weights(path: Path, settings: LoraSettings) -> None:
    """Check that the tensors are finite LoRA matrices in pairs: A of shape (rank, in), B of shape (out, rank).

    Those of fused experts have the rank once for each expert.
    """
    import torch

    targets = settings.target_parameters or []
    pairs: dict[str, dict[str, int]] = {}
    with open_weights(path) as weights:
        for name in weights.keys():  # noqa: SIM118 (not a dict)
            where, match, tensor = f"{path.name}: {name[:80]!r}", LORA_TENSOR.fullmatch(name), weights.get_slice(name)
            shape, dtype = tensor.get_shape(), tensor.get_dtype()
            if not match:
                raise AdapterError(f"{where} is not a LoRA matrix")
            if dtype not in FLOAT_TYPES:
                raise AdapterError(f"{where} has dtype {dtype}, expected one of {', '.join(FLOAT_TYPES)}")
            if len(shape) != 2 or 0 in shape:
                raise AdapterError(f"{where} is not a matrix")
            found = shape[0 if match[2] == "A" else 1]
            if found != settings.r and (found % settings.r or not is_of_experts(match[1], targets)):
                raise AdapterError(f"{where} has rank {found}, {CONFIG_FILE} says {settings.r}")
            if not all(torch.isfinite(chunk).all() for chunk in weights.get_tensor(name).flatten().split(CHUNK)):
                raise AdapterError(f"{where} holds NaN or Inf")
            pairs.setdefault(match[1], {})[match[2]] = found
    if not pairs or any(pair.keys() != {"A", "B"} or len({*pair.values()}) > 1 for pair in pairs.values()):
        raise AdapterError(f"{WEIGHTS_FILE}: LoRA matrices do not come in pairs of A and B")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size. Raises AdapterError when it is anything else."""
    with open(path, "rb") as f:
        return parse_json(f.read(MAX_JSON_BYTES + 1), path.name)


def parse_json(data: bytes, name: str) -> dict[str, Any]:
    """As `read_json`, from the content of the file `name`."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{name}: not valid JSON") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{name}: expected a JSON object")
    return value


def validate(kind: TypeAdapter[T], data: Any, file: str) -> T:
    """`data` of a file as pydantic reads it. Raises AdapterError that names the first field that does not fit."""
    try:
        return kind.validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ": ".join(filter(None, (file, ".".join(map(str, first["loc"]))[:80])))
        raise AdapterError(f"{where}: {first['msg'][:200]}") from error


def check_listed_files(manifest: bytes) -> None:
    """Check names before any of them becomes a path, and sizes before anything is fetched."""
    files = parse_json(manifest, MANIFEST).get("files")
    if not isinstance(files, dict) or not 0 < len(files) <= MAX_FILES:
        raise AdapterError(f"{MANIFEST} does not list the files of an adapter")
    for name, recorded in files.items():
        if not FILE.fullmatch(name) or name == MANIFEST or Path(name).suffix not in SUFFIXES:
            problem = "names a file that no adapter has; weights must be safetensors, never a pickle"
            raise AdapterError(f"{MANIFEST} {problem}")
        recorded = recorded if isinstance(recorded, dict) else {}
        size, limit = recorded.get("bytes"), MAX_WEIGHT_BYTES if name == WEIGHTS_FILE else MAX_JSON_BYTES
        if not isinstance(recorded.get("sha256"), str) or type(size) is not int or not 0 <= size <= limit:
            raise AdapterError(f"{name} is too large, or {MANIFEST} gives no size and hash")
