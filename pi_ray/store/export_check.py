"""Whether an export computes what base and adapter do: it is loaded by its own runtime, and its logits are compared."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from pi_ray.config import ModelConfig, PromptConfig
from pi_ray.errors import AdapterError
from pi_ray.models import load_model, load_tokenizer
from pi_ray.models.base_files import gguf_file, resolve_base
from pi_ray.prompt import PromptEncoder
from pi_ray.store.adapters import Adapter
from pi_ray.store.gguf_adapter import GGUF_ADAPTER
from pi_ray.store.llama_cpp import next_token_logprobs
from pi_ray.store.mlx_adapter import MLX_ADAPTER, mlx_logits
from pi_ray.store.verify import WEIGHTS_FILE

QUERIES = ("What is the status?", "Please list all of them, newest first.", "Why?")  # on which logits are compared
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}  # of their spread
MOST_NATS = 0.5  # a log probability may differ by in llama.cpp, which rounds what it multiplies with quantised weights


@torch.inference_mode()
def check_export(adapter: Adapter, model: ModelConfig, folder: Path) -> str:
    """Compare, and say in a sentence what was compared. Raises AdapterError for a difference that is no rounding."""
    from peft import PeftModel

    lora = folder / GGUF_ADAPTER if (folder / GGUF_ADAPTER).is_file() else None
    mlx, base = (folder / MLX_ADAPTER).is_file(), Path(resolve_base(model.base))
    if lora and not find_spec("xllamacpp"):
        return "not checked: pip install xllamacpp, and llama.cpp itself is asked"
    if lora and not gguf_file(model.base):
        return f"not checked: llama.cpp reads {model.base} from a GGUF file, which is not here"
    if mlx and not (find_spec("mlx_lm") and base.is_dir()):
        return "not checked: that takes mlx-lm, and the base model in a folder"
    wording = PromptConfig(**adapter.card["prompt"])
    encoder = PromptEncoder(load_tokenizer(model), wording)
    if wording.conversation:
        rows = [encoder.tokenizer(query).input_ids for query in QUERIES]
    else:
        rows = [encoder.encode(query, adapter.card["template"]) for query in QUERIES]
    expected = _logits(PeftModel.from_pretrained(_load_plain(model), adapter.path), rows)
    if lora:
        return _compare_with_llama_cpp(expected, model, lora, rows)
    dtype = torch.float32
    if mlx:
        found, dtype = mlx_logits(base, folder, rows), _stored_dtype(base)
    elif (folder / WEIGHTS_FILE).is_file():
        found = _logits(PeftModel.from_pretrained(_load_plain(model), folder), rows)
    else:
        found, dtype = _logits(_load_plain(ModelConfig(base=str(folder))), rows), _stored_dtype(folder)
    difference = ((found - expected).abs().max() / expected.std()).item()
    if not difference < (limit := TOLERANCE[dtype]):
        raise _differs(f"logits differ by {difference:.2g} of their spread, and {limit:g} would be rounding")
    return f"checked: logits differ from those of base and adapter by {difference:.1e} of their spread"


def _compare_with_llama_cpp(expected: torch.Tensor, model: ModelConfig, lora: Path, rows: list[list[int]]) -> str:
    base = gguf_file(model.base)
    assert base
    found = next_token_logprobs(base, lora, rows)
    ours = expected.log_softmax(-1)
    pairs = [(logprob, float(ours[i, token])) for i, row in enumerate(found) for token, logprob in row.items()]
    mean = sum(abs(theirs - own) for theirs, own in pairs) / len(pairs)
    if not mean < MOST_NATS:
        raise _differs(f"llama.cpp's log probabilities differ by {mean:.2g} nats, and {MOST_NATS:g} would be rounding")
    same = sum(max(row, key=row.__getitem__) == int(ours[i].argmax()) for i, row in enumerate(found))
    likeliest = f"the likeliest next token is the same after {same} of {len(rows)} queries"
    return f"checked by llama.cpp: log probabilities differ by {mean:.2g} nats, and {likeliest}"


def _differs(how: str) -> AdapterError:
    return AdapterError(f"the export computes something else than base and adapter: {how}; nothing was written")


def _load_plain(model: ModelConfig) -> Any:
    return load_model(model.model_copy(update={"dtype": "float32"}))


def _logits(model: Any, rows: list[list[int]]) -> torch.Tensor:
    return torch.cat([model.eval()(input_ids=torch.tensor([row])).logits[0, -1:] for row in rows]).float()


def _stored_dtype(folder: Path) -> torch.dtype:
    """The narrowest dtype among the floating-point weights of an export."""
    found = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            found |= {shard.get_slice(name).get_dtype() for name in shard.keys()}  # noqa: SIM118 (not a dict)
    return torch.bfloat16 if "BF16" in found else torch.float16 if "F16" in found else torch.float32
