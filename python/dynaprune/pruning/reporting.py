"""A pruner's report, and its state for a resumed training."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dynaprune.pruning.checks.first_batch import exempt_later
from dynaprune.pruning.whole_model import report_layers

if TYPE_CHECKING:
    from dynaprune.pruning.pruner import Pruner

STATE_VERSION = 1
_UNTESTED = "no trial was given: nothing was tested before it was removed"


def report(pruner: Pruner) -> dict[str, Any]:
    """See :meth:`Pruner.report`."""
    pruner.measure()
    blocks = sum(layer.layout.live_count() for layer in pruner.layers.values())
    removals, observed, trials = pruner.removals, pruner.observed, pruner.trial_state
    seconds = time.perf_counter() - pruner.started
    size = pruner.size_at_attach
    return {
        "sparsity": pruner.sparsity,
        "sparsity_of_model": pruner.sparsity_of_model,
        "target_sparsity": pruner.config.target_sparsity,
        "target_reached": pruner.target_reached,
        "steps": pruner.steps,
        "blocks_total": pruner.units_total,
        "blocks_removed": pruner.units_total - blocks,
        "blocks_regrown": removals.grown,
        "neurons_removed": removals.neurons,
        "neurons_refused": dict(removals.neurons_refused),
        "neurons_ranked_by_blocks": pruner.groups.unseen(),
        "blocks_removed_with_neurons": removals.with_neurons,
        "removed_passed": removals.passed,
        "removed_forced": removals.forced,
        "removed_untested": removals.untested,
        "layers": report_layers(pruner),
        "parameters": {
            "total": size.total,
            "prunable": sum(size.layers[name] for name in pruner.layers),
            "other": size.other,
            "live": pruner.live_parameters,
        },
        "trials": {
            "tested": pruner.trial is not None,
            "note": "" if pruner.trial is not None else _UNTESTED,
            "events": removals.events,
            "count": trials.events,
            "accepted": trials.accepted,
            "allowance_spent": trials.spent,
            "smallest_sample": trials.smallest_sample,
            "samples_left_out": trials.left_out,
            "unusable": trials.unusable,
            "seconds": trials.seconds,
            "share": trials.seconds / seconds if seconds > 0 else 0.0,
        },
        "observing": {
            "every": pruner.observe_every,
            "observations": observed.observations,
            "discarded": observed.discarded,
            "gradients_are": observed.trouble or "usable",
            "seconds": observed.seconds,
            "share": observed.seconds / seconds if seconds > 0 else 0.0,
        },
        "gradients_discarded": observed.discarded,
        "compactions": pruner.compactions,
        "structure_version": pruner.structure_version,
        "structure_final": pruner.structure_final,
        "history": [dict(row) for row in pruner.history],
        "config": pruner.config.to_json(),
    }


def pruner_state(pruner: Pruner) -> dict[str, Any]:
    """See :meth:`Pruner.state_dict`."""
    trial_state = getattr(pruner.trial, "state_dict", None)
    observed = asdict(pruner.observed)
    return {
        "version": STATE_VERSION,
        "steps": pruner.steps,
        "seconds": time.perf_counter() - pruner.started,
        "structure_version": pruner.structure_version,
        "compactions": pruner.compactions,
        "observe_every": pruner.observe_every,
        "rows": dict(pruner.rows),
        "score": pruner.score.state_dict(),
        "groups": pruner.groups.state_dict(),
        "protection": pruner.protection.state_dict(),
        "trial_state": pruner.trial_state.state_dict(),
        "trial": trial_state() if callable(trial_state) else None,
        "removals": asdict(pruner.removals),
        "observed": {**observed, "layers": sorted(observed["layers"])},
        "history": [dict(row) for row in pruner.history],
        "live_weights": dict(pruner.live_weights),
        "original_shapes": {name: list(shape) for name, shape in pruner.original_shapes.items()},
        "units_total": pruner.units_total,
        "size_at_attach": asdict(pruner.size_at_attach),
        "exempt_later": dict(pruner.exempt_later),
        "slots": {name: layer.layout.slot_of_block.clone() for name, layer in pruner.layers.items()},
    }


def load_pruner_state(pruner: Pruner, state: Mapping[str, Any]) -> None:
    """See :meth:`Pruner.load_state_dict`."""
    if state.get("version") != STATE_VERSION:
        raise ValueError(
            f"expected a pruner's state of version {STATE_VERSION}, got {state.get('version')!r}"
        )
    later = {n: why for n, why in state.get("exempt_later", {}).items() if n in pruner.layers}
    if later and set(state["slots"]) == set(pruner.layers) - set(later):
        exempt_later(pruner, later)
    if set(state["slots"]) != set(pruner.layers):
        raise ValueError(
            f"expected the state of layers {sorted(pruner.layers)}, got {sorted(state['slots'])}"
        )
    load_trial = getattr(pruner.trial, "load_state_dict", None)
    if state["trial"] is not None:
        if not callable(load_trial):
            raise ValueError("expected a trial that can continue the saved one (load_state_dict), got none")
        load_trial(state["trial"])
    pruner.score.load_state_dict(state["score"])
    devices = {name: layer.values.device for name, layer in pruner.layers.items()}
    protection = {name: until.to(devices[name]) for name, until in state["protection"].items()}
    pruner.protection.load_state_dict(protection)
    pruner.trial_state.load_state_dict(state["trial_state"])
    pruner.adopt(state)
