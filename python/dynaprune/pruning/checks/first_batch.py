"""What can only be seen when training runs: who reads layers' weights, and whether the function stayed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from dynaprune.neurons.example_inputs import ExampleInputs, detached
from dynaprune.nn import BlockSparseLayer
from dynaprune.pruning.checks.same_function import (
    as_dense,
    refuse_other_function,
    run_if_possible,
    weight_readers,
)


class FirstBatch:
    """Takes the arguments of the first training forward of ``model``; nothing of a compiled one.

    Args:
        given: what the training calls: the model, or what ``torch.compile`` made of it.
        compares: take them, to run the model once more in plain layers. These have the dense weights' size: a
            training that begins sparse is not to hold those.
    """

    def __init__(self, given: nn.Module, *, compares: bool = True) -> None:
        self.example: ExampleInputs | None = None
        self._handle: Any = None
        if compares:
            self._handle = given.register_forward_pre_hook(self._take, with_kwargs=True)

    def _take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling() and module.training and torch.is_grad_enabled():
            self.remove()
            self.example = ExampleInputs(detached(args), detached(kwargs))

    def remove(self) -> None:
        """Take the hook off."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def check(
        self,
        model: nn.Module,
        layers: Mapping[str, BlockSparseLayer],
        exempt: Callable[[Mapping[str, str]], None],
    ) -> None:
        """Exempt layers whose weight other code reads, and compare the model with itself in plain layers.

        Args:
            exempt: makes the layers named dense, with the reasons; ``layers`` stays as it is.

        Raises:
            ValueError: the model computes something else with block-sparse layers, or none is left.
        """
        reasons = {
            name: f"its weight is read by {layer.reads.reader} directly"
            for name, layer in layers.items()
            if layer.reads.reader
        }
        plain = None
        if self.example is not None:
            with as_dense(layers):
                plain = run_if_possible(model, self.example)
                if plain is not None:
                    reasons.update(weight_readers(model, self.example, layers))
        told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        if len(reasons) == len(layers):
            raise ValueError(f"cannot prune this model, no layer is left: {told}")
        if reasons:
            exempt(reasons)
            warnings.warn(f"not pruned, and dense again: {told}", RuntimeWarning, stacklevel=2)
        if self.example is not None and plain is not None:
            left = {name: layer for name, layer in layers.items() if name not in reasons}
            refuse_other_function(model, self.example, left, plain)
