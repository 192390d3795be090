"""Cut neurons out of a network while it trains: later layers shrink too, and what the network computes stays.

For the pruner, in this order (every function is exact: what it cuts changes no output beyond rounding)::

    capture = InputCapture(model); capture.arm()       # or ExampleInputs.of(example_inputs)
    neuron_map = find_groups(model, capture.example)   # after attach, again after every cut: widths changed
    groups = neuron_map.groups                         # neuron_map.refused: {layer: why none may go}

    masks = blocks_of_group(model, group)              # {sparse layer: bool [R, C]}: suspend to try a group;
                                                       # passed: release_ them, and the group is dead
    report = find_cut(model, neuron_map, example, floor=0.02)
    report.kept                                        # {sparse layer: Kept(rows, columns, neurons)}: what
                                                       # is known of the layer is sliced with it
    report.neurons, report.blocks                      # neurons to cut by layer; live blocks that go along
    report.refused                                     # {layer: why dead neurons of it stay}
    carry_out(model, report.plan, optimizers)          # unless the plan is None; and for every copy:
    cut_copy(copy, report.plan, example)

The cost is one forward pass of the example inputs to find groups and two or three for a cut; without a dead
row or column ``find_cut`` runs none. No block may be suspended meanwhile.

Which groups can go without harm:

- nothing reads them: in every reader the blocks (or, in a plain layer, the weights) are dead;
- they are constant: all their producers' rows are dead, so they are ``act(bias)``, and that times the
  readers' weights moves into the readers' biases. The constant comes from a forward pass of the example
  inputs; it must be one over the whole batch and all positions, whichever statistics batch norms use.
  A reader without a bias, or one that pads with zeros, takes no constant but 0: such a group stays, with the
  reason. (No bias is added: a new Parameter would have to enter somebody else's optimizer.)

Attention loses whole heads (see ``families.attention``).

Each cut is tried on the example inputs and taken back where the outputs of the model or of a layer move by
more than rounding or the forward fails, in evaluation or in training mode (code that knows a width by heart):
what a traced graph gets wrong cannot harm.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dynaprune.families.family import counts_in
from dynaprune.neurons.candidates import (
    Candidate,
    DeadUnits,
    above_floor,
    why_not,
)
from dynaprune.neurons.cut_plan import CutPlan, CutReport, kept_of, plan_of, slots_in
from dynaprune.neurons.example_inputs import ExampleInputs
from dynaprune.neurons.folding import NORMS, Observation, observe
from dynaprune.neurons.groups import (
    NeuronGroup,
    NeuronMap,
)
from dynaprune.neurons.surgery import Surgery
from dynaprune.neurons.twin_check import differs, watched_layers

__all__ = ["carry_out", "cut_dead_neurons", "execute", "find_cut"]

_ENOUGH = 2
_FAILS = "the model does not run without them"
_Refuse = Callable[[NeuronGroup, str], None]


def cut_dead_neurons(
    model: nn.Module,
    neuron_map: NeuronMap,
    example: ExampleInputs,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    *,
    floor: float = 0.0,
) -> CutReport:
    """:func:`find_cut`, carried out; ``neuron_map`` is stale afterwards where anything was cut.

    Args:
        optimizers: whose state is cut along.
    """
    report = find_cut(model, neuron_map, example, floor=floor)
    if report.plan is not None:
        carry_out(model, report.plan, optimizers)
    return report


def find_cut(
    model: nn.Module, neuron_map: NeuronMap, example: ExampleInputs, *, floor: float = 0.0
) -> CutReport:
    """Find every group of ``neuron_map`` that nothing reads or that is constant. The model stays as it is.

    Args:
        neuron_map: of the model as it is now.
        example: inputs that the model accepts; constants and the check of the outputs come from them.
        floor: least share of a layer's outputs that stays, in [0, 1); at least one group always does.

    Raises:
        ValueError: a floor outside [0, 1).
    """
    if not 0 <= floor < 1:
        raise ValueError(f"expected a floor in [0, 1), got {floor}")
    dead = DeadUnits(model)
    report = CutReport(refused={n: why for n, why in neuron_map.refused.items() if dead.any_output(n)})
    candidates = [c for g in neuron_map.groups if (c := dead.candidate(g)) is not None]
    candidates = above_floor(model, candidates, floor, report.refused)
    if not candidates:
        return report
    readers = {m.name for c in candidates for m in c.folded}
    before = observe(model, example, readers, layers=watched_layers(model))
    batch = before
    if readers and any(isinstance(m, NORMS) for m in model.modules()):
        batch = observe(model, example, readers, batch_statistics=True)
    fit = []
    for candidate in candidates:
        if reason := why_not(model, candidate, before, batch):
            dead.refuse(report.refused, candidate.group, reason)
        else:
            fit.append(candidate)
    trains = bool(fit) and model.training and _runs_in_training(model, example)

    def attempt(chosen: Sequence[Candidate]) -> str:
        return _try(model, plan_of(model, chosen, before), example, before, trains)

    def cut(chosen: Sequence[Candidate]) -> str:
        reason = attempt(chosen)
        if not reason:
            _enter(report, model, chosen, plan_of(model, chosen, before))
        return reason

    def refuse(group: NeuronGroup, reason: str) -> None:
        dead.refuse(report.refused, group, reason)

    if not fit or not cut(fit):
        return report
    fit = _passing_alone(fit, attempt, refuse)
    if fit and (reason := cut(fit)):
        for candidate in fit:
            refuse(candidate.group, f"together with others: {reason}")
    return report


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


def carry_out(model: nn.Module, plan: CutPlan, optimizers: Iterable[torch.optim.Optimizer] = ()) -> None:
    """Cut what ``plan`` says, with the state of ``optimizers``; an error leaves everything as it was."""
    surgery = Surgery(optimizers)
    try:
        execute(model, plan, plan.amounts, surgery)
    except BaseException:
        surgery.undo()
        raise


def execute(model: nn.Module, plan: CutPlan, amounts: Mapping[str, Tensor], surgery: Surgery) -> None:
    """Fold and cut as ``plan`` says, with these ``amounts`` for the readers' biases."""
    for name, amount in amounts.items():
        reader = model.get_submodule(name)
        if isinstance(reader.bias, nn.Parameter) and bool(amount.any()):
            surgery.add_(reader.bias, amount)
    counts = counts_in(model)
    for name, (outputs, inputs) in plan.layers.items():
        surgery.cut_(model.get_submodule(name), outputs, inputs)
    for each in counts:
        each.set_counts(model, surgery.set_)


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
