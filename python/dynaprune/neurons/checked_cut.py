"""Of what may be cut, what can be: each cut is tried on example inputs and taken back where outputs move."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from torch import nn

from dynaprune.neurons.candidates import Candidate
from dynaprune.neurons.carry_out import execute
from dynaprune.neurons.cut_plan import CutPlan, CutReport, kept_of, plan_of, slots_in
from dynaprune.neurons.example_inputs import ExampleInputs
from dynaprune.neurons.folding import Observation, observe
from dynaprune.neurons.groups import NeuronGroup
from dynaprune.neurons.surgery import Surgery
from dynaprune.neurons.twin_check import differs

_ENOUGH = 2
_FAILS = "the model does not run without them"
_Refuse = Callable[[NeuronGroup, str], None]


def enter_what_passes(
    report: CutReport,
    model: nn.Module,
    candidates: Sequence[Candidate],
    example: ExampleInputs,
    before: Observation,
    refuse: _Refuse,
    *,
    silent: bool = False,
) -> None:
    """Enter in ``report`` the cut of all ``candidates`` that keep the outputs. The model stays as it is.

    Args:
        before: the model as it is, with the inputs of all readers that take up constants.
        refuse: gets each group that stays, with the reason.
        silent: the candidates are silent now, and will not be when they are cut.
    """
    trains = bool(candidates) and model.training and _runs_in_training(model, example)

    def attempt(chosen: Sequence[Candidate]) -> str:
        return _try(model, plan_of(model, chosen, before, silent=silent), example, before, trains)

    def cut(chosen: Sequence[Candidate]) -> str:
        reason = attempt(chosen)
        if not reason:
            _enter(report, model, chosen, plan_of(model, chosen, before, silent=silent))
        return reason

    if not candidates or not cut(candidates):
        return
    passing = _passing_alone(candidates, attempt, refuse)
    if passing and (reason := cut(passing)):
        for candidate in passing:
            refuse(candidate.group, f"together with others: {reason}")


def _enter(report: CutReport, model: nn.Module, candidates: Sequence[Candidate], plan: CutPlan) -> None:
    """Say in ``report`` that ``candidates`` can be cut."""
    report.plan, report.kept = plan, kept_of(model, plan)
    report.blocks = slots_in(model, report.kept)
    for candidate in candidates:
        name = candidate.group.name
        report.neurons[name] = report.neurons.get(name, 0) + int(candidate.group.neurons.numel())


def _runs_in_training(model: nn.Module, example: ExampleInputs) -> bool:
    """Whether a forward pass in training mode works with the example inputs."""
    try:
        observe(model, example, training=True)
    except Exception:
        return False
    return True


def _try(
    model: nn.Module,
    plan: CutPlan,
    example: ExampleInputs,
    before: Observation,
    trains: bool,
) -> str:
    """Cut, and take the cut back; say why the model fails then or computes something else."""
    reason = ""
    surgery = Surgery()
    try:
        execute(model, plan, plan.amounts, surgery)
        after = observe(model, example, layers=before.layers)
        reason = differs(before, after, {name: outputs for name, (outputs, _) in plan.layers.items()})
        if not reason and trains:
            observe(model, example, training=True)
    except Exception as error:
        reason = f"{_FAILS}: {type(error).__name__}: {error}"
    finally:
        surgery.undo()
    return reason


def _passing_alone(
    candidates: Sequence[Candidate], attempt: Callable[[Sequence[Candidate]], str], refuse: _Refuse
) -> list[Candidate]:
    """The candidates whose cut, tried by layer and taken back, keeps the outputs.

    Layers that differ by the numbers in their names only are tried together first. Where the model does not
    run without neurons of them, nor of the first, nor of the second, it is their common code that knows a
    width by heart, and the others are not tried one by one.
    """
    alike: dict[str, dict[str, list[Candidate]]] = {}
    for candidate in candidates:
        name = candidate.group.name
        alike.setdefault(re.sub(r"\d+", "*", name), {}).setdefault(name, []).append(candidate)
    passing: list[Candidate] = []
    for layers in alike.values():
        together = [candidate for group in layers.values() for candidate in group]
        reason = attempt(together)
        if not reason:
            passing += together
            continue
        failed = 0
        for place, group in enumerate(layers.values()):
            if failed < _ENOUGH or failed < place:
                reason = attempt(group) if len(layers) > 1 else reason
            if not reason:
                passing += group
                continue
            failed += reason.startswith(_FAILS)
            for candidate in group:
                refuse(candidate.group, reason)
    return passing
