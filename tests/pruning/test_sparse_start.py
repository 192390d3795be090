"""A training that begins sparse: what is kept, that nothing dense is ever made, and what the pruner says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dynaprune
from dynaprune.nn.block_sparse import BlockSparseLayer
from dynaprune.pruning.checks.same_function import as_dense
from tests.pruning.attached import (
    STEPS,
    adam,
    assert_equal,
    batch,
    dense_weights,
    loss_of,
    mlp,
    sparse_layers,
    train,
)
from tests.pruning.attached import settings as gradual
from tests.rounding import agree


def settings(**changes: Any) -> dynaprune.PruningConfig:
    """Half of the blocks from the first step on, none of which goes."""
    return gradual(**{"initial_sparsity": 0.5, "target_sparsity": 0.5, **changes})


class Mixed(nn.Module):
    """Odd sizes: convolutions with stride and groups, a norm, a sum, linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 20, 3, padding=1)
        self.conv1 = nn.Conv2d(20, 32, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 32, (3, 1), groups=2)
        self.wide = nn.Linear(45, 52)
        self.head = nn.Linear(52, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.bn1(self.conv1(self.stem(x))).relu())
        return self.head(self.wide(x.flatten(2).mean(1)[:, :45]).tanh())


def test_outputs_and_all_gradients_are_those_of_the_masked_twin() -> None:
    torch.manual_seed(0)
    model = Mixed().double()
    x = torch.randn(3, 3, 14, 18, dtype=torch.float64, requires_grad=True)
    prepared = dynaprune.prepare(model, settings(block_size=8, target_sparsity=0.6, initial_sparsity=0.6))
    assert len(prepared.swapped) == 3
    twin, inputs = copy.deepcopy(model), x.detach().clone().requires_grad_()
    dynaprune.swap_back(twin)
    out, expected = model(x), twin(inputs)
    assert agree(out, expected)
    weighting = torch.randn_like(out)
    (out * weighting).sum().backward()
    (expected * weighting).sum().backward()
    assert agree(x.grad, inputs.grad)
    for name, module in twin.named_modules():
        mine: Any = model.get_submodule(name)
        if isinstance(mine, BlockSparseLayer):
            kept = mine.to_dense_shape(torch.ones_like(mine.values))
            assert 0 < float(kept.mean()) < 0.7 and agree(mine.weight.grad, module.weight.grad * kept)
        elif isinstance(getattr(module, "weight", None), Tensor):
            assert agree(mine.weight.grad, module.weight.grad)
        if getattr(module, "bias", None) is not None:
            assert agree(mine.bias.grad, module.bias.grad)


class _Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an op returns, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not any(each.alias_info is not None for each in func._schema.returns):
            found = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)]
            self.elements = max([self.elements, *found])
        return out


@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize("by_prepare", [False, True])
def test_nothing_of_dense_size_is_made_in_training(by_prepare: bool, example: bool) -> None:
    wide = 256
    model = nn.Sequential(
        nn.Linear(wide, wide), nn.ReLU(), nn.Linear(wide, wide), nn.ReLU(), nn.Linear(wide, 4)
    )
    config = settings(block_size=16, initial_sparsity=0.9, target_sparsity=0.9)
    given = {"example_inputs": torch.randn(2, wide)} if example else {}
    if by_prepare:
        prepared = dynaprune.prepare(model, config, **given)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        pruner = dynaprune.attach(prepared, optimizer)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        pruner = dynaprune.attach(model, optimizer, config, **given)
    with _Largest() as largest:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(8, wide)).square().mean().backward()
            optimizer.step()
    assert 0 < largest.elements < wide * wide // 4
    values = sum(layer.values.numel() for layer in sparse_layers(model))
    assert values == int(0.1 * 2 * 256) * 256 and pruner.sparsity >= 0.9
    rest = 2 * wide + 4 * wide + 4
    moments = [t.numel() for s in optimizer.state.values() for k, t in s.items() if k != "step"]
    assert sum(moments) == 2 * (values + rest)


def test_weights_are_those_of_the_model_scaled_to_the_inputs_that_live() -> None:
    model, plain = mlp(), mlp()
    dynaprune.prepare(model, settings())
    for layer, dense in zip(sparse_layers(model), (plain[0], plain[2]), strict=True):
        mask = layer.to_dense_shape(torch.ones_like(layer.values)).bool()
        factor = (mask.shape[1] / mask.sum(1, keepdim=True)).sqrt()
        assert torch.equal(layer.weight != 0, mask)
        torch.testing.assert_close(layer.weight.detach(), torch.where(mask, dense.weight * factor, 0.0))
    assert torch.equal(model[4].weight, plain[4].weight)


@pytest.mark.parametrize("example", [False, True])
def test_in_front_of_a_norm_weights_keep_their_scale(example: bool) -> None:
    torch.manual_seed(0)
    model = Mixed()
    plain = copy.deepcopy(model)
    given = {"example_inputs": torch.randn(2, 3, 14, 18)} if example else {}
    dynaprune.prepare(model, settings(block_size=8), **given)
    for name, scaled in {"conv1": False, "conv2": True, "wide": True}.items():
        layer, dense = model.get_submodule(name), plain.get_submodule(name)
        kept = layer.weight.detach() != 0
        assert torch.equal(layer.weight[kept], dense.weight[kept]) is not scaled, name


def test_a_norm_behind_a_sum_is_no_norm_behind_the_layer() -> None:
    class PostNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.norm, self.head = nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.dense(x) + x))

    for given in ({}, {"example_inputs": torch.randn(2, 64)}):
        model = PostNorm()
        before = model.dense.weight.detach().clone()
        dynaprune.prepare(model, settings(), **given)
        kept = model.dense.weight.detach() != 0
        assert not torch.equal(model.dense.weight[kept], before[kept])


def test_a_start_at_the_target_has_no_events() -> None:
    model = mlp()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings(total_steps=None, neurons=True))
    masks = [layer.layout.mask.clone() for layer in sparse_layers(model)]
    assert pruner.target_reached and pruner.structure_final and pruner.final_standing == 2
    train(model, optimizer)
    assert all(torch.equal(m, e.layout.mask) for m, e in zip(masks, sparse_layers(model), strict=True))
    report = pruner.report()
    assert (report["blocks_total"], report["blocks_never_present"], report["blocks_removed"]) == (96, 48, 0)
    assert report["removed_untested"] == 0 and report["observing"]["observations"] == 0
    assert report["sparsity"] == 0.5 and len(report["history"]) == 1
    assert pruner.figures()["flops_saving"] == 0.5


def test_pruning_goes_on_from_the_start_to_the_target() -> None:
    model = mlp()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings(target_sparsity=0.75, regrow=0.3))
    assert not pruner.target_reached and pruner.sparsity == 0.5
    train(model, optimizer)
    report = pruner.report()
    sparsities = [row["sparsity"] for row in report["history"]]
    assert sparsities[0] == 0.5 and sparsities == sorted(sparsities) and sparsities[-1] == 0.75
    assert sparsities[1] < 0.75, "the schedule's first event removes what is between start and target"
    assert report["blocks_never_present"] == 48 and report["blocks_removed"] == 24
    assert report["removed_untested"] == 24 + report["blocks_regrown"] and report["blocks_regrown"] > 0


def test_a_trial_tests_what_goes_after_a_sparse_start() -> None:
    model = mlp()
    optimizer = adam(model)
    x, y = batch(99, rows=512)

    def trial() -> Tensor:
        return nn.functional.cross_entropy(model(x), y, reduction="none")

    pruner = dynaprune.attach(model, optimizer, settings(target_sparsity=0.75), trial=trial)
    train(model, optimizer)
    report = pruner.report()
    assert report["trials"]["count"] > 0 and report["removed_untested"] == 0
    assert report["removed_passed"] + report["removed_forced"] == report["blocks_removed"]


def test_saved_and_loaded_and_copied_it_is_the_same_training(tmp_path: Any) -> None:
    def start(seed: int = 0) -> tuple[nn.Sequential, torch.optim.Optimizer, dynaprune.Pruner]:
        model = mlp()
        optimizer = adam(model)
        config = settings(target_sparsity=0.75, seed=seed)
        return model, optimizer, dynaprune.attach(model, optimizer, config)

    model, optimizer, pruner = start()
    train(model, optimizer, STEPS // 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), pruner.state_dict()))
    assert_equal(dense_weights(copy.deepcopy(model)), dense_weights(model))
    dynaprune.save(model, tmp_path / "model.safetensors")
    assert_equal(dense_weights(dynaprune.load(mlp(), tmp_path / "model.safetensors")), dense_weights(model))
    train(model, optimizer, STEPS // 2, STEPS // 2)
    again, optimizer, resumed = start(seed=1)
    again.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    train(again, optimizer, STEPS // 2, STEPS // 2)
    assert_equal(dense_weights(again), dense_weights(model))
    one, other = pruner.report(), resumed.report()
    assert one["blocks_never_present"] == other["blocks_never_present"] == 48
    assert one["history"] == other["history"] and one["blocks_removed"] == other["blocks_removed"]


def test_a_loaded_model_goes_on_with_its_blocks(tmp_path: Any) -> None:
    model = mlp()
    dynaprune.prepare(model, settings(seed=5))
    dynaprune.save(model, tmp_path / "model.safetensors")
    loaded = dynaprune.load(mlp(), tmp_path / "model.safetensors")
    prepared = dynaprune.prepare(loaded, settings(seed=6))
    assert not prepared.left_out
    assert_equal(dense_weights(loaded), dense_weights(model))
    pruner = dynaprune.attach(prepared, adam(loaded))
    train(loaded, pruner.optimizers[0], 3)
    assert pruner.sparsity == 0.5 and pruner.target_reached


def test_trained_weights_are_refused_by_what_shows_it() -> None:
    def refused(model: nn.Module, match: str) -> None:
        before = dense_weights(model)
        with pytest.raises(ValueError, match=match):
            dynaprune.prepare(model, settings())
        assert not sparse_layers(model)
        assert_equal(dense_weights(model), before)
        dynaprune.prepare(model, settings(mask_pretrained=True))
        assert len(sparse_layers(model)) == 1

    def net(norm: nn.Module) -> nn.Sequential:
        return nn.Sequential(nn.Linear(32, 64), norm, nn.ReLU(), nn.Linear(64, 4))

    dynaprune.prepare(net(nn.BatchNorm1d(64)), settings())
    zero = nn.LayerNorm(64)
    nn.init.zeros_(zero.weight)
    dynaprune.prepare(net(zero), settings())
    trained = nn.LayerNorm(64)
    with torch.no_grad():
        trained.weight[3] = 1.01
    refused(net(trained), "the weights of the norm 1 are not 1.*initial_sparsity=0.*mask_pretrained")
    seen = net(nn.BatchNorm1d(64))
    seen(torch.randn(8, 32))
    refused(seen, "the running statistics of 1 are not those of a new norm")
    named = net(nn.ReLU())
    named.config = type("Config", (), {"name_or_path": "somebody/something"})()
    refused(named, "config.name_or_path is 'somebody/something'")


def test_a_start_in_the_middle_of_training_is_refused() -> None:
    model = mlp()
    optimizer = adam(model)
    train(model, optimizer, 1)
    with pytest.raises(ValueError, match="the optimizer has stepped on 0 already"):
        dynaprune.attach(model, optimizer, settings())
    assert not sparse_layers(model)
    pruner = dynaprune.attach(model, optimizer, settings(mask_pretrained=True))
    train(model, optimizer, 3)
    assert pruner.sparsity == 0.5
    accumulates = mlp()
    dynaprune.attach(accumulates, torch.optim.Adagrad(accumulates.parameters()), settings())


def test_settings_that_do_not_fit_each_other() -> None:
    with pytest.raises(
        ValueError, match=r"target_sparsity of at least the initial_sparsity \(0.9\), got 0.8"
    ):
        dynaprune.PruningConfig(initial_sparsity=0.9)
    with pytest.raises(ValueError, match="beside regrow"):
        settings(regrow=0.2)
    with pytest.raises(ValueError, match=r"initial_sparsity in \[0, 1\), got 1.0"):
        dynaprune.SparseStart(1.0)
    with pytest.raises(ValueError, match="initial_allocation to be one of uniform, erk, global, got 'best'"):
        dynaprune.SparseStart(0.5, "best")
    with pytest.raises(ValueError, match="'uniform' or 'erk' for random blocks, got 'global'"):
        dynaprune.prepare(mlp(), settings(initial_allocation="global"))
    with pytest.raises(ValueError, match=r"expected initial_sparsity=0 with units='neurons', got 0\.5"):
        settings(units="neurons", neurons=True)
    with pytest.raises(ValueError, match="initial_sparsity of at most"):
        dynaprune.prepare(mlp(), settings(initial_sparsity=0.95, target_sparsity=0.95))


def test_a_layer_that_is_not_trained_cannot_begin_without_blocks() -> None:
    model = mlp()
    prepared = dynaprune.prepare(model, settings())
    with pytest.raises(ValueError, match="2 begins without some of its blocks, and no optimizer given holds"):
        dynaprune.attach(prepared, torch.optim.SGD(model[0].parameters(), 0.1))
    whole = mlp()
    with pytest.warns(RuntimeWarning, match="not trained"):
        pruner = dynaprune.attach(whole, torch.optim.SGD(whole[0].parameters(), 0.1), settings())
    assert list(pruner.layers) == ["0"] and pruner.sparsity == 0.5 and type(whole[2]) is nn.Linear


def test_a_weight_that_other_code_reads_is_told_at_the_first_batch() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(nn.functional.linear(self.first(x), self.second.weight))

    model = Reads()
    optimizer = adam(model)
    dynaprune.attach(model, optimizer, settings())
    with pytest.raises(RuntimeError, match=r"second began without some of its blocks.*exclude=\["):
        train(model, optimizer, 1)
    model = Reads()
    pruner = dynaprune.attach(model, adam(model), settings(), example_inputs=batch(0)[0])
    assert list(pruner.layers) == ["first"]


def test_the_blocks_that_stay_out_compute_as_zeros() -> None:
    model = mlp(torch.float64)
    dynaprune.prepare(model, settings())
    layers = {name: m for name, m in model.named_modules() if isinstance(m, BlockSparseLayer)}
    sparse = loss_of(model, 0, torch.float64)
    with as_dense(layers):
        assert agree(loss_of(model, 0, torch.float64), sparse)
