"""A pruner's report: what was removed, why, how it was tested and what it cost."""

from __future__ import annotations

from typing import Any

from dynaprune.pruning.decide.trial_budget import TrialBudget
from dynaprune.pruning.decide.trial_rules import TrialState
from dynaprune.pruning.decide.trials import Trials
from dynaprune.pruning.edit.structure import Structure
from dynaprune.pruning.standing import Standing
from dynaprune.pruning.whole_model import report_layers, widths_of_cut_layers

_UNTESTED = "no trial was given: nothing was tested before it was removed"


def report(pruner: Standing) -> dict[str, Any]:
    """Plain values, fit for JSON. Measures the structure first."""
    structure, ledger, observed = pruner.structure, pruner.ledger, pruner.observer.observed
    structure.measure()
    blocks = sum(state.layer.layout.live_count() for state in structure.layers.values())
    seconds = ledger.seconds
    return {
        "sparsity": pruner.sparsity,
        "sparsity_of_model": pruner.sparsity_of_model,
        "forward_flops_gone": structure.neurons.flops_gone,
        "target_sparsity": pruner.config.target_sparsity,
        "target_reached": pruner.target_reached,
        "steps": pruner.steps,
        "blocks_total": structure.units,
        "blocks_never_present": structure.left_out,
        "blocks_removed": structure.units - structure.left_out - blocks,
        "blocks_regrown": ledger.grown,
        "blocks_swapped": ledger.swapped,
        "blocks_ever_lived": _ever_lived(structure),
        "units": pruner.config.units,
        "neurons_removed": ledger.neurons,
        "neurons_refused": dict(pruner.tracer.refused),
        "neurons_ranked_by_blocks": structure.groups.unseen() if structure.layers else {},
        "widths": widths_of_cut_layers(structure.model),
        "blocks_removed_with_neurons": ledger.with_neurons,
        "removed_passed": ledger.passed,
        "removed_forced": ledger.forced,
        "removed_untested": ledger.untested,
        "neurons_passed": ledger.neurons_passed,
        "neurons_forced": ledger.neurons_forced,
        "neurons_untested": ledger.neurons_untested,
        "layers": report_layers(structure, pruner.exempt, ledger.size),
        "parameters": {
            "total": ledger.size.total,
            "prunable": sum(ledger.size.layers[name] for name in structure.layers)
            + structure.neurons.weights,
            "other": ledger.size.other,
            "live": pruner.live_parameters,
        },
        "learning_rate_multipliers": {n: s.rate for n, s in structure.layers.items() if s.rate != 1},
        "rewire_audit": None if pruner.policy.audit is None else pruner.policy.audit.report(),
        "trials": _trials(pruner.policy.trials, pruner.trial is not None, seconds),
        "observing": {
            "every": pruner.observer.every,
            "observations": observed.observations,
            "discarded": observed.discarded,
            "gradients_are": observed.trouble or "usable",
            "seconds": observed.seconds,
            "share": _share(observed.seconds, seconds),
        },
        "gradients_discarded": observed.discarded,
        "compactions": structure.compactions,
        "structure_version": structure.version,
        "structure_final": pruner.structure_final,
        "history": [dict(row) for row in ledger.history],
        "config": pruner.config.to_json(),
    }


def _ever_lived(structure: Structure) -> dict[str, Any]:
    """Shares of the blocks that live or have lived."""
    layers = {name: state.ever_lived / state.blocks for name, state in structure.layers.items()}
    total = sum(state.ever_lived for state in structure.layers.values())
    return {"share": total / structure.units if structure.units else 1.0, "layers": layers}


def _trials(trials: Trials | None, given: bool, seconds: float) -> dict[str, Any]:
    state = TrialState() if trials is None else trials.state
    return {
        "tested": given,
        "note": "" if given else _UNTESTED,
        "events": [] if trials is None else trials.events,
        "count": state.events,
        "accepted": state.accepted,
        "allowance_spent": state.spent,
        "smallest_sample": state.smallest_sample,
        "samples_left_out": state.left_out,
        "unusable": state.unusable,
        "early": state.early,
        "budget": (TrialBudget() if trials is None else trials.budget).figures(),
        "seconds": state.seconds,
        "share": _share(state.seconds, seconds),
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
