"""Which whole neurons go, in what order and how many: beside counting the weights of real matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dynaprune.pruning.decide.gradual_neurons import GradualNeurons
from dynaprune.pruning.decide.neuron_choice import Choice, Unit, Width, choose, in_order, saved_flops
from dynaprune.pruning.decide.pace import CubicPace
from dynaprune.pruning.decide.policy import View, WholeNeurons
from dynaprune.pruning.decide.trial_rules import TrialRules

INPUTS, FIRST, SECOND, CLASSES = 6, 10, 8, 3
TOKENS = 5


def widths(least: int = 1) -> dict[str, Width]:
    """6-10-8-3: two hidden layers and a classifier."""
    sizes = {"a": (FIRST, INPUTS), "b": (SECOND, FIRST), "c": (CLASSES, SECOND)}
    return {name: Width(out, in_, 1.0, TOKENS, least) for name, (out, in_) in sizes.items()}


def units(seed: int = 0) -> list[Unit]:
    """Every hidden neuron: its row, and its column in the layer behind."""
    scores = torch.rand(FIRST + SECOND, generator=torch.Generator().manual_seed(seed)).tolist()
    first = [Unit(n, "a", scores[n], 1, {"a": (1, 0), "b": (0, 1)}) for n in range(FIRST)]
    second = [Unit(n, "b", scores[n], 1, {"b": (1, 0), "c": (0, 1)}) for n in range(FIRST, FIRST + SECOND)]
    return [*first, *second]


def weights_without(gone: Sequence[Unit]) -> int:
    """Of the real matrices, what no unit of ``gone`` has a row or column of."""
    sizes = {"a": (FIRST, INPUTS), "b": (SECOND, FIRST), "c": (CLASSES, SECOND)}
    masks = {name: torch.ones(size, dtype=torch.bool) for name, size in sizes.items()}
    for unit in gone:
        neuron = unit.number - (FIRST if unit.name == "b" else 0)
        masks[unit.name][neuron] = False
        masks["b" if unit.name == "a" else "c"][:, neuron] = False
    return sum(int(mask.sum()) for mask in masks.values())


def test_the_weights_that_go_are_those_of_rows_and_columns() -> None:
    ordered = in_order(units(), widths())
    everything = weights_without([])
    for wish in (0, 1, 17, 50, 90):
        choice = choose(ordered, widths(), wish)
        for count in range(len(choice.units) + 1):
            assert choice.weights(count) == everything - weights_without(choice.units[:count])
        gone = choice.weights(len(choice.units))
        assert gone >= wish and (not wish or choice.weights(len(choice.units) - 1) < wish)
        assert choice.reaching(wish) == len(choice.units)
    assert choice.reaching(0) == 0 and choice.reaching(math.inf) == len(choice.units)


@pytest.mark.parametrize("least", [1, 3])
def test_every_layer_keeps_its_floor(least: int) -> None:
    choice = choose(in_order(units(), widths(least)), widths(least), math.inf)
    names = [unit.name for unit in choice.units]
    assert names.count("a") == FIRST - least and names.count("b") == SECOND - least


def test_the_order_is_by_score_per_flop_saved() -> None:
    found = in_order(units(), widths())
    saved = {"a": 6 * TOKENS * (INPUTS + SECOND), "b": 6 * TOKENS * (FIRST + CLASSES)}
    assert all(saved_flops(unit, widths()) == saved[unit.name] for unit in found)
    ratios = [unit.score / saved[unit.name] for unit in found]
    assert ratios == sorted(ratios)
    negative = [Unit(n, u.name, -u.score, 1, u.sides) for n, u in enumerate(units())]
    ratios = [unit.score * saved[unit.name] for unit in in_order(negative, widths())]
    assert ratios == sorted(ratios)


def test_a_uniform_order_takes_the_same_share_of_every_layer() -> None:
    found = in_order(units(), widths(), "uniform")
    assert sorted(unit.number for unit in found) == [unit.number for unit in units()]
    for count in range(len(found)):
        names = [unit.name for unit in found[:count]]
        assert abs(names.count("a") / FIRST - names.count("b") / SECOND) <= 0.5 / FIRST + 0.5 / SECOND
    for name in ("a", "b"):
        scores = [unit.score for unit in found if unit.name == name]
        assert scores == sorted(scores)


def test_a_uniform_order_counts_what_is_gone_and_rounds_heads_to_the_nearest() -> None:
    """Four of twelve heads are gone, and none of a hundred neurons: at 40% of both five heads are."""
    heads = [Unit(n, "value", 1.0, 32, {"value": (32, 0)}) for n in range(8)]
    neurons = [Unit(8 + n, "up", 1.0, 1, {"up": (1, 0)}) for n in range(100)]
    sizes = {"value": Width(256, 10, first=384), "up": Width(100, 10)}
    names = [unit.name for unit in in_order([*heads, *neurons], sizes, "uniform")]
    assert names[:30] == ["up"] * 30 and names[: 30 + 8].count("value") == 1
    assert names[:41].count("up") == 40 and names[:49].count("value") == 2


def test_depthwise_weights_and_blocks_that_are_gone_count_as_they_are() -> None:
    unit = Unit(0, "expand", 1.0, 1, {"expand": (1, 0), "depth": (1, 0), "project": (0, 1)})
    sizes = {
        "expand": Width(48, 16, 0.5, 4),  # block-sparse, half of it live
        "depth": Width(48, 1, 9.0, 4),
        "project": Width(16, 48, 1.0, 2),
    }
    assert saved_flops(unit, sizes) == 6 * (16 * 0.5 * 4 + 9 * 4 + 16 * 2)
    assert choose([unit], sizes, 1).gone == [16 * 0.5 + 9 + 16]


class Network:
    """What a policy sees of 6-10-8-3: its losses rise by ``harm`` per silent neuron."""

    def __init__(self, harm: float = 0.0, stay: Sequence[int] = ()) -> None:
        self.harm, self.stay, self.tried = harm, set(stay), list[int]()

    def losses(self, silent: Sequence[Unit]) -> Tensor:
        self.tried.append(len(silent))
        noise = torch.linspace(-1, 1, 1024, dtype=torch.float64)
        return 1 + 0.01 * noise + self.harm * len(silent)

    def view(self, step: int, *, tested: bool = True) -> View:
        everything = weights_without([])
        whole = WholeNeurons(
            units(),
            widths(),
            self.losses if tested else None,
            lambda chosen: {unit.number for unit in chosen} & self.stay,
            lambda chosen, why: (list(chosen), list(why)),  # type: ignore[arg-type, return-value]
            everything,
            everything,
        )
        return View(step, {}, 0, 0, everything, everything, None, lambda: None, lambda: whole)


def policy(**changes: Any) -> GradualNeurons:
    return GradualNeurons(CubicPace(0.5, 0.0, 0.5, 100, 5), TrialRules(), **changes)


def decided(network: Network, step: int, **changes: Any) -> tuple[list[Unit], list[str]]:
    found: Any = policy().decide(network.view(step, **changes))
    return found[0] if found else ([], [])


def test_what_passes_the_trial_goes() -> None:
    network = Network()
    chosen, why = decided(network, 10)
    wish = math.ceil(0.5 * (1 - 0.8**3) * weights_without([]))
    assert why == ["passed"] * len(chosen)
    assert chosen == choose(in_order(units(), widths()), widths(), wish).units
    assert network.tried == [0, len(chosen)]


def test_what_fails_stays_until_the_backlog_is_large() -> None:
    network = Network(harm=0.1)
    assert decided(network, 1) == ([], [])  # a wish of less than a twentieth
    chosen, why = decided(network, 20)
    everything = weights_without([])
    assert set(why) == {"forced"} and network.tried == [0, 1, 0, 6, 3, 1]
    forced = everything - weights_without(chosen)
    assert 0.1 * everything <= forced < 0.1 * everything + INPUTS + SECOND


def test_without_a_trial_everything_goes_untested() -> None:
    network = Network()
    chosen, why = decided(network, 10, tested=False)
    assert set(why) == {"untested"} and not network.tried
    assert chosen == decided(Network(), 10)[0]


def test_neurons_that_cannot_be_cut_are_replaced_by_the_next() -> None:
    first = decided(Network(), 10)[0]
    stay = [unit.number for unit in first[:2]]
    chosen, _ = decided(Network(stay=stay), 10)
    assert not {unit.number for unit in chosen} & set(stay)
    gone = weights_without([]) - weights_without(chosen)
    assert gone >= math.ceil(0.5 * (1 - 0.8**3) * weights_without([]))
    assert decided(Network(stay=range(FIRST + SECOND)), 10) == ([], [])


def test_a_share_leaves_the_rest_to_others() -> None:
    whole: Any = policy().decide(Network().view(50))
    half: Any = policy(share=0.5).decide(Network().view(50))
    assert 0 < len(half[0][0]) < len(whole[0][0])


def test_the_state_goes_along() -> None:
    before = policy()
    before.decide(Network().view(10))
    after = policy()
    after.load_state_dict(before.state_dict())
    assert after.state_dict() == before.state_dict()
    assert after.trials is not None and after.trials.state.events == 1


def test_nothing_chosen_weighs_nothing() -> None:
    assert Choice().weights(0) == 0 and Choice().reaching(3) == 0
