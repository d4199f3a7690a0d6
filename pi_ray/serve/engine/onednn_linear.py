"""Linear layers for CPU with weights in oneDNN's layout: the same float32 products, for a few rows about twice as fast.

torch.compile has the same for frozen weights, but needs a compiler. Where torch lacks the operators nothing changes.
"""

import logging
from typing import Any

import torch

log = logging.getLogger("ray.serve")
LAYOUT_ROWS = 16  # the number of rows for which the layout is chosen; it works for any
TOLERANCE = 1e-3  # largest difference of the logits, as a part of their standard deviation


class OneDnnForward:
    """Stands in for the `forward` of one torch.nn.Linear, so that the module, its name and its hooks stay."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), LAYOUT_ROWS)
        self.bias = bias

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")


@torch.no_grad()
def use_onednn_linears(model: Any) -> bool:
    """Move float32 linear layers to oneDNN and drop their plain weights. False where that changes the logits."""
    if model.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    layers = [m for m in model.modules() if type(m) is torch.nn.Linear and m.weight.dtype == torch.float32]
    plain = [layer.weight for layer in layers]
    ids = torch.arange(1, 6)[None] % model.config.get_text_config().vocab_size
    try:
        expected = model(input_ids=ids).logits
        for layer in layers:
            _pack(layer, layer.weight)
        difference = ((model(input_ids=ids).logits - expected).abs().max() / expected.std()).item()
        if difference < TOLERANCE:
            return True
        reason = f"logits differ by {difference:.2g} of their spread"
    except Exception as error:  # such as a model that reads a layer's weight itself
        reason = str(error).splitlines()[0] if str(error) else repr(error)
    for layer, weight in zip(layers, plain, strict=True):
        layer.weight = weight
        vars(layer).pop("forward", None)
    log.info("linear layers keep their plain weights: %s", reason)
    return False


def _pack(layer: torch.nn.Linear, weight: torch.Tensor) -> None:
    vars(layer)["forward"] = OneDnnForward(weight, layer.bias)
    layer.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)


def get_weight(layer: Any) -> torch.Tensor:
    """The plain weight of a layer, (out, in), in whatever layout it is held."""
    forward = vars(layer).get("forward")
    return forward.weight.to_dense() if forward else layer.weight


def set_weight(layer: Any, weight: torch.Tensor) -> None:
    """Replace the weight of a layer by a tensor of its own, even where it was tied to the embeddings."""
    if "forward" in vars(layer):
        _pack(layer, weight)
    else:
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
