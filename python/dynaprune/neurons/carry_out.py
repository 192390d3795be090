"""Carry out a cut of neurons as planned: constants move into biases, then outputs and inputs go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from dynaprune.families.family import counts_in
from dynaprune.neurons.cut_plan import CutPlan
from dynaprune.neurons.surgery import Surgery


def carry_out(model: nn.Module, plan: CutPlan, optimizers: Iterable[torch.optim.Optimizer] = ()) -> None:
    """Cut what ``plan`` says, with the state of ``optimizers``; an error leaves everything as it was."""
    surgery = Surgery(optimizers)
    try:
        execute(model, plan, plan.amounts, surgery)
    except BaseException:
        surgery.undo()
        raise


def execute(model: nn.Module, plan: CutPlan, amounts: Mapping[str, Tensor], surgery: Surgery) -> None:
    """Fold and cut as ``plan`` says, with these ``amounts`` for the readers' biases."""
    for name, amount in amounts.items():
        reader = model.get_submodule(name)
        if isinstance(reader.bias, nn.Parameter) and bool(amount.any()):
            surgery.add_(reader.bias, amount)
    counts = counts_in(model)
    for name, (outputs, inputs) in plan.layers.items():
        surgery.cut_(model.get_submodule(name), outputs, inputs)
    for each in counts:
        each.set_counts(model, surgery.set_)
