"""Optimizer surgery: what moves, what is dropped, what is zeroed, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynaprune
from dynaprune.nn import BlockSparseLinear
from dynaprune.nn.optimizer_state import (
    check_state_shapes,
    refuse_unsliceable,
    seed_slots,
    sliced_state,
    zero_slots,
)
from dynaprune.pruning.edit.compaction import compact_layer, wanted_capacity
from tests.pruning.attached import loss_of, mlp, settings, sparse_layers

VARIANTS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9, "foreach": False}),
    "SGD, fused": (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
    "Adam": (torch.optim.Adam, {"foreach": False}),
    "Adam, foreach, amsgrad": (torch.optim.Adam, {"foreach": True, "amsgrad": True}),
    "Adam, fused": (torch.optim.Adam, {"fused": True}),
    "AdamW, fused, amsgrad": (torch.optim.AdamW, {"fused": True, "amsgrad": True}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "NAdam": (torch.optim.NAdam, {}),
}


def numbered(layer: BlockSparseLinear) -> Tensor:
    """A tensor of the layer's dense shape that names each weight's place."""
    layout = layer.layout
    return torch.arange(layout.out_features * layout.in_features, dtype=torch.float32).view(
        layout.out_features, layout.in_features
    )


def network(variant: str) -> tuple[BlockSparseLinear, torch.optim.Optimizer]:
    """A layer of 4 x 3 blocks whose state tensors all name their weights' places."""
    kind, options = VARIANTS[variant]
    layer = BlockSparseLinear.from_dense(nn.Linear(24, 32), 8)
    optimizer = kind(layer.parameters(), lr=1e-3, **options)
    layer(torch.randn(4, 24)).sum().backward()
    optimizer.step()
    for _, _, tensor in sliced_state([optimizer], layer.values):
        tensor.copy_(layer.to_slots(numbered(layer)))
    return layer, optimizer


@pytest.mark.parametrize("variant", VARIANTS)
def test_compaction_drops_the_same_blocks_everywhere(variant: str) -> None:
    layer, optimizer = network(variant)
    with torch.no_grad():
        layer.values.copy_(layer.to_slots(numbered(layer)))
        layer.values.grad.copy_(layer.values)
    dead = torch.rand(4, 3, generator=torch.Generator().manual_seed(0)) < 0.6
    layer.layout.release_(dead)
    others = {k: v for k, v in optimizer.state[layer.values].items() if v.numel() == 1}
    parameter, bias_state = layer.values, dict(optimizer.state[layer.bias])
    group = optimizer.param_groups[0]["params"]
    expected = layer.to_dense_shape(layer.values)
    compact_layer(layer, int((~dead).sum()), [optimizer], [])
    assert layer.values is parameter is group[0]
    assert layer.values.shape == (int((~dead).sum()), 8, 8)
    assert torch.equal(layer.to_dense_shape(layer.values), expected)
    assert torch.equal(layer.to_dense_shape(layer.values.grad), expected)
    tensors = list(sliced_state([optimizer], layer.values))
    assert len(tensors) == len(optimizer.state[layer.values]) - len(others) >= 1
    for _, _, tensor in tensors:
        assert torch.equal(layer.to_dense_shape(tensor), expected)
    assert all(optimizer.state[layer.values][k] is v for k, v in others.items())
    assert all(optimizer.state[layer.bias][k] is v for k, v in bias_state.items())
    layer(torch.randn(4, 24)).sum().backward()
    optimizer.step()
    assert torch.isfinite(layer.values).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_existing_state_moves_along_at_attach(variant: str) -> None:
    kind, options = VARIANTS[variant]
    model = mlp()
    optimizer = kind(model.parameters(), lr=1e-3, **options)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    before = {
        number: {k: v.clone() for k, v in optimizer.state[model[number].weight].items()} for number in (0, 2)
    }
    grads = {number: model[number].weight.grad.clone() for number in (0, 2)}
    dynaprune.attach(model, optimizer, settings())
    for number, states in before.items():
        layer = model[number]
        assert torch.equal(layer.to_dense_shape(layer.values.grad), grads[number])
        for key, old in states.items():
            new = optimizer.state[layer.values][key]
            assert torch.equal(layer.to_dense_shape(new) if old.dim() else new, old), key


@pytest.mark.parametrize("variant", VARIANTS)
def test_removed_blocks_are_zeroed_everywhere_and_stay_zero(variant: str) -> None:
    layer, optimizer = network(variant)
    blocks = torch.zeros(4, 3, dtype=torch.bool)
    blocks[1, 2] = blocks[3, 0] = True
    slots = layer.layout.slots_of(blocks)
    assert int(slots.sum()) == 2
    kept = {key: tensor[~slots].clone() for _, key, tensor in sliced_state([optimizer], layer.values)}
    zero_slots([optimizer], layer.values, slots)
    layer.layout.release_(blocks)
    for _ in range(3):
        for _, key, tensor in sliced_state([optimizer], layer.values):
            assert not tensor[slots].any(), key
            if key in kept:
                assert torch.equal(tensor[~slots], kept.pop(key))
        assert not layer.values[slots].any() and not layer.values.grad[slots].any()
        optimizer.zero_grad()
        layer(torch.randn(4, 24)).sum().backward()
        optimizer.step()


def test_blocks_that_return_start_with_the_second_moment_of_the_living() -> None:
    layer, optimizer = network("Adam, foreach, amsgrad")
    new = torch.zeros(12, dtype=torch.bool)
    new[[2, 7]] = True
    free = torch.zeros(12, dtype=torch.bool)
    free[5] = True
    state = optimizer.state[layer.values]
    state["exp_avg_sq"][new | free] = torch.nan
    mean = state["exp_avg_sq"][~(new | free)].mean()
    step = state["step"].clone()
    seed_slots([optimizer], layer.values, ~(new | free), new)
    assert not layer.values[new].any() and not layer.values.grad[new].any()
    assert not state["exp_avg"][new].any()
    torch.testing.assert_close(state["exp_avg_sq"][new], mean.expand(2, 8, 8))
    assert torch.equal(state["step"], step)


def test_an_update_after_return_is_no_larger_than_the_living_ones() -> None:
    """At a late step zero second moments make an update of several learning rates."""
    layer, optimizer = network("Adam, fused")
    state = optimizer.state[layer.values]
    state["step"].fill_(1000)
    state["exp_avg_sq"].fill_(1e-4)
    state["exp_avg"].zero_()
    blocks = torch.zeros(4, 3, dtype=torch.bool)
    blocks[2, 1] = True
    zero_slots([optimizer], layer.values, layer.layout.slots_of(blocks))
    layer.layout.release_(blocks)
    layer.layout.allocate_(blocks)
    new = layer.layout.slots_of(blocks)
    seed_slots([optimizer], layer.values, ~new, new)
    before = layer.values.detach().clone()
    layer.values.grad = torch.full_like(layer.values, 1e-2)
    optimizer.step()
    moved = (layer.values.detach() - before).abs()
    assert 0 < float(moved[new].max()) <= 1.01 * float(moved[~new].max()) <= 1e-3


def test_fourteen_compactions_in_a_row_while_the_loop_holds_its_loss() -> None:
    layer = BlockSparseLinear.from_dense(nn.Linear(64, 64), 8)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    x, losses = torch.randn(4, 64), []
    calls: list[torch.Size] = []
    layer.values.register_hook(lambda grad: calls.append(grad.shape))
    for capacity in range(62, 6, -4):
        optimizer.zero_grad()
        loss = layer(x).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss)
        order = torch.arange(64).view(8, 8)
        blocks = layer.layout.mask & (order >= capacity)
        zero_slots([optimizer], layer.values, layer.layout.slots_of(blocks))
        layer.layout.release_(blocks)
        compact_layer(layer, capacity, [optimizer], [])
        assert layer.values.shape[0] == capacity == layer.layout.live_count()
    assert len(losses) == len(calls) == 14
    assert calls[0] == (64, 8, 8) and calls[-1] == (14, 8, 8)


def test_capacities_walk_down_the_ladder() -> None:
    layer = BlockSparseLinear.from_dense(nn.Linear(64, 64), 8)
    order = torch.arange(64).view(8, 8)
    for live, ladder, growing in ((64, 64, 64), (50, 64, 64), (48, 48, 64), (40, 48, 48), (36, 36, 48)):
        layer.layout.update_(order < live)
        assert wanted_capacity(layer, exact=False, growing=False) == ladder
        assert wanted_capacity(layer, exact=False, growing=True) == growing
        assert wanted_capacity(layer, exact=True, growing=False) == live
    layer.layout.update_(order < 0)
    assert wanted_capacity(layer, exact=True, growing=False) == 1


def test_compaction_keeps_suspended_blocks() -> None:
    layer, optimizer = network("Adam")
    blocks = torch.zeros(4, 3, dtype=torch.bool)
    blocks[0, 1] = True
    weight = layer.weight.clone()
    dead = torch.zeros(4, 3, dtype=torch.bool)
    dead[2] = True
    layer.layout.suspend_(blocks)
    layer.layout.update_(layer.layout.mask, release=False)
    layer.layout.slot_of_block[dead] = -1
    layer.layout.update_(layer.layout.mask & ~dead, release=False)
    compact_layer(layer, 9, [optimizer], [])
    layer.layout.resume_()
    weight[16:24] = 0
    assert torch.equal(layer.weight, weight)


def test_state_of_another_shape_is_named() -> None:
    layer, optimizer = network("Adam")
    check_state_shapes([optimizer], [("layer.values", layer.values)])
    optimizer.state[layer.values]["exp_avg"] = torch.zeros(32, 24)
    with pytest.raises(RuntimeError, match=r"Adam holds exp_avg of shape \(32, 24\) for layer.values"):
        check_state_shapes([optimizer], [("layer.values", layer.values)])


def test_state_in_lists_cannot_be_sliced() -> None:
    class Listed(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["history"] = [p.detach().clone()]

    parameter = nn.Parameter(torch.zeros(8, 8))
    optimizer = Listed([parameter], 0.1)
    with pytest.raises(ValueError, match="cannot attach to Listed: its state 'history'"):
        refuse_unsliceable(optimizer, optimizer.param_groups[0], parameter, (3, 8, 8))
    assert not optimizer.state


def test_state_shrinks_with_the_network() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)
    pruner = dynaprune.attach(model, optimizer, settings())
    sizes = []
    for step in range(24):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        layers = sparse_layers(model)
        for layer in layers:
            state = optimizer.state[layer.values]
            assert state["exp_avg"].shape == state["exp_avg_sq"].shape == layer.values.shape
            assert layer.values.grad.shape == layer.values.shape
        sizes.append(sum(layer.values.numel() for layer in layers))
    assert sizes[0] == 96 * 64 and sizes[-1] == 24 * 64
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) >= 4
    assert pruner.compactions >= 4
