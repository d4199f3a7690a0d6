"""Base models: `model.base` -> tokenizer, config and weights. Their files are found by base_files.py."""

from __future__ import annotations

import ctypes
import importlib.util
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi_ray.errors import ConfigError, MissingExtraError, ModelError
from pi_ray.models.base_files import PACKAGED, file_digest, gguf_file, resolve_base
from pi_ray.models.device import has_bfloat16
from pi_ray.run.artifact import digest

if TYPE_CHECKING:
    import torch

    from pi_ray.config import ModelConfig, RunConfig

# Tokens of context where a config names none: recurrent models have no end, but were trained on some thousand tokens.
NO_LIMIT = 8192
SMALLEST_BFLOAT16 = 256  # hidden size from which a CPU is faster in bfloat16
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, LARGEST_KEPT = -1, -3, 32 << 20  # of malloc.h, with the most that glibc takes
MODEL_FREE = ("none", "generation")  # compressors that load no model here
MODEL_FILES = {".safetensors", ".bin", ".json", ".txt", ".model", ".jinja"}  # endings of weights, settings, tokenizers


def base_digest(config: ModelConfig) -> str:
    """A hash of the base model's files, whatever it is called: of their sha256, or its commit on the hub.

    "" for a hub id without a model, which a closed one's tokenizer may have. Raises ModelError for a missing folder.
    """
    if gguf := gguf_file(config.base):
        return file_digest(gguf)
    folder = Path(resolve_base(config.base))
    if folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.suffix in MODEL_FILES)
        return digest({path.name: file_digest(path) for path in files})
    return _hub_commit(config)


def preparation_digest(config: RunConfig) -> str:
    """The hash of the base model's files, and of those of the compressors' and the encoder's where these are a folder
    or a .gguf file of the user's, which may be replaced. Raises as `base_digest`.
    """
    base, compress = base_digest(config.model), config.compress
    scorers = [c.model for c in (compress.for_instruction, compress.for_documents) if c.name not in MODEL_FREE]
    encoder = [config.retrieve.encoder_model] if config.retrieve.encoder == "sentence-transformers" else []
    found: dict[str, str] = {}
    for name in {*scorers, *encoder} - {*PACKAGED, config.model.base, ""}:
        path = Path(name).expanduser()
        files = [path] if path.suffix == ".gguf" and path.is_file() else sorted(path.rglob("*"))
        if known := [[str(f.relative_to(path)), file_digest(f)] for f in files if f.suffix in {*MODEL_FILES, ".gguf"}]:
            found[name] = digest(known)
    return digest([base, found]) if found else base


@cache
def _hub_commit(config: ModelConfig) -> str:
    """The commit of a model on the hub, which is asked once in a process; "" where there is none."""
    with suppress(ModelError):
        return getattr(load_model_config(config), "_commit_hash", None) or ""
    return ""


def load_tokenizer(config: ModelConfig) -> Any:
    """The base model's tokenizer. Raises ModelError if it cannot be loaded."""
    from transformers import AutoTokenizer

    return _from_pretrained(AutoTokenizer, config)


def line_break_ids(tokenizer: Any) -> frozenset[int]:
    """The tokens whose text has a line break."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return frozenset(i for i, text in enumerate(texts) if "\n" in text)


def load_model_config(config: ModelConfig) -> Any:
    """The base model's transformers config. Raises ModelError if it cannot be loaded."""
    from transformers import AutoConfig

    return _from_pretrained(AutoConfig, config)


def context_length(config: ModelConfig) -> int:
    """Tokens that the base model can attend to; NO_LIMIT where its config does not say."""
    return known_context_length(config) or NO_LIMIT


def known_context_length(config: ModelConfig) -> int | None:
    """Tokens that the base model can attend to by its config; None where it does not say."""
    found = load_model_config(config).get_text_config()
    names = ("max_position_embeddings", "seq_length", "max_seq_len")
    return next((length for name in names if (length := getattr(found, name, None))), None)


def model_dtype(config: ModelConfig, device: str = "cpu") -> Any:
    """The torch dtype of the base model's weights, unless set: bfloat16 on GPUs and CPUs that multiply in it.

    Raises ConfigError for bfloat16 on a GPU that does not.
    """
    import torch

    if config.dtype == "bfloat16" and not has_bfloat16(device):
        raise ConfigError("model.dtype: bfloat16 needs macOS 14 on Apple's GPUs; take float32, or auto")
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    gains = _gains_by_bfloat16(config) if device == "cpu" else has_bfloat16(device)
    return torch.bfloat16 if gains else torch.float32


def _gains_by_bfloat16(config: ModelConfig) -> bool:
    """Whether a CPU multiplies faster in bfloat16, and the model is large enough for that to matter.

    On an Intel with avx512_bf16 and without AMX, as guests of virtual machines may see it, updates take 1.5 times as
    long as in float32 (`python -m tests.bench.dtype`).
    """
    import torch

    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not tell
    doubles = capabilities.get("avx512_bf16") and "AMD" in str(capabilities.get("cpu_name"))
    if not (capabilities.get("amx_bf16") or doubles):
        return False
    return getattr(load_model_config(config).get_text_config(), "hidden_size", 0) >= SMALLEST_BFLOAT16


def load_model(config: ModelConfig, device: str = "cpu", spread: bool = False, **options: Any) -> Any:
    """The base model in eval mode on `device`, or with `spread` over all GPUs of this process, some layers on each.

    Raises ModelError; for quantisation ConfigError or MissingExtraError.
    """
    from transformers import AutoModelForCausalLM

    if device == "cpu":
        keep_freed_memory()
    dtype = model_dtype(config, device)
    options |= _four_bit(device, dtype) if config.quantize else {}
    options |= {"device_map": "balanced"} if spread else {}
    model = _from_pretrained(AutoModelForCausalLM, config, dtype=dtype, **options)
    return (model if config.quantize or spread else model.to(device)).eval()


@cache
def keep_freed_memory() -> None:
    """Have glibc keep up to 2 GiB of what this process has freed, for the tensors of the next forward pass.

    Otherwise it goes back to the system after each one and comes again page by page, zeroed: of an update on a CPU
    that is a tenth. Other C libraries are left as they are.
    """
    if os.name == "posix" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)


@cache
def cache_argument(model_class: Any) -> str:
    """The name of a model's argument for its KV cache, which transformers renamed; the old one warns."""
    return "cache" if "cache" in inspect.signature(model_class.forward).parameters else "past_key_values"


def last_logits_index(count: int, device: Any = "cpu") -> torch.Tensor:
    """`logits_to_keep` of a forward pass that needs logits of the last `count` tokens only.

    An index, not a number: transformers slices for a number, and torch then copies the output layer for every row in
    bfloat16 (16 rows of a 135M model on one CPU thread: 2.4 s against 7 ms).
    """
    import torch

    return torch.arange(-count, 0, device=device)


def _four_bit(device: str, dtype: Any) -> dict[str, Any]:
    """QLoRA's setting (Dettmers et al. 2023): NF4 with double quantisation, computed in `dtype`."""
    if device in ("cpu", "mps"):
        raise ConfigError("model.quantize: 4bit needs a GPU with CUDA, and there is none here; leave it out")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError("model.quantize: 4bit needs bitsandbytes: pip install 'pi-ray[quantize]'")
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def _from_pretrained(auto: Any, config: ModelConfig, **options: Any) -> Any:
    kinds = f"a hub id that this machine can reach, a local folder, or one of {', '.join(PACKAGED)}"
    with name_load_errors(f"model '{config.base}'", f". Give {kinds}"):
        base, revision = resolve_base(config.base), config.revision or "main"
        return auto.from_pretrained(base, revision=revision, trust_remote_code=False, **options)


@contextmanager
def name_load_errors(what: str, cure: str = "") -> Iterator[None]:
    """Load a model without a progress bar. Raises ModelError that `what` cannot be loaded, with the reason."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError) as error:
        raise ModelError(f"{what} cannot be loaded: {str(error).strip().splitlines()[0]}{cure}") from error


def base_name(base: str) -> str:
    """The base model's name for clients: the hub id or packaged name, or the last part of a folder or file."""
    return Path(base).name.removesuffix(".gguf") if base.startswith(("/", ".", "~")) else base
