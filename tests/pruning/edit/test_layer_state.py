"""What is known of a layer is sliced and forgotten with its blocks."""

from __future__ import annotations

import torch
from torch import nn

from dynaprune.neurons.cut_plan import Kept
from dynaprune.nn import BlockSparseConv2d, BlockSparseLinear
from dynaprune.pruning.edit.layer_state import LayerState


def _state(out: int = 16, inputs: int = 16) -> LayerState:
    return LayerState.of("layer", BlockSparseLinear.from_dense(nn.Linear(inputs, out), 8))


def test_before_a_gradient_was_seen_everything_is_protected() -> None:
    state = _state()
    assert state.protected(5).all()
    state.observations = 1
    assert not state.protected(5).any()


def test_protection_ends_after_its_interval_and_follows_cuts() -> None:
    state = _state()
    state.observations = 1
    state.protect(torch.tensor([[True, False], [False, True]]), 10)
    state.protect(torch.tensor([[False, True], [False, False]]), 20)
    assert torch.equal(state.protected(9), torch.tensor([[True, True], [False, True]]))
    assert torch.equal(state.protected(10), torch.tensor([[False, True], [False, False]]))
    state.keep(Kept(torch.tensor([0]), torch.tensor([1]), torch.arange(8)))
    assert torch.equal(state.protected(19), torch.tensor([[True]]))
    assert not state.protected(20).any()


def test_statistics_are_sliced_by_what_their_names_say() -> None:
    state = _state()
    state.statistics = {
        "block": torch.arange(4.0).view(2, 2),
        "block_count": torch.arange(4.0).view(2, 2),
        "neuron": torch.arange(16.0),
        "other": torch.arange(3.0),
    }
    state.forget(torch.tensor([[False, True], [False, False]]))
    assert state.statistics["block"].tolist() == [[0, 0], [2, 3]]
    state.keep(Kept(torch.tensor([1]), torch.tensor([0, 1]), torch.arange(8, 16)))
    assert state.statistics["block_count"].tolist() == [[2, 3]]
    assert torch.equal(state.statistics["neuron"], torch.arange(8.0, 16))
    assert torch.equal(state.statistics["other"], torch.arange(3.0))


def test_ragged_blocks_count_the_weights_they_hold() -> None:
    linear = LayerState.of("linear", BlockSparseLinear.from_dense(nn.Linear(13, 20), 8))
    conv = LayerState.of("conv", BlockSparseConv2d.from_dense(nn.Conv2d(12, 20, 3), 8))
    for state in (linear, conv):
        state.measure()
        assert state.live_weights == state.weights and state.density == 1
    dead = torch.zeros_like(linear.mask)
    dead[-1, -1] = True  # 4 outputs of 5 inputs
    linear.layer.layout.release_(dead)
    linear.measure()
    assert linear.live_weights == 20 * 13 - 4 * 5
    assert conv.original == (20, 12, 3, 3)
