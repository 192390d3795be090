"""Edits that follow from what is dead: neurons to cut out, and capacities to walk down."""

from __future__ import annotations

from dynaprune.neurons.cut import find_cut
from dynaprune.neurons.tracer import NeuronTracer
from dynaprune.nn import BlockSparseLayer
from dynaprune.pruning.edit.compaction import wanted_capacity
from dynaprune.pruning.edit.edits import Cut, Resize
from dynaprune.pruning.edit.structure import Structure


def dead_neurons(structure: Structure, tracer: NeuronTracer, floor: float) -> list[Cut]:
    """The cut of all neurons that are dead or constant; what the model computes stays.

    A model that cannot be traced keeps them: a warning, and ``tracer.refused``, say why.

    Args:
        floor: least share of a layer's outputs that stays.
    """
    if not any(_has_dead_rows_or_columns(state.layer) for state in structure.layers.values()):
        return []
    groups, example = tracer.groups(), tracer.example
    if example is None:
        tracer.say_unseen()
    if groups is None or example is None:
        return []
    found = find_cut(structure.model, groups, example, floor=floor)
    tracer.refused = {**groups.refused, **found.refused}
    return [] if found.plan is None else [Cut(found, example)]


def _has_dead_rows_or_columns(layer: BlockSparseLayer) -> bool:
    layout = layer.layout
    live = layout.mask.view(layout.rows, layout.taps, -1)
    return not bool(live.any(2).any(1).all() & live.any(1).any(0).all())


def spare_slots(structure: Structure, *, exact: bool, growing: bool) -> list[Resize]:
    """The capacities of layers whose live blocks allow fewer slots.

    Args:
        exact: leave no free slot.
        growing: leave some for blocks that return.
    """
    wanted = {
        name: wanted_capacity(state.layer, exact=exact, growing=growing)
        for name, state in structure.layers.items()
    }
    smaller = {n: c for n, c in wanted.items() if c < structure.layers[n].layer.layout.capacity}
    return [Resize(smaller)] if smaller else []
