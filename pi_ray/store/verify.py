"""Verification of an adapter folder, before it is published or served: a plain LoRA adapter and nothing else.

The folder may have been copied from elsewhere, so it is treated as hostile. Nothing in it is unpickled, imported or
run, names written in its files are compared and never opened, and sizes are bounded before anything is read.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import struct
from pathlib import Path
from typing import Any

from pi_ray.config import ModelConfig, PromptConfig
from pi_ray.errors import AdapterError
from pi_ray.run.artifact import MANIFEST, digest_file
from pi_ray.store.prompt_guard import PROMPT_FILE, prompt_record_error

LORA_TENSOR = re.compile(r"base_model\.model\.([\w.]+)\.lora_([AB])\.weight", re.ASCII)
WEIGHTS_FILE, CONFIG_FILE, CARD_FILE = "adapter_model.safetensors", "adapter_config.json", "pi_ray.json"
SUFFIXES = {".safetensors", ".json", ".md"}
FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
MAX_JSON_BYTES = 8 << 20
MAX_WEIGHT_BYTES = 8 << 30
MAX_RANK = 4096
MAX_TOKENS = 1 << 30
MAX_WORDING = 100_000  # characters of the prompt block
MAX_REPEATS = 4  # of the query or the answer in the wording of a prompt
CHUNK = 16_384  # elements; torch computes fewer than 32,768 in the calling thread alone
# Settings of adapter_config.json that serving understands; any other one must be empty, since peft would act on it
# (import a module, change base weights, run a regular expression over module names).
KNOWN_SETTINGS = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "peft_type", "task_type", "bias",
    "inference_mode", "init_lora_weights", "base_model_name_or_path", "revision", "peft_version", "megatron_core",
    "qalora_group_size",
}  # fmt: skip
ONLY_LORA = "only plain LoRA and rsLoRA on linear layers can be published and served (others can be evaluated)"
CARD_FIELDS = {
    "base": str, "prompt": dict, "template": str, "full_prompt_tokens": int | float,
    "query_prompt_tokens": int | float, "max_answer_tokens": int,
}  # fmt: skip


def verify_adapter(path: Path, base: ModelConfig | None = None) -> dict[str, Any]:
    """The card (pi_ray.json) of the adapter folder `path`, after every check. Raises AdapterError with the reason.

    With `base`, an adapter of any other base model is refused.
    """
    names = _check_listing(path)
    _check_hashes(path, names)
    rank = _check_config(read_json(path / CONFIG_FILE))
    card = read_json(path / CARD_FILE)
    _check_card(card, base)
    if PROMPT_FILE in names and (wrong := prompt_record_error(read_json(path / PROMPT_FILE))):
        raise AdapterError(f"{PROMPT_FILE}: {wrong}")
    _check_shapes(read_safetensors_header(path / WEIGHTS_FILE), rank)
    _check_finite(path / WEIGHTS_FILE)
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
    missing = {WEIGHTS_FILE, CONFIG_FILE, CARD_FILE, MANIFEST} - set(names)
    if missing:
        raise AdapterError(f"{', '.join(sorted(missing))} missing")
    return names


def _check_hashes(path: Path, names: list[str]) -> None:
    """Check that the manifest lists exactly the other files, with their sha256. Its names are never opened."""
    files = read_json(path / MANIFEST).get("files")
    if not isinstance(files, dict) or set(files) != set(names) - {MANIFEST}:
        raise AdapterError(f"{MANIFEST} does not list exactly the files of the folder")
    for name, recorded in files.items():
        expected = recorded.get("sha256") if isinstance(recorded, dict) else None
        found = digest_file(path / name)
        if found != expected:
            raise AdapterError(f"{name}: sha256 {found} differs from the recorded {str(expected)[:64]}")


def _check_config(config: dict[str, Any]) -> int:
    """Refuse everything that peft would do beyond plain LoRA. Returns the rank."""
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{CONFIG_FILE}: peft_type is {config.get('peft_type')!r}; {ONLY_LORA}")
    wanted = {"bias": "none", "init_lora_weights": True, "task_type": "CAUSAL_LM"}
    refused = [k for k, v in config.items() if (v and k not in KNOWN_SETTINGS) or (k in wanted and v != wanted[k])]
    if refused:
        raise AdapterError(f"{CONFIG_FILE}: {', '.join(sorted(refused)[:8])} set; {ONLY_LORA}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise AdapterError(f"{CONFIG_FILE}: r is not a number from 1 to {MAX_RANK}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise AdapterError(f"{CONFIG_FILE}: lora_alpha is not a number")
    return rank


def _check_card(card: dict[str, Any], base: ModelConfig | None) -> None:
    if card.get("gist"):
        baseline = "a baseline that can be evaluated ('pi-ray evaluate', 'pi-ray table') but not published or served"
        raise AdapterError(f"{CARD_FILE}: it was trained with gist tokens, {baseline}")
    wrong = [k for k, kind in CARD_FIELDS.items() if not isinstance(card.get(k), kind)]
    if wrong:
        raise AdapterError(f"{CARD_FILE}: {', '.join(wrong)} missing or of the wrong type")
    counts = ("full_prompt_tokens", "query_prompt_tokens", "max_answer_tokens")
    if not all(0 <= card[k] < MAX_TOKENS for k in counts) or card["max_answer_tokens"] < 1:
        raise AdapterError(f"{CARD_FILE}: {', '.join(counts)} are not counts of tokens, the last one at least 1")
    try:
        prompt = PromptConfig(**card["prompt"])
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{CARD_FILE}: the prompt block is not valid ({error.__class__.__name__})") from error
    repeats = max(text.count(part) for text in (prompt.query, prompt.example) for part in ("{query}", "{answer}"))
    if repeats > MAX_REPEATS or len(prompt.model_dump_json()) > MAX_WORDING:
        problem = f"multiplies the query or an answer, or is longer than {MAX_WORDING} characters"
        raise AdapterError(f"{CARD_FILE}: the prompt block {problem}")
    if base and (card["base"], card.get("revision", "")) != (base.base, base.revision):
        name = Path(card["base"]).name[:64]
        raise AdapterError(f"it was trained for another base model ({name}) than the served one")


def read_safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> {"dtype", "shape", "data_offsets"} of a safetensors file. Reads no tensor.

    Raises AdapterError where sizes in the header do not fit each other or the file.
    """
    size = path.stat().st_size
    with open(path, "rb") as f:
        length = struct.unpack("<Q", f.read(8).ljust(8, b"\0"))[0]
        if length > min(MAX_JSON_BYTES, size - 8):
            raise AdapterError(f"{path.name}: the header claims {length} bytes, the file has {size}")
        header = parse_json(f.read(length), path.name)
    header.pop("__metadata__", None)
    end = 0
    for name, tensor in header.items():
        if not isinstance(tensor, dict) or not {"dtype", "shape", "data_offsets"} <= set(tensor):
            raise AdapterError(f"{path.name}: {name[:80]!r} is not described")
        end += _tensor_bytes(name, tensor)
    if 8 + length + end != size:
        raise AdapterError(f"{path.name}: the tensors make {end} bytes, the file has {size - 8 - length} for them")
    return header


def _tensor_bytes(name: str, tensor: dict[str, Any]) -> int:
    """Bytes of one tensor, with which its offsets must agree; safetensors itself refuses gaps and overlaps."""
    shape, offsets = tensor["shape"], tensor["data_offsets"]
    if tensor["dtype"] not in FLOAT_BYTES:
        dtype, allowed = str(tensor["dtype"])[:16], ", ".join(FLOAT_BYTES)
        raise AdapterError(f"{WEIGHTS_FILE}: {name[:80]!r} has dtype {dtype}, expected one of {allowed}")
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 1 << 31 for n in shape)):
        raise AdapterError(f"{WEIGHTS_FILE}: {name[:80]!r} is not a matrix")
    count = shape[0] * shape[1] * FLOAT_BYTES[tensor["dtype"]]
    are_offsets = isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int for n in offsets)
    if not are_offsets or offsets[1] - offsets[0] != count:
        raise AdapterError(f"{WEIGHTS_FILE}: the offsets of {name[:80]!r} do not fit its shape")
    return count


def _check_shapes(header: dict[str, dict[str, Any]], rank: int) -> None:
    """Check that the tensors are LoRA pairs: A of shape (rank, in), B of shape (out, rank)."""
    pairs: dict[str, set[str]] = {}
    for name, tensor in header.items():
        match = LORA_TENSOR.fullmatch(name)
        if not match:
            raise AdapterError(f"{WEIGHTS_FILE}: {name[:80]!r} is not a LoRA matrix")
        found = tensor["shape"][0 if match[2] == "A" else 1]
        if found != rank:
            raise AdapterError(f"{WEIGHTS_FILE}: {name[:80]!r} has rank {found}, {CONFIG_FILE} says {rank}")
        pairs.setdefault(match[1], set()).add(match[2])
    if not pairs or any(pair != {"A", "B"} for pair in pairs.values()):
        raise AdapterError(f"{WEIGHTS_FILE}: LoRA matrices do not come in pairs of A and B")


def _check_finite(path: Path) -> None:
    """Check that no weight is NaN or infinite: in chunks, as OpenMP threads of this thread would slow decoding."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as f:
            for name in f.keys():  # noqa: SIM118 (not a dict)
                if not all(torch.isfinite(chunk).all() for chunk in f.get_tensor(name).flatten().split(CHUNK)):
                    raise AdapterError(f"{path.name}: {name!r} holds NaN or Inf")
    except SafetensorError as error:
        raise AdapterError(f"{path.name}: not readable as safetensors ({error})") from error


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
