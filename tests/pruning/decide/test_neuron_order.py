"""Whole neurons come first where their blocks score no more than the last block that would go anyway."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynaprune.neurons.cut import cut_dead_neurons
from dynaprune.neurons.example_inputs import ExampleInputs
from dynaprune.neurons.groups import NeuronGroup, find_groups
from dynaprune.nn import swap_layers
from dynaprune.pruning.decide.allocation import Selection, select
from dynaprune.pruning.decide.neuron_order import (
    GroupFigures,
    NeuronFigures,
    flops_saved,
    whole_neurons_first,
)


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
        self.group_scores: list[float | None] = [24.0, 25.0, 26.0, 27.0, *[1e6] * 4]  # 8 blocks each in "0"
        self.neuron_scores: dict[str, Tensor] | None = None
        self.tokens: dict[str, int] = {}
        self.removable = {"0": 15, "2": 15}

    def selection(self, count: int) -> Selection:
        return select(self.scores, self.live(), count)

    def live(self) -> dict[str, Tensor]:
        return {name: layer.layout.mask for name, layer in self.layers.items()}

    @property
    def groups(self) -> list[NeuronGroup]:
        return find_groups(self.model, self.x).groups

    def order(self, count: int, protected: dict[str, Tensor] | None = None) -> Selection:
        may_go = {name: mask & ~(protected or {}).get(name, ~mask) for name, mask in self.live().items()}
        figures = GroupFigures(self.group_scores, self.neuron_scores, self.tokens)
        neurons = NeuronFigures(self.model, find_groups(self.model, self.x), figures)
        return whole_neurons_first(neurons, self.selection(count), self.scores, may_go, self.removable)


def test_a_group_below_the_margin_goes_first_and_is_cut() -> None:
    case = Case()
    case.group_scores = [1e6, 1e6, 24.0, 1e6, *[1e6] * 4]  # outputs 32..47 of the first layer
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


def test_what_a_group_costs_decides_and_not_what_its_blocks_score() -> None:
    """Before a norm the blocks of a producer add up to nothing: their scores say little about the whole."""
    case = Case()
    assert float(case.scores["2"].mean()) > 100, "these blocks alone would never go"
    margin = float(case.scores["2"].view(-1)[2])  # of the last block of 18: one block of "0" has to stay
    for cost, goes in ((8 * margin, True), (8 * margin + 1, False)):
        case.group_scores = [cost, *[1e6] * 7]
        assert bool(case.order(18).first(8)["2"].any()) == goes


def test_at_most_half_of_the_units_and_the_least_score_first() -> None:
    case = Case()
    assert case.order(18).first(8)["0"].any(1).tolist() == [True, False, False, False]
    case.group_scores[0] = 200.0
    assert case.order(18).first(8)["0"].any(1).tolist() == [False, True, False, False]
    half = case.order(14)
    assert torch.equal(half.order, case.selection(14).order), "eight blocks are more than half of fourteen"


def test_the_score_is_per_flop_saved() -> None:
    """A group that has lost blocks saves less; so does one whose layers see fewer rows."""
    case = Case()
    case.group_scores = [24.0, 23.0, *[1e6] * 6]
    assert case.order(18).first(8)["0"].any(1).tolist() == [False, True, False, False]
    for name, mask in {"0": torch.arange(4) == 1, "2": torch.zeros(4, dtype=torch.bool)}.items():
        block = torch.zeros(4, 4, dtype=torch.bool)
        block[mask, 0] = True
        case.layers[name].layout.release_(block)
    first, second = case.groups[:2]
    assert (
        flops_saved(case.model, first, {}) == 6 * 8 * 256
        and flops_saved(case.model, second, {}) == 6 * 7 * 256
    )
    assert flops_saved(case.model, first, {"0": 5, "2": 7}) == 6 * 256 * (4 * 5 + 4 * 7)
    assert case.order(18).first(8)["0"].any(1).tolist() == [True, False, False, False]


def test_plain_members_count_among_the_flops() -> None:
    case = Case()
    behind = case.groups[4]
    assert [m.name for m in behind.members] == ["2", "4"]
    assert flops_saved(case.model, behind, {"2": 2, "4": 3}) == 6 * (4 * 256 * 2 + 16 * 10 * 3)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 5, 3)
    )
    entries = swap_layers(model, 16, exclude=["0"])
    assert [e.name for e in entries if e.swapped] == ["2"]
    group = find_groups(model, ExampleInputs.of(torch.randn(1, 3, 9, 9))).groups[0]
    assert [m.name for m in group.members] == ["0", "2"]
    assert flops_saved(model, group, {"0": 2}) == 6 * (16 * 3 * 9 * 2 + 64 * 16 * 9)


def test_a_group_that_no_gradient_spoke_of_counts_as_its_blocks() -> None:
    case = Case()
    case.group_scores = [None] * 8
    case.scores["0"][2], case.scores["2"][:, 2] = 3.0, 4.0
    assert case.order(18).first(8)["0"].any(1).tolist() == [False, False, True, False]


def test_a_score_that_is_not_made_of_gates_ranks_by_rows() -> None:
    case = Case()
    case.neuron_scores = {"0": torch.arange(64.0), "2": torch.arange(64.0) + 100}
    case.scores["0"][1:3], case.scores["2"][:, 1:3] = 3.0, 4.0
    assert case.order(18).first(8)["0"].any(1).tolist() == [False, True, False, False]
    case.neuron_scores["0"][16:32] = 1000.0
    assert case.order(18).first(8)["0"].any(1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("why", ["margin", "protected", "floor", "none"])
def test_without_a_group_that_qualifies_nothing_changes(why: str) -> None:
    case = Case()
    case.group_scores = [1e6, 1e6, 24.0, 1e6, *[1e6] * 4]
    protected = None
    if why == "margin":
        case.group_scores[2] = 1000.0
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


class Bridge(nn.Module):
    """Neurons that a plain layer and a pruned one make together, for a plain and a pruned reader."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.pruned = nn.Linear(64, 64), nn.Linear(64, 64)
        self.read, self.read_pruned = nn.Linear(64, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = (self.plain(x) + self.pruned(x)).relu()
        return self.head((self.read(x) + self.read_pruned(x)).relu())


def test_neurons_that_plain_layers_make_and_read_never_die_and_do_not_come_first() -> None:
    model = Bridge()
    swap_layers(model, 16, exclude=["plain", "read"])
    neuron_map = find_groups(model, ExampleInputs.of(torch.randn(5, 64)))
    neuron_map = replace(neuron_map, groups=neuron_map.of("plain"))
    assert {m.name for m in neuron_map.groups[0].members} == {"plain", "pruned", "read", "read_pruned"}
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in ("pruned", "read_pruned")}
    scores = {name: torch.arange(16.0).view(4, 4) for name in layers}
    live = {name: layer.layout.mask for name, layer in layers.items()}
    selection = select(scores, live, 20)
    figures = GroupFigures([0.0] * 4, None, {})
    neurons = NeuronFigures(model, neuron_map, figures)
    order = whole_neurons_first(neurons, selection, scores, live, dict.fromkeys(layers, 15))
    assert torch.equal(order.order, selection.order)
