"""Copies of the model follow it through prunes, regrowth, compaction and cut neurons."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dynaprune
from dynaprune.neurons.cut import cut_dead_neurons
from dynaprune.neurons.cut_copy import cut_copy
from dynaprune.neurons.example_inputs import ExampleInputs
from dynaprune.neurons.groups import find_groups
from dynaprune.nn import BlockSparseLayer, swap_layers
from dynaprune.saving.manifest import structure_manifest

STEPS = 60
DECAY = 0.8


def network() -> nn.Sequential:
    """64-64-64-64-10, float64, whose hidden neurons 32..63 start too small to stay."""
    model = nn.Sequential(
        nn.Linear(64, 64),
        nn.Tanh(),
        nn.Linear(64, 64),
        nn.Tanh(),
        nn.Linear(64, 64),
        nn.Tanh(),
        nn.Linear(64, 10),
    ).double()
    with torch.no_grad():
        for index in (0, 2):
            model[index].weight[32:] *= 1e-3  # type: ignore[index, operator, union-attr]
            model[index + 2].weight[:, 32:] *= 1e-3  # type: ignore[index, operator, union-attr]
    return model


def kill(layer: Any, rows: Any = (), columns: Any = ()) -> None:
    dead = torch.zeros_like(layer.layout.mask)
    dead[list(rows)] = True
    dead[:, list(columns)] = True
    layer.layout.release_(dead)


@pytest.mark.parametrize("regrow", [0.0, 0.3])
@pytest.mark.parametrize("when", ["before attach", "after attach"])
def test_average_follows_prunes_compaction_and_cuts(regrow: float, when: str) -> None:
    """The average equals the one computed block by block from the model's own history."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    averaging = get_ema_multi_avg_fn(DECAY)
    average = AveragedModel(model, multi_avg_fn=averaging)
    pruner = dynaprune.attach(
        model,
        optimizer,
        dynaprune.PruningConfig(
            target_sparsity=0.7,
            block_size=16,
            total_steps=STEPS,
            interval=4,
            score="magnitude",
            neurons=regrow == 0,
            regrow=regrow,
            floor=0.0,
        ),
    )
    if when == "after attach":
        average = AveragedModel(model, multi_avg_fn=averaging)
    pruner.follow(average)
    x, y = torch.randn(48, 64).double(), torch.randint(0, 10, (48,))
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        weights = dense(model)
        before = dense(average.module)
        first = int(average.n_averaged) == 0
        average.update_parameters(model)
        for name, mean in dense(average.module).items():
            expected = weights[name] if first else before[name] * DECAY + weights[name] * (1 - DECAY)
            torch.testing.assert_close(mean, expected, rtol=1e-12, atol=1e-12)
        assert structure_manifest(average.module) == structure_manifest(model)
        for mine, theirs in zip(sparse(average.module), sparse(model), strict=True):
            assert torch.equal(mine.layout.slot_of_block, theirs.layout.slot_of_block)
    assert pruner.target_reached and pruner.compactions > 0
    assert (pruner.report()["neurons_removed"] > 0) == (regrow == 0)
    assert (pruner.ledger.grown > 0) == (regrow > 0)
    plain = pruner.finalize()
    assert torch.isfinite(average(x)).all() and isinstance(average.module[0], nn.Linear)
    average.update_parameters(plain)


def sparse(model: nn.Module) -> list[BlockSparseLayer]:
    return [m for m in model.modules() if isinstance(m, BlockSparseLayer)]


def dense(model: nn.Module) -> dict[str, Tensor]:
    """Every weight by name, the block-sparse ones in their dense shape."""
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, BlockSparseLayer):
            weights[name] = module.weight.detach().clone()
            weights[f"{name}.bias"] = module.bias.detach().clone()  # type: ignore[union-attr]
        elif isinstance(module, nn.Linear):
            weights[name] = module.weight.detach().clone()
            weights[f"{name}.bias"] = module.bias.detach().clone()
    return weights


def test_a_copy_folds_its_own_constants() -> None:
    """Both the model and its average compute what they did, though their biases differ."""
    model = network()
    swap_layers(model, 16)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    x = torch.randn(9, 64).double()
    for net in (model, twin):
        kill(net[0], rows=[1])
        kill(net[2], rows=[2], columns=[3])
    expected = [net(x).detach() for net in (model, twin)]
    example = ExampleInputs.of(x)
    report = cut_dead_neurons(model, find_groups(model, example), example)
    assert report.plan is not None and report.neurons == {"0": 32, "2": 16}
    cut_copy(twin, report.plan, example)
    assert structure_manifest(twin) == structure_manifest(model)
    for net, before in zip((model, twin), expected, strict=True):
        torch.testing.assert_close(net(x).detach(), before, rtol=1e-12, atol=1e-12)


def test_a_stale_copy_is_an_error_that_says_what_to_do() -> None:
    model = network()
    swap_layers(model, 16)
    twin = copy.deepcopy(model)
    x = torch.randn(9, 64).double()
    example = ExampleInputs.of(x)
    for row in (1, 2):
        kill(model[0], rows=[row])
        report = cut_dead_neurons(model, find_groups(model, example), example)
        assert report.plan is not None
        model[0].layout.allocate_(torch.ones_like(model[0].layout.mask))  # type: ignore[union-attr, operator]
    before = {k: v.clone() for k, v in twin.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"stale.*pruner\.follow"):
        cut_copy(twin, report.plan, example)
    assert all(torch.equal(before[k], v) for k, v in twin.state_dict().items())


def test_a_copy_that_does_not_run_stays_as_it_was() -> None:
    model = network()
    swap_layers(model, 16)
    twin = copy.deepcopy(model)
    twin[1] = nn.Sequential(nn.Unflatten(1, (4, 16)), nn.Flatten())
    x = torch.randn(9, 64).double()
    example = ExampleInputs.of(x)
    for net in (model, twin):
        kill(net[0], rows=[1])
    before = {k: v.clone() for k, v in twin.state_dict().items()}
    report = cut_dead_neurons(model, find_groups(model, example), example)
    assert report.plan is not None
    with pytest.raises(RuntimeError, match="did not follow"):
        cut_copy(twin, report.plan, example)
    assert all(torch.equal(before[k], v) for k, v in twin.state_dict().items())
