"""How long a sparse training may be for a share of the FLOPs of a dense one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dynaprune.neurons.example_inputs import ExampleInputs, tensors_in
from dynaprune.pruning.checks import refusals
from dynaprune.pruning.config import PruningConfig
from dynaprune.pruning.counted_flops import flops_of
from dynaprune.pruning.planned_flops import FlopsOfSample, planned_flops
from dynaprune.pruning.prepare import checked, prepare

_MOST = 1 << 30


def steps_for_budget(
    model: nn.Module,
    config: PruningConfig,
    steps: int,
    flops: float = 0.4,
    *,
    example_inputs: Any,
) -> int:
    """How many steps a training with ``config`` may have to stay within the share ``flops`` of the FLOPs of
    ``steps`` dense steps.

    Ask before the scheduler is built, and give ``config`` the answer as ``total_steps``. One step on
    ``example_inputs`` is counted, forward and backward, dense and sparse, on copies of ``model``: everything
    that is a matrix product or a convolution, head and attention too. The rest follows from the schedule: of
    a training that begins at its target it is exact, the probes of rewiring included; elsewhere see
    ``planned_flops`` for what trials add.

    Args:
        model: dense, as the training begins with it; it is not changed.
        config: ``total_steps`` and ``batch_size`` need not be set.
        steps: of the dense training.
        flops: share of its FLOPs, above 0; above 1 for a longer training than FLOPs would allow densely.
        example_inputs: what the model takes (a tensor, a tuple of arguments, or a mapping of keywords), of
            the training's shapes but for the number of samples.

    Returns:
        The largest number of steps that stays within the budget.

    Raises:
        TypeError, ValueError: an argument out of its range, a configuration whose FLOPs are not known before
            training (no target, whole neurons, a policy of your own), or a budget below one step.
    """
    config = checked(config)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"expected steps as a whole number of at least 1, got {steps!r}")
    if not (math.isfinite(flops) and flops > 0):
        raise ValueError(f"expected flops as a share above 0, got {flops}")
    planned_flops(replace(config, total_steps=steps), FlopsOfSample(0.0, 0.0), int)  # whether it can be
    inner, example = refusals.unwrap_model(model), ExampleInputs.of(example_inputs)
    of_step, dense = _counted(inner, config, example)
    found = most_steps(
        lambda count: planned_flops(replace(config, total_steps=count), of_step, int), steps * flops * dense
    )
    if found == 0:
        raise ValueError(f"expected a budget of at least one sparse step, got {flops} of {steps} dense steps")
    planned_flops(replace(config, total_steps=found), of_step, int)
    return found


def most_steps(flops: Callable[[int], float], budget: float) -> int:
    """The most steps whose ``flops(steps)``, which grow with them, are within ``budget``; 0 if one is not.

    Raises:
        ValueError: a budget of 2^30 steps or more.
    """

    def within(count: int) -> bool:
        try:
            return flops(count) <= budget
        except ValueError:  # fewer steps than the schedule's interval
            return True

    few, many = 0, 1
    while within(many):
        few, many = many, 2 * many
        if many > _MOST:
            raise ValueError(f"expected a budget of fewer than {_MOST} steps, got {budget:.4g} FLOPs")
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if within(middle) else (few, middle)
    return few


def _counted(model: nn.Module, config: PruningConfig, example: ExampleInputs) -> tuple[FlopsOfSample, float]:
    """FLOPs of a step as the training begins and as it ends, and of a dense step, all of one batch."""
    dense, forward = _flops_of_step(copy.deepcopy(model), example)
    begins, sparse_forward = dense, forward
    if config.initial_sparsity:
        begins, sparse_forward = _flops_at(model, config, example, config.initial_sparsity)
    ends = begins
    if config.target_sparsity is not None and not config.stands_still:
        ends, _ = _flops_at(model, config, example, config.target_sparsity)
    return FlopsOfSample(begins, ends, forward - sparse_forward), dense


def _flops_at(
    model: nn.Module, config: PruningConfig, example: ExampleInputs, sparsity: float
) -> tuple[float, float]:
    sparse = copy.deepcopy(model)
    allocation = "erk" if config.initial_sparsity and config.initial_allocation == "erk" else "uniform"
    at = replace(
        config,
        initial_sparsity=sparsity,
        target_sparsity=sparsity,
        initial_allocation=allocation,
        mask_pretrained=True,
        regrow=0.0,
    )
    with torch.random.fork_rng():
        prepare(sparse, at, example_inputs=example)
    return _flops_of_step(sparse, example)


def _flops_of_step(model: nn.Module, example: ExampleInputs) -> tuple[float, float]:
    """FLOPs of forward and backward, and of the forward pass alone."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.random.fork_rng():
        outputs, forward = flops_of(lambda: example.forward(model.train()))
        sums = [t.sum() for t in tensors_in(outputs) if t.requires_grad]
        if not sums:
            raise ValueError("expected a model whose outputs depend on a trained parameter, got none")
        loss = torch.stack(sums).sum()
        _, backward = flops_of(lambda: torch.autograd.grad(loss, trained, allow_unused=True))
    return forward + backward, forward
