"""Carry a cut of neurons into copies of the model: averages of its weights (EMA, SWA), teachers."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn

from dynaprune.neurons.carry_out import execute
from dynaprune.neurons.cut_plan import CutPlan, amounts_of
from dynaprune.neurons.example_inputs import ExampleInputs
from dynaprune.neurons.folding import observe
from dynaprune.neurons.silence import silent_outputs
from dynaprune.neurons.surgery import Surgery
from dynaprune.nn.shape import layer_shape


def cut_copy(
    copy: nn.Module, plan: CutPlan, example: ExampleInputs, *, like: nn.Module | None = None
) -> None:
    """Cut from ``copy`` what :func:`~dynaprune.neurons.carry_out.carry_out` cut from the model.

    Constants that move into biases are the copy's own: its biases differ from the model's.

    Args:
        copy: the module that mirrors the model (of an ``AveragedModel``, its ``module``), with the blocks
            that the model had just before the cut.
        plan: ``report.plan`` of the cut.
        example: what the model's cut was checked with.
        like: the model; a copy in another dtype or on another device is run as a copy in the model's.

    Raises:
        RuntimeError: the copy is stale, or does not run after the cut; it is then as it was.
    """
    modules = dict(copy.named_modules())
    for name, (outputs, inputs) in plan.layers.items():
        shape = layer_shape(modules[name]) if name in modules else None
        expected = (outputs.numel(), inputs.numel())
        if shape is None or (shape.out, shape.in_ or shape.out) != expected:
            raise RuntimeError(
                f"a copy of the model is stale: expected its layer {name} with {expected[0]} outputs and "
                f"{expected[1]} inputs, got {shape}. Call pruner.follow(copy) right after making a copy, or "
                "make a new one of the model as it is now"
            )
    surgery = Surgery()
    with torch.no_grad():
        try:
            with silent_outputs(copy, plan.outputs() if plan.silent else {}):
                own = observe(_placed(copy, like), example, plan.folds)
            execute(copy, plan, amounts_of(copy, plan.folds, own), surgery)
            observe(_placed(copy, like), example)
        except BaseException as error:
            surgery.undo()
            if not isinstance(error, Exception):
                raise
            raise RuntimeError(f"a copy did not follow a cut of the model's neurons: {error}") from error


def _placed(copy: nn.Module, like: nn.Module | None) -> nn.Module:
    """``copy``, or a deep copy of it with the dtypes and on the devices of ``like``."""
    if like is None:
        return copy
    mine, theirs = ([(t.dtype, t.device) for t in (*m.parameters(), *m.buffers())] for m in (copy, like))
    if mine == theirs:
        return copy
    placed = deepcopy(copy)
    devices = {device for _, device in theirs}
    if len(devices) == 1:
        placed = placed.to(devices.pop())
    for tensor, (dtype, _) in zip((*placed.parameters(), *placed.buffers()), theirs, strict=True):
        tensor.data = tensor.data.to(dtype)
    return placed
