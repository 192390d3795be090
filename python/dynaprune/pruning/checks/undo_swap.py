"""The layers of a model as they were before a swap, to put them back bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from dynaprune.nn.optimizer_state import sliced_state
from dynaprune.nn.parameter import replace_parameter_data_


class BeforeSwap:
    """Holds weights, gradients, optimizer state and attributes of plain ``layers``; none of them is copied.

    A swap gives a Parameter other data and leaves the old tensors alone, so that they can be put back.
    """

    def __init__(self, layers: Iterable[nn.Module], optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._layers = [(layer, type(layer), dict(layer.__dict__)) for layer in layers]
        self._weights = []
        self._states = []
        for layer, _, _ in self._layers:
            weight = layer._parameters.get("weight")
            if weight is not None:
                self._weights.append((weight, weight.data, weight.grad))
                self._states += list(sliced_state(optimizers, weight))

    def restore(self) -> None:
        """Put everything back."""
        for layer, type_, attributes in self._layers:
            if type(layer) is not type_:
                layer.__class__ = type_
                layer.__dict__.clear()
                layer.__dict__.update(attributes)
        for weight, data, grad in self._weights:
            if weight.data_ptr() != data.data_ptr() or weight.shape != data.shape:
                replace_parameter_data_(weight, data, grad)
        for state, key, tensor in self._states:
            state[key] = tensor
