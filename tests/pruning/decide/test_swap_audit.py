"""The audit of swaps: which events, which candidate sets, what counts as failed; nothing is charged."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from dynaprune.pruning.decide.swap_audit import SwapAudit
from dynaprune.pruning.decide.swap_choice import spread
from dynaprune.pruning.decide.trial_rules import TrialRules

SAMPLES = 512


class Blocks:
    """A model whose loss of 1 rises by ``harm`` with each suspended block, give or take a little."""

    def __init__(self, harm: float) -> None:
        self.harm, self.tried = harm, list[dict[str, int]]()
        generator = torch.Generator().manual_seed(0)
        self.losses = 2 * torch.rand(SAMPLES, generator=generator, dtype=torch.float64)
        noise = torch.randn(SAMPLES, generator=generator, dtype=torch.float64)
        self.noise = 1e-3 * (noise - noise.mean())

    def __call__(self, masks: Mapping[str, Tensor]) -> Tensor:
        gone = {name: int(mask.sum()) for name, mask in masks.items()}
        self.tried.append(gone)
        return self.losses + self.harm * sum(gone.values()) + self.noise * bool(gone)


def drops(**counts: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Scores and chosen blocks of layers of 3x8 blocks: the last ones, the very last scores least."""
    scores = {name: -torch.arange(24.0).view(3, 8) for name in counts}
    chosen = {name: (torch.arange(24) >= 24 - count).view(3, 8) for name, count in counts.items()}
    return scores, chosen


def test_any_prefix_has_the_same_share_of_every_layer_and_the_least_scores() -> None:
    selection = spread(*drops(a=8, b=0, c=16))
    assert len(selection) == 24
    for share in (0, 3, 6, 12, 24):
        first = selection.first(share)
        assert {name: int(mask.sum()) for name, mask in first.items()} == {
            "a": share // 3,
            "b": 0,
            "c": 2 * share // 3,
        }
        for mask in first.values():
            assert torch.equal(mask.view(-1).sort().values, mask.view(-1)), "the last blocks score least"


def test_audits_are_spread_evenly() -> None:
    def numbers(wanted: int, among: int) -> list[int]:
        audit = SwapAudit(TrialRules(), wanted, among)
        return [number for number in range(among + 2) if audit.due(number)]

    assert numbers(0, 20) == []
    assert numbers(1, 20) == [11] and numbers(1, 1) == [1]
    assert numbers(3, 12) == [3, 7, 11]
    assert numbers(4, 20) == [3, 8, 13, 18]
    assert numbers(12, 12) == numbers(99, 12) == list(range(1, 13))


@pytest.mark.parametrize(("harm", "failed"), [(0.0, 0), (0.0009, 4), (0.1, 12)])
def test_what_is_not_in_the_largest_set_that_passes_has_failed(harm: float, failed: int) -> None:
    """12 blocks, then 6, then 3. The tolerance is a hundredth of the loss of 1."""
    audit, model = SwapAudit(TrialRules(), 1, 1), Blocks(harm)
    audit.run(7, spread(*drops(a=4, b=8)), model)
    told = audit.report()
    # 12 x 0.0009 is above the tolerance, 6 x 0.0009 below it.
    expected = {0.0: [12], 0.0009: [12, 6], 0.1: [12, 6, 3]}[harm]
    assert [sum(gone.values()) for gone in model.tried] == [0, *expected]
    assert model.tried[1] == {"a": 4, "b": 8}
    failed = 12 - (0 if harm == 0.1 else expected[-1])
    assert (told["blocks_tested"], told["blocks_failed"]) == (12, failed)
    assert (told["count"], told["failed"]) == (1, int(failed > 0))
    (event,) = told["events"]
    assert event["step"] == 7 and event["dropped"] == event["tested"] == 12 and event["samples"] == SAMPLES
    assert len(event["p_values"]) == len(expected) and told["seconds"] >= event["seconds"] > 0
    assert json.loads(json.dumps(told)) == told


def test_every_event_has_the_whole_tolerance() -> None:
    """Each drop costs most of an event's tolerance: the third of them would exceed any common allowance."""
    rules = TrialRules(allowance=0.015, absolute_tolerance=0.0)
    audit, model = SwapAudit(rules, 9, 9), Blocks(0.009 / 12)
    for step in range(9):
        audit.run(step, spread(*drops(a=4, b=8)), model)
    assert audit.report()["blocks_failed"] == 0
    tolerances = [event["tolerance"] for event in audit.events]
    assert tolerances == [pytest.approx(0.01 * float(model.losses.mean()))] * 9


def test_what_could_not_be_tested_did_not_fail() -> None:
    audit, model = SwapAudit(TrialRules(), 2, 2), Blocks(0.1)
    model.losses[:100] = float("nan")
    audit.run(1, spread(*drops(a=4)), model)
    told = audit.report()
    assert (told["blocks_tested"], told["blocks_failed"], told["failed"]) == (0, 0, 0)
    assert not told["events"][0]["usable"] and told["events"][0]["dropped"] == 4
    audit = SwapAudit(TrialRules(allowance=0.0), 1, 1)
    audit.run(1, spread(*drops(a=4)), Blocks(0.0))
    assert audit.report()["blocks_tested"] == 0 and "tolerance is 0" in audit.events[0]["reason"]


def test_it_goes_on_from_its_state() -> None:
    whole, model = SwapAudit(TrialRules(), 2, 2), Blocks(0.0009)
    whole.run(1, spread(*drops(a=4, b=8)), model)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = SwapAudit(TrialRules(), 2, 2)
    resumed.load_state_dict(state)
    for audit in (whole, resumed):
        model.losses = model.losses / 100  # ln C stays that of the first event
        audit.run(2, spread(*drops(a=4, b=8)), model)
        model.losses = model.losses * 100
    one, other = (
        [{k: v for k, v in event.items() if k != "seconds"} for event in audit.events]
        for audit in (whole, resumed)
    )
    assert one == other and len(one) == 2
