"""``attach`` under a GradScaler and accelerate: skipped steps and gradients that are not finite."""

from __future__ import annotations

import pytest
import torch

import dynaprune
from tests.pruning.attach_loops import assert_like_plain, assert_pruned
from tests.pruning.attached import STEPS, adam, dense_weights, loss_of, mlp, settings


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler(fused: bool) -> None:
    model = mlp()
    optimizer = adam(model, fused=fused)
    pruner = dynaprune.attach(model, optimizer, settings())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(STEPS):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert pruner.report()["gradients_discarded"] == 0
    assert_like_plain(model, pruner, fused=fused)


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_with_a_skipped_step(fused: bool) -> None:
    model = mlp()
    optimizer = adam(model, fused=fused)
    pruner = dynaprune.attach(model, optimizer, settings())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    calls = STEPS if fused else STEPS + 1
    for step in range(calls):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        scaler.scale(loss * torch.inf if step == 4 else loss).backward()
        before = model[0].values.detach().clone()
        scaler.step(optimizer)
        assert step != 4 or torch.equal(model[0].values, before)
        scaler.update()
    assert scaler.get_scale() < 1024.0
    assert pruner.report()["gradients_discarded"] == (1 if fused else 0)
    assert_pruned(model, pruner)
    assert all(torch.isfinite(w).all() for w in dense_weights(model))


def test_a_step_skipped_for_another_parameters_sake_is_not_observed() -> None:
    """The prunable gradients are finite, but the fused optimizer is told to skip the step."""
    model = mlp()
    optimizer = adam(model, fused=True)
    pruner = dynaprune.attach(model, optimizer, settings())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(2):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if step == 1:
            model[4].bias.grad[0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    report = pruner.report()
    assert (report["gradients_discarded"], report["observing"]["observations"]) == (1, 1)


def test_gradients_that_are_not_finite_are_discarded_and_counted() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = dynaprune.attach(model, optimizer, settings())
    for step in range(6):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        if step in (1, 3):
            model[2].values.grad[0, 0, 0] = torch.nan if step == 1 else torch.inf
        optimizer.step()
        model[2].values.data.nan_to_num_(0, 0, 0)
    report = pruner.report()
    assert (report["gradients_discarded"], report["observing"]["observations"]) == (2, 4)
    assert torch.isfinite(
        pruner.score.scores(pruner.structure.layers["2"], model[2].layout.mask)[model[2].layout.mask]
    ).all()


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(
        reset_partial_state=True
    )  # the precision of an earlier test
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    bare = mlp()
    model, optimizer = accelerator.prepare(bare, adam(bare))
    assert type(optimizer).__name__ == "AcceleratedOptimizer"
    pruner = dynaprune.attach(model, optimizer, settings())
    for part in range(2 * STEPS):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, part))
            optimizer.step()
            optimizer.zero_grad()
    assert_like_plain(model, pruner, accumulate=2)
