"""The cut of neurons that still do something: what the network computes without them is what stays.

The twin to compare with is the network in which they are silent (``dynaprune.neurons.silence``). All else is
as for dead neurons (``dynaprune.neurons.cut``): constants move into the readers' biases, and what a traced
graph gets wrong is taken back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dynaprune.neurons.candidates import Candidate
from dynaprune.neurons.checked_cut import enter_what_passes
from dynaprune.neurons.cut_plan import CutReport
from dynaprune.neurons.example_inputs import ExampleInputs
from dynaprune.neurons.folding import NORMS, Observation, cannot_fold, constants, observe
from dynaprune.neurons.groups import NeuronGroup
from dynaprune.neurons.silence import silenced_outputs, silent_outputs
from dynaprune.neurons.twin_check import watched_layers

_SCALED = "data scales or masks it before it is read: what is constant for one batch is not for another"


def find_silent_cut(model: nn.Module, groups: Sequence[NeuronGroup], example: ExampleInputs) -> CutReport:
    """The cut of ``groups`` as if they were silent; in ``refused`` the layers whose groups stay, with the
    reason. The model stays as it is, bit for bit.

    Args:
        groups: of the model as it is now, in any number; each layer keeps an output and an input without
            them.
        example: inputs that the model accepts; constants and the check of the outputs come from them.
    """
    report = CutReport()
    if not groups:
        return report
    candidates = [Candidate(group, tuple(group.readers)) for group in groups]
    readers = {member.name for candidate in candidates for member in candidate.folded}

    def refuse(group: NeuronGroup, reason: str) -> None:
        report.refused.update(dict.fromkeys((member.name for member in group.producers), reason))

    with silent_outputs(model, silenced_outputs(model, groups)):
        before = observe(model, example, readers, layers=watched_layers(model))
        batch = before
        if any(isinstance(module, NORMS) for module in model.modules()):
            batch = observe(model, example, readers, batch_statistics=True)
        reasons = _cannot_fold(model, candidates, before, batch)
        fit = []
        for candidate in candidates:
            found = (reasons.get(key) for key in _folds(candidate))
            if reason := next(filter(None, found), ""):
                refuse(candidate.group, reason)
            else:
                fit.append(candidate)
        enter_what_passes(report, model, fit, example, before, refuse, silent=True)
    return report


_Fold = tuple[str, bool, bool]


def _folds(candidate: Candidate) -> list[_Fold]:
    """The readers that take up the group's constant, each with what is known of the way to it."""
    return [(member.name, candidate.group.averaged, candidate.group.scaled) for member in candidate.folded]


def _cannot_fold(
    model: nn.Module, candidates: Sequence[Candidate], before: Observation, batch: Observation
) -> dict[_Fold, str]:
    """Why readers cannot take up constants: what holds for one neuron of a kind holds for all of them."""
    inputs: dict[_Fold, list[Tensor]] = {}
    for candidate in candidates:
        for key, member in zip(_folds(candidate), candidate.folded, strict=True):
            inputs.setdefault(key, []).append(member.index)
    reasons = {}
    for (name, averaged, scaled), parts in inputs.items():
        index = torch.cat(parts)
        reason = cannot_fold(model.get_submodule(name), name, index, before, batch, averaged=averaged)
        if not reason and scaled and bool(constants(before, name, index).any()):
            reason = _SCALED
        reasons[name, averaged, scaled] = reason
    return reasons
