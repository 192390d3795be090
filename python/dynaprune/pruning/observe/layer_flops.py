"""FLOPs of the layers of a model in one forward pass, without training anything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dynaprune.neurons.example_inputs import ExampleInputs
from dynaprune.nn import BlockSparseLayer
from dynaprune.nn.calibration_mode import calibration_mode
from dynaprune.nn.shape import layer_shape

_SEED = 0


def layer_flops(model: nn.Module, example: ExampleInputs) -> dict[str, int]:
    """FLOPs of every linear layer and convolution in a forward pass of ``example``, by name: two per live
    weight and token (for a convolution output position). Layers that it does not call are not there."""
    found: dict[str, int] = {}

    def count(name: str, outputs: int) -> Any:
        def hook(layer: Any, _: Any, output: Tensor) -> None:
            weights = layer.live_values() if isinstance(layer, BlockSparseLayer) else layer.weight.numel()
            found[name] = found.get(name, 0) + 2 * weights * (output.numel() // outputs)

        return hook

    shapes = [(name, layer, layer_shape(layer)) for name, layer in model.named_modules()]
    handles = [
        layer.register_forward_hook(count(name, shape.out))
        for name, layer, shape in shapes
        if shape is not None and shape.in_
    ]
    try:
        # Grad mode keeps nn.TransformerEncoderLayer off its fused path, which would run no hooks.
        with calibration_mode(model, _SEED), torch.enable_grad():
            example.forward(model)
    finally:
        for handle in handles:
            handle.remove()
    return found
