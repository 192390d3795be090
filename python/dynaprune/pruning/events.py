"""One pruning event: what goes by trial, by force or untested, what grows back, and what is compacted."""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynaprune.neurons.cut import cut_dead_neurons
from dynaprune.neurons.cut_copy import cut_copy
from dynaprune.neurons.groups import NeuronMap, find_groups
from dynaprune.nn import BlockSparseLayer
from dynaprune.nn.calibration_mode import calibration_mode
from dynaprune.nn.optimizer_state import seed_slots, zero_slots
from dynaprune.pruning.decide.allocation import Selection, select
from dynaprune.pruning.decide.growth import growth_fraction, select_growth
from dynaprune.pruning.decide.neuron_order import GroupFigures, whole_neurons_first
from dynaprune.pruning.decide.trial import Evaluation, TrialEvent, candidate_sizes, run_event
from dynaprune.pruning.edit.compaction import compact_layer, wanted_capacity
from dynaprune.pruning.edit.stale_copies import refuse_stale

if TYPE_CHECKING:
    from dynaprune.pruning.pruner import Pruner


_WHOLE_MODEL = "the whole model"
_NO_INPUTS = (
    "no training batch was seen (the model runs compiled, or not in training mode): give attach its "
    "example_inputs"
)
UNUSABLE_IN_A_ROW = 3


@dataclass
class Removals:
    """What went so far, in units, by why it went.

    ``with_neurons``: live blocks that only read or made dead neurons and went along with them, which changes
    no output. ``neurons_refused``: layers of which dead neurons stay, with the reason.
    """

    passed: int = 0
    forced: int = 0
    untested: int = 0
    grown: int = 0
    with_neurons: int = 0
    neurons: int = 0
    neurons_refused: dict[str, str] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)


def block_weights(layer: BlockSparseLayer) -> Tensor:
    """Number of weights that each block holds inside the dense weight: float64 ``[rows, columns]``."""
    layout = layer.layout
    bo, bi = layout.block
    groups, taps = (layout.conv.groups, layout.conv.taps) if layout.conv else (1, 1)
    device = layout.mask.device
    rows = torch.full((layout.rows,), bo, dtype=torch.float64, device=device)
    rows[-1] = layout.out_features - (layout.rows - 1) * bo
    inputs, channel_blocks = layout.in_features // groups, layout.columns // taps
    columns = torch.full((channel_blocks,), bi, dtype=torch.float64, device=device)
    columns[-1] = inputs - (channel_blocks - 1) * bi
    return rows.unsqueeze(1) * columns.repeat(taps)


def run_pruning_event(pruner: Pruner) -> None:
    """Remove, regrow and compact, as the pruner's configuration, score, pace and trial say."""
    config, step = pruner.config, pruner.steps
    total, live = pruner.units_total, pruner.units_live()
    wish = pruner.pace.wish(step, total, live)
    growing = min(round(_growth_share(pruner) * wish), _growable(pruner))
    asked = min(wish + growing, live)
    refuse_stale(pruner.layers, final=pruner.nothing_left())
    pruner.check_state()
    before = pruner.structure_version
    with pruner.followers.in_step(pruner.model, pruner.layers):
        if asked > 0:
            removed = _remove(pruner, asked, total, live)
            if growing:
                _regrow(pruner, min(growing, removed), step)
        if config.neurons and pruner.structure_version != before:
            cut_neurons(pruner)
        if config.compact:
            compact(pruner)
    if pruner.structure_version != before:
        pruner.record_structure()


def _growth_share(pruner: Pruner) -> float:
    config = pruner.config
    if config.regrow == 0 or not pruner.probes or config.total_steps is None:
        return 0.0
    return growth_fraction(pruner.steps, max(1, math.floor(config.end * config.total_steps)), config.regrow)


def _growable(pruner: Pruner) -> int:
    """Dead blocks that the probe found a gradient at."""
    return sum(int((torch.isfinite(norms) & (norms > 0)).sum()) for norms in pruner.probes.values())


def _selection(pruner: Pruner, count: int, *, whole_neurons: bool = False) -> Selection:
    """The next ``count`` blocks to go; with ``whole_neurons`` those first that make or read whole neurons."""
    config, layers = pruner.config, pruner.layers
    protected = pruner.protection.masks(pruner.steps)
    for name, layer in layers.items():
        if name not in pruner.observed.layers:
            protected[name] = layer.layout.mask
    scores = {name: pruner.score.scores(name, layer) for name, layer in layers.items()}
    live = {name: layer.layout.mask for name, layer in layers.items()}
    floors = {name: config.floors.get(name, config.floor) for name in layers}
    selection = select(
        scores,
        live,
        count,
        allocation=config.allocation,
        floors=floors,
        original=pruner.original_shapes,
        cost=pruner.unit_costs() if config.cost == "flops" else None,
        protected=protected,
    )
    neuron_map = neuron_map_of(pruner) if whole_neurons else None
    if neuron_map is None:
        return selection
    least = {name: max(1, math.ceil(floors[name] * layer.layout.blocks)) for name, layer in layers.items()}
    return whole_neurons_first(
        pruner.model,
        selection,
        neuron_map,
        scores,
        _group_figures(pruner, neuron_map),
        {name: mask & ~protected[name] if name in protected else mask for name, mask in live.items()},
        {name: max(0, layer.layout.live_count() - least[name]) for name, layer in layers.items()},
    )


def _group_figures(pruner: Pruner, neuron_map: NeuronMap) -> GroupFigures:
    score = pruner.score
    if not score.of_gates:
        neurons = {name: score.neuron_scores(name, layer) for name, layer in pruner.layers.items()}
        return GroupFigures((), neurons, pruner.rows)
    pruner.groups.watch(pruner.model, neuron_map, pruner.optimizers)
    return GroupFigures(pruner.groups.scores(score), None, pruner.rows)


def neuron_map_of(pruner: Pruner) -> NeuronMap | None:
    """The model's groups of neurons, traced again only after a cut; None where the model cannot be traced."""
    example, refused = pruner.example(), pruner.removals.neurons_refused
    if example is None or refused.get(_WHOLE_MODEL, _NO_INPUTS) != _NO_INPUTS:
        return None
    if pruner.neuron_map is not None and not pruner.neuron_map.fits(pruner.model):
        pruner.neuron_map = None
    if pruner.neuron_map is None:
        try:
            pruner.neuron_map = find_groups(pruner.model, example)
        except Exception as error:
            refused[_WHOLE_MODEL] = f"the model cannot be traced: {type(error).__name__}: {error}"
            warnings.warn(
                f"dead neurons stay in the network: {refused[_WHOLE_MODEL]}", RuntimeWarning, stacklevel=2
            )
    return pruner.neuron_map


def _remove(pruner: Pruner, wish: int, total: int, live: int) -> int:
    """Remove up to ``wish`` units and say how many went."""
    removals, step = pruner.removals, pruner.steps
    selection = _selection(pruner, wish, whole_neurons=pruner.tries_neurons)
    found = len(selection)
    if found == 0:
        return 0
    if pruner.trial is None:
        release(pruner, selection.first(found))
        removals.untested += found
        return found
    event = _try(pruner, selection)
    _say_unusable(pruner, event)
    accepted = event.accepted_size or 0
    if accepted:
        release(pruner, selection.first(accepted))
        removals.passed += accepted
    backlog = wish - accepted
    forced = min(pruner.pace.forced(step, total, max(0, live - accepted), backlog), found - accepted)
    if not event.usable:
        forced = 0  # a trial that says nothing is no reason to remove anything
    if forced > 0:
        remaining = _selection(pruner, forced)
        forced = len(remaining)
        release(pruner, remaining.first(forced))
        removals.forced += forced
    summary = {key: value for key, value in event.as_dict().items() if key != "rungs"}
    p_values = [rung.test.p_value for rung in event.rungs]
    removals.events.append(
        {"step": step, "wish": wish, "passed": accepted, "forced": forced, "p_values": p_values, **summary}
    )
    return accepted + forced


def _say_unusable(pruner: Pruner, event: TrialEvent) -> None:
    """Warn of the first trial without usable losses; the third in a row is an error."""
    state = pruner.trial_state
    if event.usable:
        return
    said = (
        f"the trial at step {pruner.steps} says nothing: {event.reason}. Nothing is removed on its account. "
        "Look for samples with NaN or infinite values in its data, or for a model that has diverged"
    )
    if state.unusable_in_a_row >= UNUSABLE_IN_A_ROW:
        raise RuntimeError(f"{said}. It is the trial number {state.unusable_in_a_row} in a row that does")
    if state.unusable == 1:
        warnings.warn(said, RuntimeWarning, stacklevel=2)


def _try(pruner: Pruner, selection: Selection) -> TrialEvent:
    trial = pruner.trial
    assert trial is not None
    redraw = getattr(trial, "redraw", None)
    if callable(redraw):
        redraw()

    def evaluate(size: int | None) -> Evaluation:
        masks = selection.first(size) if size is not None else {}
        try:
            for name, blocks in masks.items():
                pruner.layers[name].layout.suspend_(blocks)
            isolated = getattr(trial, "isolates_itself", False)
            with nullcontext() if isolated else calibration_mode(pruner.model):
                return trial()
        finally:
            for name in masks:
                pruner.layers[name].layout.resume_()

    sizes = candidate_sizes(len(selection), pruner.config.rungs)
    return run_event(sizes, evaluate, pruner.trial_state, pruner.rules)


def release(pruner: Pruner, masks: dict[str, Tensor]) -> None:
    """Let the blocks of ``masks`` die: weight, gradient and state become zeros, in the followers too."""
    for name, blocks in masks.items():
        layer = pruner.layers[name]
        for each in [layer, *pruner.followers.of(name)]:
            where = blocks.to(each.layout.mask.device)
            optimizers = pruner.optimizers if each is layer else ()
            zero_slots(optimizers, each.values, slots_of(each, where))
            each.layout.release_(where)
        pruner.score.forget(name, blocks)
    pruner.structure_version += 1


def slots_of(layer: BlockSparseLayer, blocks: Tensor) -> Tensor:
    """Bool ``[capacity]``: the slots that hold ``blocks`` (bool ``[rows, columns]``). No host sync."""
    block_of_slot = layer.layout.lists.block_of_slot.long()
    return blocks.reshape(-1)[block_of_slot.clamp(min=0)] & (block_of_slot >= 0)


def _regrow(pruner: Pruner, count: int, step: int) -> None:
    """Let up to ``count`` dead blocks return where the dense gradient is largest."""
    layers = pruner.layers
    norms = {name: pruner.probes[name] for name in layers if name in pruner.probes}
    if count < 1 or not norms:
        return
    eligible = {name: ~layers[name].layout.mask & (norm > 0) for name, norm in norms.items()}
    left = {name: layers[name].layout.capacity - layers[name].layout.live_count() for name in norms}
    chosen = select_growth(norms, eligible, count, left)
    for name, blocks in chosen.items():
        grown = int(blocks.sum())
        if grown == 0:
            continue
        layer = layers[name]
        live = slots_of(layer, layer.layout.mask)
        for each in [layer, *pruner.followers.of(name)]:
            where = blocks.to(each.layout.mask.device)
            each.layout.allocate_(where)
            each.layout.check()
            new = slots_of(each, where)
            seed_slots(pruner.optimizers if each is layer else (), each.values, live.to(new.device), new)
        pruner.score.forget(name, blocks)
        pruner.protection.protect(name, blocks, step + pruner.pace.interval + 1)
        pruner.removals.grown += grown
        pruner.structure_version += 1


def cut_neurons(pruner: Pruner) -> None:
    """Cut neurons that are dead or constant out of the network; what it computes stays.

    A model that cannot be traced keeps them: a warning, and the report, say why.
    """
    if not any(_has_dead_rows_or_columns(layer) for layer in pruner.layers.values()):
        return
    groups, example, removals = neuron_map_of(pruner), pruner.example(), pruner.removals
    if example is None:
        _say_unseen(pruner)
    if groups is None or example is None:
        return
    report = cut_dead_neurons(pruner.model, groups, example, pruner.optimizers, floor=pruner.config.floor)
    removals.neurons_refused = {**groups.refused, **report.refused}
    if report.plan is None:
        return
    pruner.groups.cut(report.plan)
    pruner.neuron_map = None
    for name, kept in report.kept.items():
        pruner.score.keep(name, *kept)
        pruner.protection.keep(name, kept.rows, kept.columns)
    for copy in pruner.followers.models():
        cut_copy(copy, report.plan, example, like=pruner.model)
    removals.neurons += sum(report.neurons.values())
    removals.with_neurons += report.blocks
    pruner.structure_version += 1
    if pruner.watches_groups and not pruner.nothing_left():
        neuron_map_of(pruner)  # while there is an example: the next step is observed


def _say_unseen(pruner: Pruner) -> None:
    """Warn at the second event without a batch to trace the model with: at the first step there is none."""
    pruner.removals.neurons_refused[_WHOLE_MODEL] = _NO_INPUTS
    pruner.batches_unseen += 1
    if pruner.batches_unseen == 2:
        warnings.warn(f"dead neurons stay in the network: {_NO_INPUTS}", RuntimeWarning, stacklevel=2)


def _has_dead_rows_or_columns(layer: BlockSparseLayer) -> bool:
    layout = layer.layout
    taps = 1 if layout.conv is None else layout.conv.taps
    live = layout.mask.view(layout.rows, taps, -1)
    return not bool(live.any(2).any(1).all() & live.any(1).any(0).all())


def compact(pruner: Pruner) -> None:
    """Walk each layer's capacity down where its live blocks allow it."""
    growing = pruner.config.regrow > 0 and not pruner.pace.ended(pruner.steps)
    exact = pruner.structure_final
    for name, layer in pruner.layers.items():
        capacity = wanted_capacity(layer, exact=exact, growing=growing)
        if capacity < layer.layout.capacity:
            compact_layer(layer, capacity, pruner.optimizers, pruner.followers.of(name))
            pruner.compactions += 1
