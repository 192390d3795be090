"""Whole neurons as a policy sees them: those that may go, what they are worth, and the loss without them."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

from dynaprune.neurons.cut_plan import CutReport
from dynaprune.neurons.groups import NeuronGroup, NeuronMap
from dynaprune.neurons.silence import silenced_outputs, silent_outputs
from dynaprune.neurons.silent_cut import find_silent_cut
from dynaprune.neurons.tracer import NeuronTracer
from dynaprune.nn import BlockSparseLayer
from dynaprune.nn.shape import layer_shape, original_widths
from dynaprune.pruning.config import PruningConfig
from dynaprune.pruning.decide.neuron_choice import Unit, Width
from dynaprune.pruning.decide.policy import WholeNeurons
from dynaprune.pruning.decide.trial import Trial
from dynaprune.pruning.edit.edits import Cut
from dynaprune.pruning.edit.structure import Structure
from dynaprune.pruning.event_losses import EventLosses
from dynaprune.pruning.observe.layer_flops import layer_flops
from dynaprune.pruning.observe.score import Score
from dynaprune.pruning.settings import FLOPS


def know_neurons(structure: Structure, tracer: NeuronTracer) -> NeuronMap | None:
    """Find the neurons that may go, and what they hold; None where the model cannot be traced yet."""
    neuron_map, model, units = tracer.groups(), structure.model, structure.neurons
    if neuron_map is None:
        return None
    structure.groups.watch(model, neuron_map, structure.optimizers)
    closed = structure.groups.closed()
    if not units.known:
        groups = [g for number, g in enumerate(neuron_map.groups) if number not in closed]
        groups = [group for group in groups if units.may_go(model, group)]
        if tracer.example is not None:
            units.refused.update(find_silent_cut(model, _one_of_each(groups), tracer.example).refused)
        units.know(model, [group for group in groups if units.may_go(model, group)])
        if not structure.layers and tracer.example is not None:
            units.note_flops(layer_flops(model, tracer.example))
    unseen = {neuron_map.groups[number].name: reason for number, reason in closed.items()}
    tracer.refused = {**neuron_map.refused, **unseen, **units.refused}
    return neuron_map


def _one_of_each(groups: Sequence[NeuronGroup]) -> list[NeuronGroup]:
    """The first group of every layer that has several: what tells whether its neurons can go at all."""
    by_layer: dict[str, list[NeuronGroup]] = {}
    for group in groups:
        by_layer.setdefault(group.name, []).append(group)
    return [found[0] for found in by_layer.values() if len(found) > 1]


def whole_neurons(
    structure: Structure, score: Score, trial: Trial | None, tracer: NeuronTracer, config: PruningConfig
) -> WholeNeurons | None:
    """What a policy may decide of whole neurons; None where the model cannot be traced."""
    neuron_map, example = know_neurons(structure, tracer), tracer.example
    if neuron_map is None or example is None:
        return None
    groups, model = neuron_map.groups, structure.model

    @cache
    def tried(numbers: tuple[int, ...]) -> CutReport:
        return find_silent_cut(model, [groups[number] for number in numbers], example)

    def stay(units: Sequence[Unit]) -> set[int]:
        return {u.number for u in units if not structure.neurons.may_go(model, groups[u.number])}

    def cannot_go(units: Sequence[Unit]) -> set[int]:
        refused = tried(tuple(unit.number for unit in units)).refused
        structure.neurons.refused.update(refused)
        tracer.refused.update(refused)
        return stay(units)

    def cut(units: Sequence[Unit], why: Sequence[str]) -> Cut | None:
        found, kept = tried(tuple(unit.number for unit in units)), stay(units)
        counts: dict[str, int] = {}
        for unit, reason in zip(units, why, strict=True):
            if unit.number not in kept:
                counts[reason] = counts.get(reason, 0) + unit.neurons
        return None if found.plan is None else Cut(found, example, counts)

    scores = structure.groups.scores(score)
    weighty = {name for name, (_, inputs) in neuron_map.widths.items() if inputs}
    units = [
        _unit(weighty, number, group, worth)
        for number, (group, worth) in enumerate(zip(groups, scores, strict=True))
        if worth is not None and structure.neurons.may_go(model, group)
    ]
    return WholeNeurons(
        units,
        _widths(structure, units, config),
        None if trial is None else _losses_without(structure, trial, groups),
        cannot_go,
        cut,
        *_counted(structure, config),
    )


def _counted(structure: Structure, config: PruningConfig) -> tuple[int, int]:
    """How much there was at first, and how much is left, of what the target is a share of."""
    if config.target_of != FLOPS:
        return structure.weights, structure.live_weights
    return structure.neurons.first_flops, sum(structure.neurons.flops.values())


def _unit(weighty: Container[str], number: int, group: NeuronGroup, score: float) -> Unit:
    """The unit that a group is; ``weighty`` are the layers that hold more than a vector."""
    sides: dict[str, tuple[int, int]] = {}
    for member in group.members:
        if member.name not in weighty:
            continue
        outputs, inputs = sides.get(member.name, (0, 0))
        count = member.index.numel()
        sides[member.name] = (outputs + count, inputs) if member.outputs else (outputs, inputs + count)
    return Unit(number, group.name, score, group.neurons.numel(), sides)


def _widths(structure: Structure, units: Sequence[Unit], config: PruningConfig) -> dict[str, Width]:
    found = {}
    for name in {name for unit in units for name in unit.sides}:
        layer: Any = structure.model.get_submodule(name)
        shape = layer_shape(layer)
        assert shape is not None
        first, _ = original_widths(layer) or (shape.out, shape.in_)
        pairs = shape.out * (shape.in_ // shape.groups)
        held = layer.live_values() if isinstance(layer, BlockSparseLayer) else layer.weight.numel()
        tokens = max(structure.tokens.get(name, 1), 1)
        if config.target_of == FLOPS:
            held, tokens = structure.neurons.flops.get(name, 0), 1
        found[name] = Width(
            shape.out,
            shape.in_ // shape.groups,
            held / pairs,
            tokens,
            max(1, math.ceil(config.floor_of(name) * first - 1e-9)),
            first,
        )
    return found


def _losses_without(
    structure: Structure, trial: Trial, groups: Sequence[NeuronGroup]
) -> EventLosses[Sequence[Unit]]:
    """``losses(units)`` of one event, while these are silent."""

    def suspended(units: Sequence[Unit]) -> AbstractContextManager[None]:
        model = structure.model
        return silent_outputs(model, silenced_outputs(model, [groups[unit.number] for unit in units]))

    return EventLosses(structure, trial, suspended)
