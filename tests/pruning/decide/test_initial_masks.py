"""Which blocks a sparse start keeps: every row and channel block has one, shares are as asked for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dynaprune.pruning.decide.initial_masks import Grid, initial_masks
from dynaprune_kernels import BlockLayout, ConvGeometry

LAYOUTS = {
    "square": BlockLayout(256, 256, 16),
    "wide": BlockLayout(64, 320, 16),
    "ragged": BlockLayout(197, 150, (16, 8)),
    "conv": BlockLayout(64, 96, 16, conv=ConvGeometry(3, 3)),
    "groups": BlockLayout(96, 40, 8, conv=ConvGeometry(3, 2, groups=2)),
    "one": BlockLayout(5, 3, 8),
}


def grids(*names: str) -> dict[str, Grid]:
    return {name: Grid.of(LAYOUTS[name]) for name in names or LAYOUTS}


def sparsity_of(masks: dict[str, Tensor]) -> float:
    chosen = grids(*masks)
    live = sum(float(chosen[name].weights[mask].sum()) for name, mask in masks.items())
    return 1 - live / sum(float(grid.weights.sum()) for grid in chosen.values())


@pytest.mark.parametrize("allocation", ["uniform", "erk"])
@pytest.mark.parametrize("sparsity", [0.3, 0.75, 0.9])
def test_every_row_and_channel_block_lives_at_the_sparsity_asked_for(
    sparsity: float, allocation: str
) -> None:
    masks = initial_masks(grids(), sparsity, allocation=allocation, seed=3)
    for name, mask in masks.items():
        layout = LAYOUTS[name]
        assert mask.shape == (layout.rows, layout.columns) and mask.dtype == torch.bool
        by_group = mask.view(layout.groups, layout.rows // layout.groups, layout.taps, -1)
        assert bool(by_group.any(3).any(2).all()) and bool(by_group.any(2).any(1).all()), name
    largest = max(float(grid.weights.max()) for grid in grids().values())
    total = sum(float(grid.weights.sum()) for grid in grids().values())
    assert sparsity - 1e-9 <= sparsity_of(masks) < sparsity + (len(masks) + 1) * largest / total


def test_uniform_is_one_density_and_what_a_small_layer_needs_the_others_give() -> None:
    masks = initial_masks(grids("square", "wide", "conv"), 0.5)
    assert {name: float(mask.float().mean()) for name, mask in masks.items()} == dict.fromkeys(masks, 0.5)
    masks = initial_masks(grids("square", "wide"), 0.85)
    assert int(masks["wide"].sum()) == 20  # of 80: one in each of its columns
    assert int(masks["square"].sum()) + 20 == int(0.15 * (256 + 80))


def test_erk_is_in_proportion_to_the_sum_of_dimensions() -> None:
    chosen = grids("square", "conv", "wide")
    masks = initial_masks(chosen, 0.7, allocation="erk")
    wanted = {name: sum(grid.shape) / math.prod(grid.shape) for name, grid in chosen.items()}
    scale = [float(mask.float().mean()) / wanted[name] for name, mask in masks.items()]
    assert max(scale) / min(scale) < 1.05
    dense = initial_masks(grids("one", "square"), 0.5, allocation="erk")
    assert bool(dense["one"].all())


def test_the_seed_decides_and_the_order_of_layers_does_not() -> None:
    one, again = initial_masks(grids(), 0.8, seed=7), initial_masks(grids(), 0.8, seed=7)
    assert all(torch.equal(one[name], again[name]) for name in LAYOUTS)
    turned = initial_masks(dict(reversed(grids().items())), 0.8, seed=7)
    assert list(turned) == list(reversed(one))
    assert all(torch.equal(one[name], turned[name]) for name in LAYOUTS)
    other = initial_masks(grids(), 0.8, seed=8)
    assert any(bool((one[name] != other[name]).any()) for name in LAYOUTS)
    assert bool((one["square"] != initial_masks({"x": grids()["square"]}, 0.8, seed=7)["x"]).any())


def test_blocks_are_drawn_evenly() -> None:
    draws = [initial_masks(grids("square"), 0.75, seed=seed)["square"].float() for seed in range(400)]
    share = torch.stack(draws).mean(0)
    assert float(share.mean()) == 0.25
    assert float((share - 0.25).abs().max()) < 5 * math.sqrt(0.25 * 0.75 / 400)


def test_floors_and_what_is_impossible() -> None:
    masks = initial_masks(grids("square", "wide"), 0.7, floors={"wide": 0.5})
    assert int(masks["wide"].sum()) == 40
    assert sparsity_of(masks) >= 0.7
    with pytest.raises(ValueError, match=r"initial_sparsity of at most 0\.9375, .*got 0\.95"):
        initial_masks(grids("square"), 0.95)
    assert int(initial_masks(grids("square"), 0.9375)["square"].sum()) == 16
