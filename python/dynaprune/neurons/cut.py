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

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dynaprune.families.family import counts_in
from dynaprune.neurons.example_inputs import ExampleInputs, InputCapture
from dynaprune.neurons.folding import NORMS, Observation, cannot_fold, contribution, observe
from dynaprune.neurons.groups import (
    Member,
    NeuronGroup,
    NeuronMap,
    find_groups,
)
from dynaprune.neurons.surgery import Surgery, block_mask
from dynaprune.neurons.twin_check import differs, watched_layers
from dynaprune.nn import BlockSparseLayer
from dynaprune.nn.shape import layer_shape

__all__ = [
    "CutPlan",
    "CutReport",
    "ExampleInputs",
    "InputCapture",
    "Kept",
    "NeuronGroup",
    "NeuronMap",
    "blocks_of_group",
    "carry_out",
    "cut_dead_neurons",
    "execute",
    "find_cut",
    "find_groups",
]

_ENOUGH = 2
_FAILS = "the model does not run without them"
_Refuse = Callable[[NeuronGroup, str], None]


class Kept(NamedTuple):
    """What stays of a block-sparse layer, int64, in the old numbering: block rows, block columns, outputs."""

    rows: Tensor
    columns: Tensor
    neurons: Tensor


@dataclass(frozen=True)
class CutPlan:
    """What to cut, in the numbering before: bool masks of outputs and inputs by layer, and folded inputs.

    ``folds``: for each reader that takes up constants, int64 inputs that are constant. ``amounts``: what they
    add to the reader's outputs, float64 ``[out]``.
    """

    layers: dict[str, tuple[Tensor, Tensor]]
    folds: dict[str, Tensor]
    amounts: dict[str, Tensor]


@dataclass
class CutReport:
    """Outcome of :func:`find_cut`; see the module's text."""

    neurons: dict[str, int] = field(default_factory=dict)
    blocks: int = 0
    kept: dict[str, Kept] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    plan: CutPlan | None = None


def blocks_of_group(model: nn.Module, group: NeuronGroup) -> dict[str, Tensor]:
    """The blocks that make and read ``group``, live or not: bool ``[rows, columns]`` by sparse layer."""
    found: dict[str, Tensor] = {}
    for member in group.members:
        layer = model.get_submodule(member.name)
        if isinstance(layer, BlockSparseLayer):
            blocks = found.setdefault(member.name, torch.zeros_like(layer.layout.mask))
            blocks |= _member_blocks(layer, member)
    return found


def _member_blocks(layer: BlockSparseLayer, member: Member) -> Tensor:
    layout = layer.layout
    size, block = (
        (layout.out_features, layout.block[0]) if member.outputs else (layout.in_features, layout.block[1])
    )
    chosen = block_mask(_mask(member.index, size), block).to(layout.mask.device)
    return (chosen.unsqueeze(1) if member.outputs else chosen.repeat(layout.taps)).expand_as(layout.mask)


def _mask(index: Tensor, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.bool).index_fill_(0, index, True)


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
    dead = _Dead(model)
    report = CutReport(refused={n: why for n, why in neuron_map.refused.items() if dead.any_output(n)})
    candidates = [c for g in neuron_map.groups if (c := dead.candidate(g)) is not None]
    candidates = _above_floor(model, candidates, floor, report.refused)
    if not candidates:
        return report
    readers = {m.name for c in candidates for m in c.folded}
    before = observe(model, example, readers, layers=watched_layers(model))
    batch = before
    if readers and any(isinstance(m, NORMS) for m in model.modules()):
        batch = observe(model, example, readers, batch_statistics=True)
    fit = []
    for candidate in candidates:
        if reason := _why_not(model, candidate, before, batch):
            dead.refuse(report, candidate.group, reason)
        else:
            fit.append(candidate)
    trains = bool(fit) and model.training and _runs_in_training(model, example)

    def attempt(chosen: Sequence[_Candidate]) -> str:
        return _try(model, _plan(model, chosen, before), example, before, trains)

    def cut(chosen: Sequence[_Candidate]) -> str:
        reason = attempt(chosen)
        if not reason:
            _enter(report, model, chosen, _plan(model, chosen, before))
        return reason

    def refuse(group: NeuronGroup, reason: str) -> None:
        dead.refuse(report, group, reason)

    if not fit or not cut(fit):
        return report
    fit = _passing_alone(fit, attempt, refuse)
    if fit and (reason := cut(fit)):
        for candidate in fit:
            refuse(candidate.group, f"together with others: {reason}")
    return report


def _enter(report: CutReport, model: nn.Module, candidates: Sequence[_Candidate], plan: CutPlan) -> None:
    """Say in ``report`` that ``candidates`` can be cut."""
    report.plan, report.kept = plan, _kept(model, plan)
    report.blocks = _slots_in(model, report.kept)
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


@dataclass(frozen=True)
class _Candidate:
    """A group that can go, and the readers that take up its constant (none where nothing reads it)."""

    group: NeuronGroup
    folded: tuple[Member, ...]


class _Dead:
    """Which outputs and inputs of the block-sparse layers have no block left, on the CPU.

    Plain layers are never dead: weights that are zero now (a freshly initialised output layer) may train.
    """

    def __init__(self, model: nn.Module) -> None:
        self._of: dict[tuple[str, bool], Tensor] = {}
        for name, layer in _sparse(model).items():
            layout = layer.layout
            held = (layout.slot_of_block >= 0).cpu()
            taps = layout.taps
            rows, columns = ~held.any(1), ~held.view(layout.rows, taps, -1).any(0).any(0)
            self._of[name, True] = rows.repeat_interleave(layout.block[0])[: layout.out_features]
            self._of[name, False] = columns.repeat_interleave(layout.block[1])[: layout.in_features]

    def _member(self, member: Member) -> bool:
        dead = self._of.get((member.name, member.outputs))
        return dead is not None and bool(dead[member.index].all())

    def refuse(self, report: CutReport, group: NeuronGroup, reason: str) -> None:
        """Enter why ``group`` stays, at every layer that has dead outputs in it."""
        makers = (m.name for m in group.members if m.outputs and self._member(m))
        report.refused.update(dict.fromkeys((group.name, *makers), reason))

    def any_output(self, name: str) -> bool:
        """Whether the layer ``name`` has a dead output."""
        dead = self._of.get((name, True))
        return dead is not None and bool(dead.any())

    def candidate(self, group: NeuronGroup) -> _Candidate | None:
        live = tuple(m for m in group.readers if not self._member(m))
        if not live or all(self._member(m) for m in group.producers):
            return _Candidate(group, live)
        return None


def _sparse(model: nn.Module) -> dict[str, BlockSparseLayer]:
    return {n: m for n, m in model.named_modules() if isinstance(m, BlockSparseLayer)}


def _slots_in(model: nn.Module, kept: Mapping[str, Kept]) -> int:
    """Blocks that hold values and do not stay, over all layers."""
    total = 0
    for name, layer in _sparse(model).items():
        if name in kept:
            held = (layer.layout.slot_of_block >= 0).cpu()
            total += int(held.sum() - held[kept[name].rows][:, kept[name].columns].sum())
    return total


def _above_floor(
    model: nn.Module, candidates: list[_Candidate], floor: float, refused: dict[str, str]
) -> list[_Candidate]:
    """Drop the last candidates of layers that would fall below the floor or lose everything."""
    left: dict[str, tuple[int, int]] = {}
    kept = []
    for candidate in candidates:
        name = candidate.group.name
        width = _width(model.get_submodule(name), outputs=True)
        have, least = left.get(name, (width, max(1, math.ceil(floor * width))))
        have -= int(candidate.group.neurons.numel())
        if have < least:
            refused[name] = f"{least} of its {width} outputs stay (floor {floor})"
            continue
        left[name] = (have, least)
        kept.append(candidate)
    return kept


def _width(module: nn.Module, *, outputs: bool) -> int:
    shape = layer_shape(module)
    assert shape is not None
    return shape.out if outputs or not shape.in_ else shape.in_


def _why_not(model: nn.Module, candidate: _Candidate, before: Observation, batch: Observation) -> str:
    if candidate.folded and candidate.group.scaled:
        return "data scales or masks it before it is read: what is constant for one batch is not for another"
    for member in candidate.folded:
        reader = model.get_submodule(member.name)
        averaged = candidate.group.averaged
        if reason := cannot_fold(reader, member.name, member.index, before, batch, averaged=averaged):
            return reason
    return ""


def _plan(model: nn.Module, candidates: Sequence[_Candidate], observed: Observation) -> CutPlan:
    layers: dict[str, tuple[Tensor, Tensor]] = {}
    folds: dict[str, list[Tensor]] = {}
    for candidate in candidates:
        for member in candidate.group.members:
            if member.name not in layers:
                module = model.get_submodule(member.name)
                layers[member.name] = (
                    torch.zeros(_width(module, outputs=True), dtype=torch.bool),
                    torch.zeros(_width(module, outputs=False), dtype=torch.bool),
                )
            layers[member.name][0 if member.outputs else 1][member.index] = True
        for member in candidate.folded:
            folds.setdefault(member.name, []).append(member.index)
    folded = {name: torch.cat(parts).unique() for name, parts in folds.items()}
    return CutPlan(layers, folded, amounts_of(model, folded, observed))


def amounts_of(model: nn.Module, folds: Mapping[str, Tensor], observed: Observation) -> dict[str, Tensor]:
    """What the constants of ``folds`` add to each reader's outputs, as they were ``observed``."""
    return {
        name: contribution(model.get_submodule(name), observed, name, index) for name, index in folds.items()
    }


def _kept(model: nn.Module, plan: CutPlan) -> dict[str, Kept]:
    kept = {}
    for name, (outputs, inputs) in plan.layers.items():
        layer = model.get_submodule(name)
        if isinstance(layer, BlockSparseLayer):
            rows = ~block_mask(outputs, layer.layout.block[0])
            columns = ~block_mask(inputs, layer.layout.block[1])
            kept[name] = Kept(
                *(m.nonzero().squeeze(1) for m in (rows, columns.repeat(layer.layout.taps), ~outputs))
            )
    return kept


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
    candidates: Sequence[_Candidate], attempt: Callable[[Sequence[_Candidate]], str], refuse: _Refuse
) -> list[_Candidate]:
    """The candidates whose cut, tried by layer and taken back, keeps the outputs.

    Layers that differ by the numbers in their names only are tried together first. Where the model does not
    run without neurons of them, nor of the first, nor of the second, it is their common code that knows a
    width by heart, and the others are not tried one by one.
    """
    alike: dict[str, dict[str, list[_Candidate]]] = {}
    for candidate in candidates:
        name = candidate.group.name
        alike.setdefault(re.sub(r"\d+", "*", name), {}).setdefault(name, []).append(candidate)
    passing: list[_Candidate] = []
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
