"""The one place that changes a structure: weights, layouts, optimizer state, statistics and copies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynaprune.neurons.carry_out import carry_out
from dynaprune.neurons.cut_copy import cut_copy
from dynaprune.nn.optimizer_state import seed_slots, zero_slots
from dynaprune.pruning.edit.check_edits import check_edits
from dynaprune.pruning.edit.compaction import compact_layer
from dynaprune.pruning.edit.edits import Cut, Edit, Grow, Release, Resize, Rewire
from dynaprune.pruning.edit.layer_state import LayerState
from dynaprune.pruning.edit.structure import Structure
from dynaprune.pruning.observe.layer_flops import layer_flops


@torch.no_grad()
def apply(structure: Structure, edits: Sequence[Edit]) -> None:
    """Carry out ``edits`` in their order, in the model, its optimizers and the copies that follow it.

    Parameters stay the same objects.

    Raises:
        TypeError, ValueError: an edit that does not fit the structure, by name; nothing is changed then.
        RuntimeError: a copy that follows could not follow.
    """
    check_edits(structure, edits)
    for edit in edits:
        match edit:
            case Release():
                _release(structure, edit)
            case Grow():
                _grow(structure, edit)
            case Rewire():
                _release(structure, Release(edit.dropped))
                _grow(structure, Grow(edit.grown, edit.protected_until))
            case Cut():
                _cut(structure, edit)
            case Resize():
                _resize(structure, edit)


def _release(structure: Structure, edit: Release) -> None:
    """Let blocks die: weight, gradient and state become zeros, in the followers too."""
    for name, blocks in edit.masks.items():
        state = structure.layers[name]
        for each in [state.layer, *structure.followers.of(name)]:
            where = blocks.to(each.layout.mask.device)
            zero_slots(_optimizers(structure, state, each), each.values, each.layout.slots_of(where))
            each.layout.release_(where)
        state.forget(blocks)
    structure.version += 1


def _grow(structure: Structure, edit: Grow) -> None:
    """Let dead blocks live, with zero weights or those that wait for them.

    Second moments start at the mean of the layer's live ones.
    """
    for name, blocks in edit.masks.items():
        if not bool(blocks.any()):
            continue
        state = structure.layers[name]
        live = state.layer.layout.slots_of(state.mask)
        for each in [state.layer, *structure.followers.of(name)]:
            where = blocks.to(each.layout.mask.device)
            each.layout.allocate_(where)
            each.layout.check()
            new = each.layout.slots_of(where)
            seed_slots(_optimizers(structure, state, each), each.values, live.to(new.device), new)
        _fill_waiting(structure, state, blocks)
        state.forget(blocks)
        state.protect(blocks, edit.protected_until)
        state.note_born(blocks)
        structure.version += 1


def _fill_waiting(structure: Structure, state: LayerState, blocks: Tensor) -> None:
    """Give new blocks that have not lived before the values that they have in the trained network."""
    if state.waiting is None or structure.pretrained is None:
        return
    returning = blocks.to(state.waiting.device) & (state.waiting >= 0)
    if bool(returning.any()):
        found = structure.pretrained.values(state.name, state.layer, state.waiting[returning])
        for each in [state.layer, *structure.followers.of(state.name)]:
            slots = each.layout.slot_of_block[returning.to(each.layout.mask.device)].long()
            each.values[slots] = found.to(each.values.device, each.values.dtype)
    state.waiting = torch.where(blocks.to(state.waiting.device), -1, state.waiting)


def _cut(structure: Structure, edit: Cut) -> None:
    """Cut neurons out of the model and its copies, and slice what is known of the layers."""
    plan = edit.found.plan
    assert plan is not None
    carry_out(structure.model, plan, [*structure.optimizers, *structure.bystanders])
    structure.groups.cut(plan)
    if structure.neurons.first_flops:
        structure.neurons.note_flops(layer_flops(structure.model, edit.example))
    for name, kept in edit.found.kept.items():
        if name in structure.layers:
            structure.layers[name].keep(kept)
    for copy in structure.followers.models():
        cut_copy(copy, plan, edit.example, like=structure.model)
    structure.version += 1


def _resize(structure: Structure, edit: Resize) -> None:
    """Drop free slots; no block changes."""
    for name, capacity in edit.capacities.items():
        layer = structure.layers[name].layer
        compact_layer(layer, capacity, structure.optimizers, structure.followers.of(name))
        structure.compactions += 1


def _optimizers(structure: Structure, state: LayerState, each: object) -> Sequence[torch.optim.Optimizer]:
    """No optimizer trains a copy."""
    return structure.optimizers if each is state.layer else ()
