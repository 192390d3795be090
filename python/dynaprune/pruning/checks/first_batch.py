"""What can only be seen when training runs: who reads layers' weights, and whether the function stayed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dynaprune.neurons.example_inputs import ExampleInputs, detached
from dynaprune.nn import BlockSparseLayer
from dynaprune.nn.optimizer_state import rewrite_state
from dynaprune.pruning.checks.same_function import (
    as_dense,
    refuse_other_function,
    run_if_possible,
    weight_readers,
)
from dynaprune.pruning.edit.stale_copies import CopyWatch

if TYPE_CHECKING:
    from dynaprune.pruning.pruner import Pruner


class FirstBatch:
    """Takes the arguments of the first training forward of ``model``; nothing of a compiled one.

    Args:
        given: what the training calls: the model, or what ``torch.compile`` made of it.
    """

    def __init__(self, given: nn.Module) -> None:
        self.example: ExampleInputs | None = None
        self._handle: Any = given.register_forward_pre_hook(self._take, with_kwargs=True)

    def _take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling() and module.training and torch.is_grad_enabled():
            self.remove()
            self.example = ExampleInputs(detached(args), detached(kwargs))

    def remove(self) -> None:
        """Take the hook off."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def check_first_batch(pruner: Pruner, batch: FirstBatch) -> None:
    """Before the first step: exempt what is read elsewhere, and refuse a model that computes something else.

    Raises:
        RuntimeError: the model computes something else with block-sparse layers, or none is left; it has
            plain layers again, and the pruner is detached.
    """
    batch.remove()
    model, example = pruner.model, batch.example
    reasons = {
        name: f"its weight is read by {layer.reads.reader} directly"
        for name, layer in pruner.layers.items()
        if layer.reads.reader
    }
    plain = None
    if example is not None:
        with as_dense(pruner.layers):
            plain = run_if_possible(model, example)
            if plain is not None:
                reasons.update(weight_readers(model, example, pruner.layers))
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    try:
        if len(reasons) == len(pruner.layers):
            raise ValueError(f"cannot prune this model, no layer is left: {told}")
        if reasons:
            exempt_later(pruner, reasons)
            warnings.warn(f"not pruned, and dense again: {told}", RuntimeWarning, stacklevel=2)
        if example is not None and plain is not None:
            refuse_other_function(model, example, pruner.layers, plain)
    except ValueError as error:
        pruner.finalize()
        raise RuntimeError(str(error)) from error


def exempt_later(pruner: Pruner, reasons: Mapping[str, str]) -> None:
    """Make layers dense that are not to be pruned after all, with their state and in every copy.

    Their Parameters stay the same objects; nothing may have been removed from them yet.
    """
    with torch.no_grad():
        pruner.followers.turn_dense(pruner.model, pruner.layers, list(reasons))
        for name in reasons:
            layer = pruner.layers[name]
            if isinstance(layer, BlockSparseLayer):
                for twin in _copies(layer):
                    twin.to_dense()
                rewrite_state(pruner.optimizers, layer.values, layer.to_dense_shape)
                layer.to_dense()
                # For code that took up the block-sparse layer's name of the Parameter since attach.
                layer.__dict__["values"] = layer.weight
    pruner.forget_layers(reasons)


def _copies(layer: BlockSparseLayer) -> list[BlockSparseLayer]:
    watch = layer.copy_watch
    twins = [ref() for ref in watch.copies] if isinstance(watch, CopyWatch) else []
    return [twin for twin in twins if isinstance(twin, BlockSparseLayer)]
