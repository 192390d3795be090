"""How many tokens layers see in a step, and how often gradients can be looked at for what that costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynaprune.nn.calibration_mode import calibrating
from dynaprune.nn.shape import layer_shape
from dynaprune.pruning.edit.layer_state import LayerState

OBSERVE_SHARE = 0.02
OBSERVATIONS_PER_INTERVAL = 8
# Nominal FLOP/s, bytes/s and seconds per small op, by device type: only their ratios decide, and they are
# constants, so that two runs observe the same steps.
_MACHINES = {"cpu": (2e11, 2e10, 5e-6), "cuda": (3e14, 2e12, 5e-6)}
_STEP_OPS, _OBSERVE_OPS, _READ_OPS = 20, 9, 12
_STEP_BYTES, _OBSERVE_BYTES = 10 * 4, 2 * 4


class TokenCounter:
    """Counts the tokens (for a convolution output positions) that each linear layer and convolution of
    ``model`` sees, block-sparse or plain, until :meth:`stop`: in training, or with ``of_trials`` wherever it
    runs.

    Under ``torch.compile`` nothing is counted.
    """

    def __init__(self, model: nn.Module, *, of_trials: bool = False) -> None:
        self.tokens: dict[str, int] = {}
        shapes = ((name, layer, layer_shape(layer)) for name, layer in model.named_modules())
        self._handles = [
            layer.register_forward_hook(_Count(self.tokens, name, shape.out, of_trials))
            for name, layer, shape in shapes
            if shape is not None and shape.in_
        ]

    def stop(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


@dataclass
class _Count:
    """The hook of one layer. A copy of the layer counts into a dict of its own."""

    tokens: dict[str, int]
    name: str
    width: int
    of_trials: bool

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        if self.of_trials or (module.training and torch.is_grad_enabled() and not calibrating()):
            self.tokens[self.name] = self.tokens.get(self.name, 0) + output.numel() // self.width


def observation_period(
    layers: Iterable[LayerState],
    tokens: Mapping[str, int],
    interval: int,
    read: Iterable[nn.Parameter] = (),
    plain: Iterable[tuple[str, nn.Parameter]] = (),
) -> int:
    """Least k such that observing every k-th step costs at most 2% of training, by a model of the costs.

    At least eight observations per event interval are kept, at whatever cost. The model's constants are
    fixed, so two runs of the same training observe the same steps; what it really cost is measured and in the
    report.

    Args:
        tokens: that each layer sees in a step.
        read: weights whose products with their gradients are summed too (readers of groups of neurons).
        plain: weights of plain layers that are trained, by the layer's name; their gradients are looked at.
    """
    step = observe = 0.0
    blocks = [(state.name, state.layer.values) for state in layers]
    for name, values in [*blocks, *plain]:
        flops, bandwidth, call = _MACHINES.get(values.device.type, _MACHINES["cuda"])
        weights, seen = values.numel(), tokens.get(name, 0)
        step += 6 * weights * seen / flops + weights * _STEP_BYTES / bandwidth + _STEP_OPS * call
        observe += weights * _OBSERVE_BYTES / bandwidth + _OBSERVE_OPS * call
    for weight in read:
        _, bandwidth, call = _MACHINES.get(weight.device.type, _MACHINES["cuda"])
        observe += weight.numel() * _OBSERVE_BYTES / bandwidth + _READ_OPS * call
    wanted = math.ceil(observe / (OBSERVE_SHARE * step)) if step else 1
    return max(1, min(wanted, interval // OBSERVATIONS_PER_INTERVAL))
