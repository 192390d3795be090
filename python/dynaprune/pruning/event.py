"""One pruning event: decide, apply, record."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dynaprune.pruning.checks.one_process import take_off_averaging_
from dynaprune.pruning.checks.reachable import say_what_gets_no_gradient
from dynaprune.pruning.checks.reachable_neurons import no_neurons_reason, say_what_neurons_keep
from dynaprune.pruning.checks.recompilation import say_recompilations
from dynaprune.pruning.edit.apply import apply
from dynaprune.pruning.edit.consequences import dead_neurons, spare_slots
from dynaprune.pruning.edit.consistency import Consistency
from dynaprune.pruning.edit.edits import Cut, Edit, Rewire
from dynaprune.pruning.edit.stale_copies import refuse_stale
from dynaprune.pruning.observe.gradients import LASTING
from dynaprune.pruning.settings import BLOCKS, NEURONS
from dynaprune.pruning.standing import Standing
from dynaprune.pruning.view import view_of
from dynaprune.pruning.whole_neurons import know_neurons


@torch.no_grad()
def prune(pruner: Standing, consistency: Consistency, said: set[str]) -> None:
    """Ask the policy for edits, apply them and what follows from them, and note the sizes.

    Args:
        said: what was warned of once already; grows.

    Raises:
        TypeError, ValueError: an edit that does not fit, by name. RuntimeError: a stale copy, or a state of
            another structure. The structure is as it was then.
    """
    structure, config, policy = pruner.structure, pruner.config, pruner.policy
    take_off_averaging_(structure.model)
    if "idle" not in said and pruner.observer.observed.observations >= LASTING:
        said.add("idle")
        say_what_gets_no_gradient(structure, config, pruner.steps)
    shapes = [weight.shape for _, weight in structure.trained]
    refuse_stale(pruner.layers, final=pruner.nothing_left())
    consistency.check()
    before = structure.version
    with structure.followers.in_step(structure.model, pruner.layers):
        if config.units != BLOCKS and not pruner.nothing_left():
            _know_neurons(pruner)
        view = view_of(structure, pruner.score, pruner.trial, pruner.tracer, config, pruner.steps)
        if config.units == NEURONS and "floors" not in said and (whole := view.whole()) is not None:
            said.add("floors")
            say_what_neurons_keep(whole, config)
        edits = policy.decide(view)
        _apply(pruner, edits)
        if any(isinstance(edit, Cut) for edit in edits):
            _trace_anew(pruner)
        swapped = all(isinstance(edit, Rewire) for edit in edits)
        # While blocks change places, a dead neuron may come to life again.
        may_revive = swapped and not policy.ended(pruner.steps)
        if config.neurons and (structure.version != before or config.rewire) and not may_revive:
            _cut_neurons(pruner)
        if config.compact:
            growing = policy.grows and not policy.ended(pruner.steps)
            _apply(pruner, spare_slots(structure, exact=pruner.structure_final, growing=growing))
    if structure.version != before:
        pruner.ledger.note_sizes(pruner.steps, structure, only_new=swapped)
    changed = shapes != [weight.shape for _, weight in structure.trained]
    if changed and "recompilations" not in said and _say_recompilations(pruner):
        said.add("recompilations")


def _know_neurons(pruner: Standing) -> None:
    """Raise RuntimeError where nothing is pruned but whole neurons, and none of them can go."""
    if know_neurons(pruner.structure, pruner.tracer) is None:
        pruner.tracer.say_unseen()
    elif reason := no_neurons_reason(pruner.structure, pruner.tracer.refused):
        raise RuntimeError(reason)


def _apply(pruner: Standing, edits: Sequence[Edit]) -> None:
    apply(pruner.structure, edits)
    pruner.ledger.record(edits)


def _cut_neurons(pruner: Standing) -> None:
    cuts = dead_neurons(pruner.structure, pruner.tracer, pruner.config.floor)
    _apply(pruner, cuts)
    if cuts:
        _trace_anew(pruner)


def _trace_anew(pruner: Standing) -> None:
    """The groups have changed. While there is an example, find the new ones: the next step is observed."""
    pruner.tracer.forget()
    if pruner.observer.watches_groups and not pruner.nothing_left():
        pruner.tracer.groups()


def _say_recompilations(pruner: Standing) -> bool:
    return say_recompilations(
        pruner.prepared.given,
        pruner.config,
        counted=bool(pruner.structure.tokens),
        step=pruner.steps,
        interval=pruner.policy.interval,
    )
