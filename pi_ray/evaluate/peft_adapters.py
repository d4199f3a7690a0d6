"""Adapters of any method beside one base model, loaded by peft: for evaluation. Serving has engine/multi_lora.py."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class LoadedAdapters:
    """Loads adapter folders beside `base` and switches between them. `model` is what to call."""

    def __init__(self, base: Any):
        self.base = base
        self.model = base
        self._names: dict[str, str] = {}  # folder -> peft name
        self._active: str | None = None

    def load(self, folder: str) -> None:
        """Load `folder` unless it is loaded; "" is the base model."""
        from peft import PeftModel

        if not folder or folder in self._names:
            return
        name = self._names[folder] = f"adapter{len(self._names) + 1}"
        self._active = None
        if self.model is self.base:
            self.model = PeftModel.from_pretrained(self.base, folder, adapter_name=name)
        else:
            self.model.load_adapter(folder, adapter_name=name)
        self.model.eval()

    def activate(self, folder: str) -> None:
        """Make `model` compute with the adapter of `folder` alone, which must be loaded; "" is the base model alone."""
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
        """Within it the active adapter is added into the base weights, which are restored bit for bit afterwards."""
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
