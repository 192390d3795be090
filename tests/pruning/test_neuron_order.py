"""Whole neurons come first where their blocks score no more than the last block that would go anyway."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynaprune.nn import swap_layers
from dynaprune.pruning.allocation import Selection, select
from dynaprune.pruning.example_inputs import ExampleInputs
from dynaprune.pruning.neuron_groups import find_groups
from dynaprune.pruning.neuron_order import whole_neurons_first
from dynaprune.pruning.neurons import cut_dead_neurons


class Case:
    """A 64-64-64-10 net in blocks of 16: layers "0" and "2" with 16 blocks each, "2" worth far more."""

    def __init__(self) -> None:
        self.model = nn.Sequential(
            nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
        )
        swap_layers(self.model, 16)
        self.x = ExampleInputs.of(torch.randn(5, 64))
        self.layers: dict[str, Any] = {name: self.model.get_submodule(name) for name in ("0", "2")}
        self.scores = {"0": torch.arange(10.0, 26).view(4, 4), "2": torch.arange(100.0, 116).view(4, 4)}
        self.neuron_scores = {"0": torch.arange(64.0), "2": torch.arange(64.0) + 100}
        self.removable = {"0": 15, "2": 15}

    def selection(self, count: int) -> Selection:
        return select(self.scores, self.live(), count)

    def live(self) -> dict[str, Tensor]:
        return {name: layer.layout.mask for name, layer in self.layers.items()}

    def order(self, count: int, protected: dict[str, Tensor] | None = None) -> Selection:
        may_go = {name: mask & ~(protected or {}).get(name, ~mask) for name, mask in self.live().items()}
        return whole_neurons_first(
            self.model,
            self.selection(count),
            find_groups(self.model, self.x),
            self.scores,
            self.neuron_scores,
            may_go,
            self.removable,
        )


def test_a_group_below_the_margin_goes_first_and_is_cut() -> None:
    case = Case()
    case.scores["0"][2], case.scores["2"][:, 2] = (
        3.0,
        4.0,
    )  # outputs 32..47 of the first layer: row and column 2
    order = case.order(18)
    assert len(order) == 18
    masks = order.first(8)
    assert masks["0"].nonzero().tolist() == [[2, c] for c in range(4)]
    assert masks["2"].nonzero().tolist() == [[r, 2] for r in range(4)]
    assert order.order.unique().numel() == 18
    for name, mask in masks.items():
        case.layers[name].layout.release_(mask)
    report = cut_dead_neurons(case.model, find_groups(case.model, case.x), case.x)
    assert report.neurons == {"0": 16} and report.blocks == 0


def test_at_most_half_of_the_units_and_the_least_neuron_score_first() -> None:
    case = Case()
    case.scores["0"][1:3], case.scores["2"][:, 1:3] = 3.0, 4.0
    assert case.order(18).first(8)["0"].any(1).tolist() == [False, True, False, False]
    case.neuron_scores["0"][16:32] = 1000.0
    assert case.order(18).first(8)["0"].any(1).tolist() == [False, False, True, False]
    half = case.order(14)
    assert torch.equal(half.order, case.selection(14).order), "eight blocks are more than half of fourteen"


@pytest.mark.parametrize("why", ["margin", "protected", "floor", "none"])
def test_without_a_group_that_qualifies_nothing_changes(why: str) -> None:
    case = Case()
    case.scores["0"][2], case.scores["2"][:, 2] = 3.0, 4.0
    protected = None
    if why == "margin":
        case.scores["2"][:, 2] = 1000.0
    elif why == "protected":
        protected = {"2": torch.zeros(4, 4, dtype=torch.bool)}
        protected["2"][3, 2] = True
    elif why == "floor":
        case.removable["2"] = 3
    count = {"none": 0, "margin": 14}.get(why, 18)
    assert torch.equal(case.order(count, protected).order, case.selection(count).order)


def test_a_map_holds_until_a_width_changes() -> None:
    case = Case()
    neuron_map = find_groups(case.model, case.x)
    case.layers["0"].layout.release_(torch.arange(4).view(4, 1).eq(1).expand(4, 4))
    assert neuron_map.fits(case.model)
    assert cut_dead_neurons(case.model, neuron_map, case.x).neurons == {"0": 16}
    assert not neuron_map.fits(case.model)
