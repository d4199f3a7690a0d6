"""Adapters in memory: one base model, at most `limit` adapters beside it, the least recently used dropped first. One thread calls it."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pi_ray.errors import AdapterError
from pi_ray.serving.verify import CONFIG, LORA_TENSOR, WEIGHTS, read_header, read_json


class LoadedAdapters:
    """Loads verified adapter folders into `model` and switches between them. `model` is the thing to call.

    `own`: the folders are those that a run has just trained here, and may be of any method, loaded as peft loads them.
    """

    def __init__(self, base: Any, limit: int, own: bool = False):
        self.base = base
        self.own = own
        self.model = base
        self.limit = limit
        self._names: OrderedDict[str, str] = OrderedDict()  # folder -> peft name, least recently used first
        self._count = 0
        self._active: str | None = None

    def __len__(self) -> int:
        return len(self._names)

    def fits(self, folder: str, busy: Collection[str]) -> bool:
        """Whether `folder` can be made active without dropping an adapter of `busy`."""
        return not folder or folder in self._names or len(set(busy) - {""}) < self.limit

    def load(self, folder: str, busy: Collection[str] = ()) -> None:
        """Have `folder` in memory ("" is the bare base). Raises AdapterError when its matrices do not fit the base model."""
        if not folder:
            return
        if folder not in self._names:
            idle = [f for f in self._names if f not in busy]
            for old in idle[: max(0, len(self._names) + 1 - self.limit)]:
                self._drop(old)
            self._names[folder] = self._add(Path(folder))
        self._names.move_to_end(folder)

    def activate(self, folder: str) -> None:
        """From now on `model` computes with `folder`'s adapter alone, which was loaded before; "" is the base alone."""
        if self.model is self.base or folder == self._active:
            return
        if folder:
            self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(self._names[folder], inference_mode=True)
        else:
            self.model.base_model.disable_adapter_layers()
        self._active = folder

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Within it the active adapter is added into the base weights: no low-rank products at each call. After it they are what they were."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [m.get_base_layer() for m in self.model.modules() if isinstance(m, BaseTunerLayer)]
        weights = list({id(p): p for layer in layers for p in layer.parameters(recurse=False)}.values())
        before = [p.detach().cpu().clone() for p in weights]
        self.model.merge_adapter()
        try:
            yield
        finally:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of ia3, that unmerging is inexact
                self.model.unmerge_adapter()
            for p, value in zip(weights, before, strict=True):  # unmerging leaves rounding
                p.data.copy_(value)

    def _add(self, folder: Path) -> str:
        """Built from r, alpha and the names and shapes of the matrices: whatever else adapter_config.json says has no effect."""
        from peft import LoraConfig, PeftModel, set_peft_model_state_dict
        from safetensors.torch import load_file

        saved = read_json(folder / CONFIG)
        if self.own and (saved.get("peft_type") != "LORA" or saved.get("use_dora") or saved.get("target_parameters")):
            return self._add_own(str(folder))
        config = LoraConfig(
            r=saved["r"], lora_alpha=saved["lora_alpha"], use_rslora=bool(saved.get("use_rslora")),
            target_modules=self._targets(folder / WEIGHTS), task_type="CAUSAL_LM", inference_mode=True,
        )  # fmt: skip
        self._count += 1
        name = f"adapter{self._count}"
        self._active = None
        if self.model is self.base:
            self.model = PeftModel(self.base, config, adapter_name=name).eval()
        else:
            self.model.add_adapter(name, config)
        device = next(self.base.parameters()).device
        set_peft_model_state_dict(self.model, load_file(folder / WEIGHTS, device=str(device)), adapter_name=name)
        self.model.eval()
        return name

    def _add_own(self, folder: str) -> str:
        from peft import PeftModel

        self._count += 1
        name = f"adapter{self._count}"
        self._active = None
        if self.model is self.base:
            self.model = PeftModel.from_pretrained(self.base, folder, adapter_name=name)
        else:
            self.model.load_adapter(folder, adapter_name=name)
        self.model.eval()
        return name

    def _targets(self, weights: Path) -> list[str]:
        """The modules that the matrices belong to, each checked against the base, so that nothing fails half way."""
        import torch

        shapes = {LORA_TENSOR.fullmatch(name).group(1, 2): tensor["shape"] for name, tensor in read_header(weights).items()}
        modules = dict(self._linears(torch.nn.Linear))
        for (module, side), shape in shapes.items():
            linear = modules.get(module)
            if linear is None:
                raise AdapterError(f"it adapts {module!r}, which the base model does not have as a linear layer")
            expected, found = (linear.in_features, shape[1]) if side == "A" else (linear.out_features, shape[0])
            if expected != found:
                raise AdapterError(f"its matrix {side} for {module!r} has size {found}, the base model's layer has {expected}")
        return sorted({module for module, _ in shapes})

    def _linears(self, kind: type) -> Any:
        """(name in the bare base model, linear layer): peft renames an adapted layer to `<name>.base_layer`."""
        for name, module in self.base.named_modules():
            if isinstance(module, kind) and ".lora_" not in name:
                yield name.removesuffix(".base_layer"), module

    def _drop(self, folder: str) -> None:
        self._active = None
        self.model.delete_adapter(self._names.pop(folder))
