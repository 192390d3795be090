"""Which blocks of one layer change places, and that the choice is by seed, step and name only."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dynaprune.pruning.decide.drop_and_grow import DropAndGrow
from dynaprune.pruning.decide.policy import LayerView, View
from dynaprune.pruning.decide.swap_choice import droppable, largest, least, random_keys

NAN, INF = float("nan"), float("inf")


def blocks(mask: Tensor) -> list[tuple[int, ...]]:
    return [tuple(at) for at in mask.nonzero().tolist()]


def test_every_row_keeps_its_best_block_and_what_is_protected_stays() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [5.0, 9.0, 7.0], [1.0, 1.0, 1.0], [NAN, 4.0, INF]])
    live = torch.tensor([[1, 1, 1], [0, 1, 0], [1, 1, 0], [1, 1, 1]]).bool()
    protected = torch.zeros_like(live)
    protected[0, 1] = True
    assert blocks(droppable(scores, live, protected)) == [(0, 2), (2, 0), (3, 0), (3, 1)]
    assert blocks(least(scores, live, 3)) == [(0, 1), (2, 0), (2, 1)]
    assert blocks(least(scores, live, 99)) == blocks(live)
    none = torch.zeros_like(live)
    assert not droppable(scores, none, none).any() and not droppable(scores, live, live).any()
    assert blocks(droppable(scores, ~none, none)) == [
        (0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (3, 0), (3, 1),
    ]  # fmt: skip
    assert torch.isnan(scores[3, 0]), "inputs stay as they were"


def test_the_largest_come_first_and_of_equal_ones_the_first() -> None:
    values = torch.tensor([[2.0, 5.0], [5.0, 1.0]])
    among = torch.tensor([[True, True], [True, False]])
    assert blocks(largest(values, among, 1)) == [(0, 1)]
    assert blocks(largest(values, among, 2)) == [(0, 1), (1, 0)]
    assert blocks(largest(values, among, 9)) == blocks(among)
    assert not largest(values, ~among & among, 3).any()


def layer(live: Tensor, *, probe: Tensor | None = None, protected: Tensor | None = None) -> LayerView:
    scores = torch.arange(live.numel(), dtype=torch.float32).view(live.shape)
    return LayerView(
        mask=live,
        protected=torch.zeros_like(live) if protected is None else protected,
        probe=probe,
        capacity=int(live.sum()),
        original=(8 * live.shape[0], 8 * live.shape[1]),
        floor=1,
        floor_share=0.0,
        flops_per_block=1.0,
        scores=lambda _: scores,
        neuron_scores=lambda: torch.zeros(8 * live.shape[0]),
    )


def view(step: int, **layers: LayerView) -> View:
    none = dict.fromkeys(("units", "live_units", "weights", "live_weights"), 1)
    return View(step, layers, **none, losses=None, neurons=lambda: None, whole=lambda: None)


HALF = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 1]]).bool()


def test_gradients_decide_where_blocks_begin_and_scores_which_go() -> None:
    probe = torch.zeros(3, 4)
    probe[0, 3], probe[1, 0], probe[2, 1], probe[2, 2] = 4.0, NAN, INF, 1.0
    policy = DropAndGrow(0.8, 100, 10)
    (edit,) = policy.decide(view(10, a=layer(HALF, probe=probe)))
    assert blocks(edit.dropped["a"]) == [(0, 0), (1, 1)] and blocks(edit.grown["a"]) == [(0, 3), (2, 2)]
    assert edit.protected_until == 21
    assert str(edit) == "rewire blocks: 2 of a"
    assert policy.probes(10) and not policy.probes(9) and not policy.probes(100) and not policy.probes(0)


@pytest.mark.parametrize(
    "stuck",
    [
        layer(torch.ones(3, 4, dtype=torch.bool), probe=torch.ones(3, 4)),
        layer(torch.zeros(3, 4, dtype=torch.bool), probe=torch.ones(3, 4)),
        layer(torch.eye(4, dtype=torch.bool), probe=torch.ones(4, 4)),
        layer(HALF, probe=torch.zeros(3, 4)),
        layer(HALF, probe=torch.ones(3, 4), protected=HALF),
        layer(HALF),
    ],
    ids=["all alive", "all dead", "one a row", "no gradient", "all protected", "no probe"],
)
def test_a_layer_that_cannot_swap_is_left_alone(stuck: LayerView) -> None:
    assert DropAndGrow(0.9, 100, 10).decide(view(10, a=stuck)) == []
    free = layer(HALF, probe=torch.ones(3, 4))
    (edit,) = DropAndGrow(0.9, 100, 10).decide(view(10, a=stuck, b=free))
    assert list(edit.dropped) == list(edit.grown) == ["b"]


def test_random_growth_is_by_seed_step_and_name() -> None:
    live = torch.rand(20, 30, generator=torch.Generator().manual_seed(0)) < 0.5

    def grown(seed: int, step: int, *names: str) -> dict[str, Tensor]:
        torch.rand(3)
        policy = DropAndGrow(0.2, 100, 10, growth="random", seed=seed)
        (edit,) = policy.decide(view(step, **{name: layer(live) for name in names}))
        assert not any((mask & live).any() for mask in edit.grown.values())
        return dict(edit.grown)

    first = grown(0, 10, "a", "b")
    assert torch.equal(first["a"], grown(0, 10, "b", "a")["a"])
    for other in (first["b"], grown(1, 10, "a")["a"], grown(0, 20, "a")["a"]):
        assert not torch.equal(first["a"], other)
    assert not DropAndGrow(0.2, 100, 10, growth="random").probes(10)
    assert torch.equal(random_keys(live.shape, 0, 10, "a"), random_keys(live.shape, 0, 10, "a"))


def test_there_is_at_least_one_event() -> None:
    assert DropAndGrow(0.3, 11, 10).last == 10 and DropAndGrow(0.3, 21, 10).last == 20
    assert DropAndGrow(0.3, 20, 10).last == 10
    with pytest.raises(ValueError, match="fewer than the 10 steps of rewiring, got 10"):
        DropAndGrow(0.3, 10, 10)
