"""Edits of a user's policy: the right ones are carried out and counted, a wrong one changes nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynaprune
from dynaprune.pruning.decide.policy import View
from dynaprune.pruning.edit.apply import apply
from dynaprune.pruning.edit.edits import Grow, Release, Resize, Rewire
from tests.pruning.attached import adam, dense_weights, mlp, settings, sparse_layers, train

Decide = Callable[[View], Any]


class Scripted(dynaprune.Policy):
    """One event at step 2, decided by a function."""

    def __init__(self, decide: Decide) -> None:
        self._decide = decide

    def due(self, step: int) -> bool:
        return step == 2

    def decide(self, view: View) -> Any:
        return self._decide(view)


def attached(decide: Decide) -> tuple[nn.Module, torch.optim.Optimizer, dynaprune.Pruner]:
    model = mlp()
    optimizer = adam(model)
    config = settings(policy=Scripted(decide), target_sparsity=None)
    return model, optimizer, dynaprune.attach(model, optimizer, config)


def some(view: View, name: str = "2", count: int = 3) -> Tensor:
    """The first blocks of a layer."""
    chosen = torch.zeros_like(view.layers[name].mask)
    chosen.view(-1)[:count] = True
    return chosen


def test_a_policys_edits_are_carried_out_and_counted() -> None:
    def decide(view: View) -> list[Release | Grow]:
        gone = some(view)
        return [Release({"2": gone}), Grow({"2": gone & (gone.cumsum(1) == 1)}, protected_until=9)]

    model, optimizer, pruner = attached(decide)
    train(model, optimizer, 3)
    report = pruner.report()
    assert (report["removed_untested"], report["blocks_regrown"], report["blocks_removed"]) == (3, 1, 2)
    assert not report["trials"]["tested"] and report["structure_version"] == 2
    state = pruner.structure.layers["2"]
    assert state.protected(8)[0, 0] and not state.protected(9)[0, 0]


NONSENSE: dict[str, tuple[Decide, type[Exception], str]] = {
    "another shape": (
        lambda view: [Release({"2": torch.ones(2, 2, dtype=torch.bool)})],
        ValueError,
        "release: expected a mask of shape (8, 8) for 2, got (2, 2)",
    ),
    "no such layer": (
        lambda view: [Release({"9": some(view)})],
        ValueError,
        "release: expected a pruned layer (0, 2), got '9'",
    ),
    "released twice": (
        lambda view: [Release({"2": some(view)}), Release({"2": some(view)})],
        ValueError,
        "release: block (0, 0) of 2 is dead already (3 such blocks)",
    ),
    "grown alive": (
        lambda view: [Grow({"0": some(view, "0")})],
        ValueError,
        "grow: block (0, 0) of 0 lives already",
    ),
    "no mask": (
        lambda view: [Release({"2": some(view).float()})],
        TypeError,
        "release: expected a bool mask for 2, got torch.float32",
    ),
    "no mapping": (lambda view: [Release(some(view))], TypeError, "release: expected masks by layer"),
    "no edit": (
        lambda view: ["release"],
        TypeError,
        "expected Release, Grow, Rewire, Cut or Resize, got str",
    ),
    "no list": (lambda view: None, TypeError, "expected a list of edits, got NoneType"),
    "no reason": (
        lambda view: [Release({"2": some(view)}, "bored")],
        ValueError,
        "why among passed, forced, untested, got 'bored'",
    ),
    "more go than begin": (
        lambda view: [Rewire({"2": some(view)}, {"2": torch.zeros(8, 8, dtype=torch.bool)})],
        ValueError,
        "rewire: expected as many blocks of 2 to go as to begin, got 3 and 0",
    ),
    "another layer begins": (
        lambda view: [Rewire({"2": some(view)}, {"0": torch.zeros(8, 4, dtype=torch.bool)})],
        ValueError,
        "rewire: expected as many blocks of 2 to go as to begin, got 3 and 0",
    ),
    "begins alive": (
        lambda view: [Rewire({"2": some(view)}, {"2": some(view)})],
        ValueError,
        "rewire: block (0, 0) of 2 lives already (3 such blocks)",
    ),
    "goes dead": (
        lambda view: [Release({"2": some(view)}), Rewire({"2": some(view)}, {"2": some(view)})],
        ValueError,
        "rewire: block (0, 0) of 2 is dead already (3 such blocks)",
    ),
    "no slots": (
        lambda view: [Resize({"2": 0})],
        ValueError,
        "resize: expected 1 to 64 slots for 2, got 0",
    ),
    "too few slots": (
        lambda view: [Resize({"2": 5})],
        ValueError,
        "resize: expected at least the 64 slots in use for 2, got 5",
    ),
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_nonsense_is_named_and_nothing_is_changed(kind: str) -> None:
    decide, error, said = NONSENSE[kind]

    def after_something_right(view: View) -> Any:
        found = decide(view)
        if not isinstance(found, list) or kind == "grown alive":
            return found
        return [Release({"0": some(view, "0", 2)}), *found]

    model, optimizer, pruner = attached(after_something_right)
    train(model, optimizer, 1)
    with pytest.raises(error, match=re.escape(said)):
        train(model, optimizer, 1, start=1)
    assert all(bool(layer.layout.mask.all()) for layer in sparse_layers(model))
    assert pruner.structure_version == 0 and pruner.sparsity == 0
    assert pruner.report()["removed_untested"] == 0


def test_blocks_that_change_places_are_neither_removed_nor_regrown() -> None:
    def decide(view: View) -> list[Release | Rewire]:
        first = some(view, count=6)
        gone = first & (first.cumsum(1) > 3)
        return [Release({"2": gone}), Rewire({"2": first & ~gone}, {"2": gone}, protected_until=9)]

    model, optimizer, pruner = attached(decide)
    train(model, optimizer, 3)
    report = pruner.report()
    assert (report["removed_untested"], report["blocks_swapped"], report["blocks_regrown"]) == (3, 3, 0)
    assert report["blocks_removed"] == 3 and report["structure_version"] == 3
    mask, state = pruner.layers["2"].layout.mask, pruner.structure.layers["2"]
    assert mask.view(-1)[:8].tolist() == [False] * 3 + [True] * 5 and int(mask.sum()) == 61
    assert state.protected(8)[0, 3] and not state.protected(9)[0, 3]


def test_what_a_view_shows_is_a_copy() -> None:
    def decide(view: View) -> list[Release]:
        for layer in view.layers.values():
            layer.mask.zero_()
            layer.protected.fill_(True)
            layer.scores(layer.mask).zero_()
        return []

    model, optimizer, pruner = attached(decide)
    train(model, optimizer, 3)
    assert all(bool(layer.layout.mask.all()) for layer in sparse_layers(model))
    assert not pruner.structure.layers["0"].protected(3).any()


def test_edits_print_what_they_name() -> None:
    mask = torch.tensor([[True, False], [False, True]])
    assert str(Release({"a": mask, "b": ~mask & mask}, "passed")) == "release blocks: 2 of a (passed)"
    assert str(Grow({"a": ~mask & mask})) == "grow blocks: none"
    assert str(Rewire({"a": mask}, {"a": ~mask})) == "rewire blocks: 2 of a"
    assert str(Resize({"a": 3})) == "resize a to 3"
    assert Resize({"a": 3}) == Resize({"a": 3})


def test_a_replayed_edit_makes_the_same_structure() -> None:
    """Edits are values: what one process decides another can carry out."""
    (model, _, first), (twin, _, second) = attached(lambda view: []), attached(lambda view: [])
    gone = torch.zeros(8, 8, dtype=torch.bool)
    gone[::2] = True
    edits = [Release({"2": gone}), Resize({"2": 40})]
    apply(first.structure, edits)
    apply(second.structure, edits)
    assert all(torch.equal(a, b) for a, b in zip(dense_weights(model), dense_weights(twin), strict=True))
    assert sparse_layers(model)[1].layout.capacity == sparse_layers(twin)[1].layout.capacity == 40
