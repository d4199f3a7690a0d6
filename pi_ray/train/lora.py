"""Adapters: LoRA (paper A.2: rank 32) or another of peft's methods, and adapter folders that carry their prompt."""

import json
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from pi_ray.config import LoraConfig, RunConfig
from pi_ray.errors import ConfigError, CorruptArtifactError, TrainingError
from pi_ray.models import base_digest, load_tokenizer
from pi_ray.prompt import PromptEncoder
from pi_ray.run.artifact import digest, staged, verify_artifact, write_atomic
from pi_ray.run.directory import CARD_FILE, RunDir
from pi_ray.schedule import plan_phases
from pi_ray.train import gist
from pi_ray.train.dev_scores import DevScores
from pi_ray.train.floor import decide_floor
from pi_ray.train.lora_linear import fuse_lora
from pi_ray.train.phase_scores import DEV_ANSWERS, DEV_SCORES, best_by_metric

# Keys of adapter_config.json by which equal matrices mean the same: their scale, and the base weights beside them.
SCALE_KEYS = ("lora_alpha", "use_rslora", "init_lora_weights")
# Model types with Mamba's kernels, which read the weights of some layers past any adapter; peft refuses two of them.
MAMBAS = {"bamba", "falcon_h1", "falcon_mamba", "jamba", "mamba", "mamba2", "nemotron_h", "zamba", "zamba2"}
READ_BY_KERNELS = {"conv1d", "dt_proj", "out_proj"}
LAYER = re.compile(r"\.(\d+)\.")  # the number of a module's layer, in its name
MODULE = re.compile(r"[\w.]{1,256}", re.ASCII)  # a module's name, or its end
NAMES = {"target_modules", "feedforward_modules", "target_parameters", "exclude_modules", "modules_to_save"}
ACTED_ON = ("megatron_config", "auto_mapping", "layer_replication")  # settings by which peft would do other things
PACKAGES = ("ray", "torch", "transformers", "peft", "deepspeed", "llmlingua", "faiss-cpu", "sacrebleu")


def add_lora(model: Any, config: LoraConfig, seed: int) -> Any:
    """The base model with a fresh adapter, as a peft model; equal seeds give equal adapters on every worker."""
    import peft

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        # peft warns of patterns that it made itself, for fused experts that are not adapted
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
        wrapped = peft.get_peft_model(model, peft_config(model, config))
    fuse_lora(wrapped)
    return wrapped


def peft_config(model: Any, config: LoraConfig) -> Any:
    """peft's configuration of `train.lora` for this base model. Raises ConfigError for layers it does not have."""
    import peft

    targets = _targets(model, config)
    if config.method == "ia3":
        chosen = {} if targets == "all-linear" else {"target_modules": targets, "feedforward_modules": []}
        return peft.IA3Config(**chosen, task_type="CAUSAL_LM")
    parts = [name.split(".") for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    if targets == "all-linear" and moe_blocks(model):  # attention alone: peft would take experts and router too
        targets = sorted({".".join(p[-2:]) for p in parts if len(p) > 1 and "att" in p[-2]})
    elif targets == "all-linear" and model.config.model_type in MAMBAS:
        targets = sorted({p[-1] for p in parts if len(p) > 1} - READ_BY_KERNELS)
    if config.layers < 1:
        targets = _in_upper_layers(model, targets, config.layers)
    return peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, task_type="CAUSAL_LM",
        target_modules=targets, target_parameters=_expert_weights(model) if config.experts else None,
        use_rslora=config.method == "rslora", use_dora=config.method == "dora",
        init_lora_weights="pissa" if config.method == "pissa" else True,
    )


def _targets(model: Any, config: LoraConfig) -> Any:
    """Return "all-linear" or the names of modules, as `train.lora.targets` says; a pattern's are those it fits whole.

    An adapter names its layers, since whoever loads a pattern would have to run it. Raises ConfigError.
    """
    if not isinstance(config.targets, str):
        return list(config.targets)
    if config.targets == "all-linear":
        return config.targets
    try:
        found = [name for name, _ in model.named_modules() if re.fullmatch(config.targets, name)]
    except re.error as error:
        raise ConfigError(f"train.lora.targets {config.targets!r} is no pattern ({error})") from error
    if not found:
        raise ConfigError(f"train.lora.targets {config.targets!r} fits no layer's name, such as {_some_layer(model)!r}")
    return found


def _in_upper_layers(model: Any, targets: Any, share: float) -> list[str]:
    """The modules that `targets` names in this share of the layers, from the last one down. Raises ConfigError."""
    layers = model.config.get_text_config().num_hidden_layers
    first = layers - max(1, round(share * layers))
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    upper = [name for name in linears if int((LAYER.search(name) or [0, -1])[1]) >= first]
    ends = tuple(f".{target}" for target in targets)
    found = upper if targets == "all-linear" else [name for name in upper if f".{name}".endswith(ends)]
    if not found:
        raise ConfigError(f"train.lora.layers: the last {layers - first} of {layers} layers have none of {targets}")
    return found


def _some_layer(model: Any) -> str:
    return next((name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)), "")


def moe_blocks(model: Any) -> list[Any]:
    """The modules that hold experts, such as MixtralSparseMoeBlock."""
    return [m for m in model.modules() if isinstance(m._modules.get("experts"), torch.nn.Module)]


def _expert_weights(model: Any) -> list[str]:
    """The fused weights (experts, out, in) of a mixture of experts, such as "experts.down_proj"."""
    weights = [item for block in moe_blocks(model) for item in block.experts.named_parameters(recurse=False)]
    found = sorted({f"experts.{name}" for name, p in weights if len(_shape(p)) == 3})
    if not found:
        raise ConfigError("train.lora.experts: this base model has no fused experts; leave it out")
    return found


def _shape(p: torch.nn.Parameter) -> tuple[int, ...]:
    """The whole shape of a parameter, also where ZeRO stage 3 shards it."""
    return tuple(getattr(p, "ds_shape", p.shape))


def trainable_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def lent_weights(model: Any, weights: dict[str, torch.Tensor]) -> Iterator[None]:
    """A context in which the trained parameters have other values. What the optimiser knows of them is not touched."""
    params = trainable_parameters(model)
    kept = {name: p.detach().clone() for name, p in params.items()}
    try:
        _copy_into(params, weights)
        yield
    finally:
        _copy_into(params, kept)


@torch.no_grad()
def _copy_into(params: dict[str, torch.nn.Parameter], values: dict[str, torch.Tensor]) -> None:
    for name, p in params.items():
        p.copy_(values[name])


def pissa_start(model: Any, config: LoraConfig) -> dict[str, torch.Tensor]:
    """The matrices A0, B0 that PiSSA starts from and takes out of the base weights, by name; none for other methods."""
    if config.method != "pissa":
        return {}
    return {name: p.detach().float().cpu().clone() for name, p in trainable_parameters(model).items()}


def adapter_card(config: RunConfig, phases: Sequence[dict[str, Any]], **facts: Any) -> dict[str, Any]:
    """pi_ray.json: base model, prompt and origin of an adapter. `phases` are the manifests of the phases' datasets."""
    first, last, gists = phases[0], phases[-1], config.train.gist
    whole, prefix_tokens = first["template"], first["tokens"]["prefix"]
    if config.train.objective != "sft" and first["phase"]["rate"] < 1:  # the teacher alone read the whole prompt
        whole = RunDir(config.root).read_templates()[1.0]
        prefix_tokens = len(PromptEncoder(load_tokenizer(config.model), config.prompt).prefix(whole))
    return {
        "format": 1, "run": config.name, "task": config.task.name, "versions": {p: version(p) for p in PACKAGES},
        "base": config.model.base, "revision": config.model.revision, "base_content": base_digest(config.model),
        "prompt": config.prompt.model_dump(mode="json"),
        "rate": last["phase"]["rate"], "shots": last["phase"]["shots"], "template": last["template"],
        "full_template_sha256": digest(whole),
        "full_prompt_tokens": round(prefix_tokens + first["tokens"]["row_mean"]),
        "query_prompt_tokens": round((gists or last["tokens"]["prefix"]) + last["tokens"]["row_mean"]),
        "max_answer_tokens": int(last["tokens"]["label_max"]), **({"gist": gists} if gists else {}), **facts,
    }


def load_adapter(model: Any, folder: str | Path, name: str = "default") -> Any:
    """The peft model of a base model, or of one that has adapters, with that of a run directory by `name`.

    Raises CorruptArtifactError, before peft acts on it, for a config that pi-ray does not write: text in place of a
    list of names is a regular expression to peft, and Megatron's settings name modules to import. A run directory may
    lie on storage that others can write.
    """
    from peft import PeftModel

    settings = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    odd = [key for key, value in settings.items() if key in NAMES and not (value is None or _are_names(value))]
    odd += [key for key in ACTED_ON if settings.get(key)]
    if odd:
        raise CorruptArtifactError(f"{folder}: {', '.join(odd)} in adapter_config.json is not pi-ray's; train again")
    if isinstance(model, PeftModel):
        model.load_adapter(str(folder), adapter_name=name)
        return model
    return PeftModel.from_pretrained(model, str(folder), adapter_name=name)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and MODULE.fullmatch(name) for name in value)


def save_adapter(
    folder: Path, model: Any, weights: dict[str, torch.Tensor], card: dict[str, Any], pissa: dict[str, torch.Tensor],
    scores: DevScores | None = None,
) -> None:
    """Write an artifact: peft's folder (safetensors), pi_ray.json, gist embeddings, dev scores or answers if there are
    any.

    `weights` are full fp32 tensors by parameter name. Of PiSSA the difference to `pissa`, its start, is saved, which
    fits the unchanged base model.
    """
    card |= scores.card if scores else {}
    with staged(folder, fingerprint=card["fingerprint"]) as tmp:
        state = {name: _difference(name, value, pissa) for name, value in weights.items()} if pissa else weights
        model.save_pretrained(tmp, state_dict=state, safe_serialization=True)
        file = tmp / "adapter_config.json"
        saved, changes = json.loads(file.read_text()), dict[str, Any]()
        if pissa:
            changes |= {"r": 2 * saved["r"], "lora_alpha": 2 * saved["lora_alpha"], "init_lora_weights": True}
        if isinstance(saved.get("target_modules"), str):  # a pattern, which no reader of the adapter should have to run
            adapted = (name.partition(".lora_") for name in weights)
            changes["target_modules"] = sorted({m.removeprefix("base_model.model.") for m, lora, _ in adapted if lora})
        if changes:
            write_atomic(file, json.dumps(saved | changes, indent=1) + "\n")
        gist.save_gist(tmp, weights)
        (tmp / "README.md").unlink(missing_ok=True)  # peft's empty model card
        if scores:
            name, content = (DEV_ANSWERS, scores.answers) if scores.answers else (DEV_SCORES, scores.metrics)
            write_atomic(tmp / name, json.dumps(content) + "\n")
        write_atomic(tmp / CARD_FILE, json.dumps(card, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def _difference(name: str, value: torch.Tensor, start: dict[str, torch.Tensor]) -> torch.Tensor:
    """B A - B0 A0 as one product of twice the rank: [B, -B0] [A; A0]."""
    if ".lora_A." in name:
        return torch.cat([value, start[name]], 0)
    return torch.cat([value, -start[name]], 1) if ".lora_B." in name else value


def load_init_adapter(
    folder: Path, model: Any, base: str, key: str = "train.init_adapter"
) -> dict[str, torch.Tensor]:
    """The fp32 weights of an adapter folder, which `key` of the run file names, by `model`'s parameter names.

    Raises CorruptArtifactError, or TrainingError when its base model, shape or scale is another.
    """
    verify_artifact(folder)
    card = json.loads((folder / CARD_FILE).read_text())
    if card["base"] != base:
        raise TrainingError(f"{key}: {folder} was trained on {card['base']}, and model.base is {base}")
    saved = load_file(folder / "adapter_model.safetensors")
    weights = {f"{name.removesuffix('.weight')}.default.weight": value.float() for name, value in saved.items()}
    shapes = {name: _shape(p) for name, p in trainable_parameters(model).items()}
    config, wanted = json.loads((folder / "adapter_config.json").read_text()), model.peft_config["default"]
    same_scale = all(config.get(key) == getattr(wanted, key, None) for key in SCALE_KEYS)
    if not same_scale or {name: tuple(value.shape) for name, value in weights.items()} != shapes:
        raise TrainingError(
            f"{key}: {folder} does not fit train.lora: take its method, rank, alpha and targets"
        )
    return weights


def choose_best_adapter(config: RunConfig) -> dict[str, Any]:
    """Choose the best of the phases' adapters, and return what the log says of it.

    The floor chooses it; without one the highest mean of the first metric of task.metric on dev rows, and without that
    the highest dev accuracy; of equals the later.

    The loss does not decide: an adapter that has learned more is also surer of answers that it cannot know, and a few
    of these outweigh all others.
    """
    run, phases = RunDir(config.root), range(len(plan_phases(config.schedule)))
    facts: dict[str, Any]
    if config.schedule.floor:
        verdict = decide_floor(config)
        best, facts = verdict.chosen, {"floor": verdict.facts()}
    else:
        accuracies = [json.loads((run.adapter(i) / CARD_FILE).read_text())["dev_accuracy"] for i in phases]
        if config.training_metric:
            best, metric, score = best_by_metric(config)
            facts = {"metric": metric, "score": round(score, 6)}
        else:
            best, facts = max(phases, key=lambda i: (accuracies[i], i)), {}
        facts["dev_accuracy"] = round(accuracies[best], 6)
    run.choose_best(best)
    return {"phase": best, **facts}
