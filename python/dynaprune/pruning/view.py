"""What a policy sees of a structure, and the losses of a trial without some of its blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache

from torch import Tensor

from dynaprune.neurons.tracer import NeuronTracer
from dynaprune.pruning.config import PruningConfig
from dynaprune.pruning.decide.neuron_order import GroupFigures, NeuronFigures
from dynaprune.pruning.decide.policy import LayerView, View, WholeNeurons
from dynaprune.pruning.decide.trial import Trial
from dynaprune.pruning.edit.layer_state import LayerState
from dynaprune.pruning.edit.structure import Structure
from dynaprune.pruning.event_losses import EventLosses
from dynaprune.pruning.observe.score import Score
from dynaprune.pruning.observe.scores import make_score
from dynaprune.pruning.settings import BLOCKS
from dynaprune.pruning.whole_neurons import whole_neurons


def view_of(
    structure: Structure,
    score: Score,
    trial: Trial | None,
    tracer: NeuronTracer,
    config: PruningConfig,
    step: int,
) -> View:
    """The structure after ``step`` optimizer steps, read-only; scores are computed when asked for."""

    def neurons() -> NeuronFigures | None:
        groups = tracer.groups()
        if groups is None:
            return None
        if not score.of_gates:
            by_row = {name: score.neuron_scores(state) for name, state in structure.layers.items()}
            return NeuronFigures(structure.model, groups, GroupFigures((), by_row, structure.tokens))
        structure.groups.watch(structure.model, groups, structure.optimizers)
        figures = GroupFigures(structure.groups.scores(score), None, structure.tokens)
        return NeuronFigures(structure.model, groups, figures)

    def whole() -> WholeNeurons | None:
        if config.units == BLOCKS:
            return None
        return whole_neurons(structure, score, trial, tracer, config)

    drops = None if config.rewire_score is None else make_score(config.rewire_score, seed=config.seed)
    return View(
        step,
        {
            name: _layer(state, score, drops, config.floor_of(name), structure.flops_per_block(state), step)
            for name, state in structure.layers.items()
        },
        structure.units,
        structure.live_units,
        structure.weights,
        structure.live_weights,
        None if trial is None else losses_without(structure, trial),
        neurons,
        cache(whole),
    )


def _layer(
    state: LayerState, score: Score, drops: Score | None, floor: float, flops: float, step: int
) -> LayerView:
    return LayerView(
        mask=state.mask.clone(),
        protected=state.protected(step),
        probe=None if state.probe is None else state.probe.clone(),
        capacity=state.layer.layout.capacity,
        original=state.original,
        floor=max(1, math.ceil(floor * state.layer.layout.blocks)),
        floor_share=floor,
        flops_per_block=flops,
        scores=lambda live: score.scores(state, live),
        neuron_scores=lambda: score.neuron_scores(state),
        drop_scores=None if drops is None else lambda live: drops.scores(state, live),
    )


def losses_without(structure: Structure, trial: Trial) -> EventLosses[Mapping[str, Tensor]]:
    """``losses(masks)`` of one event: the trial's, with the blocks of ``masks`` suspended.

    Values and slots stay as they are.
    """

    @contextmanager
    def suspended(masks: Mapping[str, Tensor]) -> Iterator[None]:
        layouts = [(structure.layers[name].layer.layout, blocks) for name, blocks in masks.items()]
        try:
            for layout, blocks in layouts:
                layout.suspend_(blocks)
            yield
        finally:
            for layout, _ in layouts:
                layout.resume_()

    return EventLosses(structure, trial, suspended)
