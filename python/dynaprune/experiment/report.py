"""What ``report.json`` holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dynaprune.experiment.memory_figures import MEMORY
from dynaprune.experiment.parts import marks
from dynaprune.experiment.tasks import get_task

__all__ = [
    "AUDITED",
    "AUDIT_FAILED",
    "COSTS",
    "EVER_LIVED",
    "NEVER_PRESENT",
    "OF_A_MACHINE",
    "PRUNED_METRICS",
    "REMOVALS",
    "SWAPPED",
    "build_report",
    "data_of",
    "figures_of",
    "ratios",
    "scores_of",
]

COSTS = (
    "train_seconds",
    "epochs",
    "step_seconds_first",
    "step_seconds_last",
    "peak_memory_bytes",
    "memory_bytes_last",
    "training_state_bytes",
    "parameters_total",
    "parameters_active",
    "flops_per_step_first",
    "flops_per_step_last",
    "flops_total",
)
# Blocks that a sparse start left out; only where there was one.
NEVER_PRESENT = "blocks_never_present"
# Blocks that changed places, and the share that lives or has lived; only where blocks were rewired.
SWAPPED, EVER_LIVED = "blocks_swapped", "blocks_ever_lived"
# Of those that went for others, how many an audit tested, and how many would have failed; only where one did.
AUDITED, AUDIT_FAILED = "swaps_tested", "swaps_failed"
# What went, and why it was allowed to.
REMOVALS = (
    "neurons_removed",
    "blocks_removed",
    "removed_passed",
    "removed_forced",
    "removed_untested",
    "blocks_removed_with_neurons",
)
# Of what went, the neurons; only where they are units of their own.
OF_NEURONS = ("neurons_passed", "neurons_forced", "neurons_untested", "forward_flops_gone")
PRUNED_METRICS = ("sparsity", "sparsity_of_model", "target_reached", *REMOVALS, "step_seconds_dense")


def scores_of(task: str) -> tuple[str, ...]:
    """Keys of the test scores that both arms of a task have."""
    return tuple(metric.key for metric in get_task(task).metrics)


def figures_of(task: str) -> tuple[str, ...]:
    """Keys of the figures that both arms of a task have: its test scores, then what they cost."""
    return (*scores_of(task), *COSTS)


def ratios(
    baseline: dict[str, Any] | None, pruned: dict[str, Any] | None, figures: Sequence[str] = COSTS
) -> dict[str, float]:
    """pruned / baseline for every one of ``figures``, of `MEMORY` and of the times measured alone that both
    have, and ``step_seconds_last_to_dense``."""
    if not baseline or not pruned:
        return {}
    found = {
        name: pruned[name] / baseline[name]
        for name in (*figures, *MEMORY, "seconds_alone")
        if isinstance(pruned.get(name), (int, float))
        and isinstance(baseline.get(name), (int, float))
        and baseline[name]
    }
    if pruned.get("step_seconds_dense") and pruned.get("step_seconds_last"):
        found["step_seconds_last_to_dense"] = pruned["step_seconds_last"] / pruned["step_seconds_dense"]
    return found


# Where these differ between environments, runs cannot be set beside each other. With another processor they
# can, but for their times: the report says so.
OF_A_MACHINE = ("threads", "device", "cuda")


def build_report(
    config: dict[str, Any], environment: dict[str, Any], arms: dict[str, dict[str, Any] | None]
) -> dict[str, Any]:
    """The content of ``report.json``: an arm that did not run is null, ``interrupted`` says whether one was
    cut, and ``marks`` what makes figures less than exact or comparable."""
    baseline, pruned = arms.get("baseline"), arms.get("pruned")
    controls = {name: arm for name, arm in arms.items() if name not in ("baseline", "pruned")}
    both = (baseline, pruned)
    return {
        "task": config["task"],
        "seed": config["seed"],
        "config": config,
        "environment": environment,
        "baseline": baseline,
        "pruned": pruned,
        "ratios": ratios(baseline, pruned, figures_of(config["task"])),
        **({"controls": controls} if controls else {}),
        "interrupted": any(a is None or a["interrupted"] for a in (*both, *controls.values())),
        "marks": marks({"baseline": baseline, "pruned": pruned, **controls}),
    }


def data_of(report: dict[str, Any]) -> dict[str, Any]:
    """What the arms said of their data (the same for both); empty where none ran."""
    arm = report["baseline"] or report["pruned"] or {}
    return dict(arm.get("data") or {})
