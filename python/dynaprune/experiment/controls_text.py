"""The arms of a comparison beside each other, for people: what each control reached, and at which cost."""

from __future__ import annotations

from typing import Any

from dynaprune.experiment.figure_text import shown
from dynaprune.experiment.tasks import get_task

__all__ = ["controls_table"]


def controls_table(report: dict[str, Any]) -> list[str]:
    """Markdown: a line for each arm; nothing where there are no controls."""
    if not report.get("controls"):
        return []
    arms = {name: report[name] for name in ("baseline", "pruned")} | report["controls"]
    pruned = report["pruned"] or {}
    metrics = get_task(report["task"]).metrics
    head = [*(f"test {metric.label}" for metric in metrics), *_COSTS, "learning rate", "what it is"]
    lines = ["## Controls", "", f"| | {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}---|"]
    for name, arm in arms.items():
        cells = (
            ["-"] * len(head)
            if arm is None
            else [
                *(shown(arm.get(metric.key), metric.unit) for metric in metrics),
                *_costs(arm, pruned, _plan_of_pruned(report) if name == "pruned" else arm.get("plan", {})),
                _rate(arm),
                _told(arm),
            ]
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, "", *_NOTES, ""]


_COSTS = (
    "FLOPs of the whole training",
    "of the pruned arm's",
    "planned of it",
    "counted / planned",
    "training time",
    "last step",
)
_NOTES = (
    "- Controls are worked out before the training, from the FLOPs that the pruned arm's schedule plans.",
    "- Planned FLOPs know nothing of trials, nor of removals that a trial holds back.",
)


def _plan_of_pruned(report: dict[str, Any]) -> dict[str, Any]:
    plans = [arm["plan"] for arm in report["controls"].values() if arm and "plan" in arm]
    return {"flops_planned": plans[0]["flops_planned_of_pruned"], "ratio_planned": 1.0} if plans else {}


def _costs(arm: dict[str, Any], pruned: dict[str, Any], plan: dict[str, Any]) -> list[str]:
    counted, whole = arm["flops_total"], pruned.get("flops_total")
    planned = plan.get("flops_planned")
    return [
        shown(counted, "flops"),
        shown(counted / whole, "ratio") if whole else "-",
        shown(plan.get("ratio_planned"), "ratio"),
        shown(counted / planned, "ratio") if planned else "-",
        shown(arm["train_seconds"], "seconds"),
        shown(arm.get("step_seconds_last"), "time"),
    ]


def _rate(arm: dict[str, Any]) -> str:
    settings = arm.get("settings", {})
    rate, sparse = settings.get("lr"), settings.get("sparse_rate")
    if rate is None:
        return "-"
    return f"{rate:g}" + ("" if sparse is None else f", sparse layers x{sparse}")


_OF_PLANS = ("asked", "flops_", "ratio_")


def _told(arm: dict[str, Any]) -> str:
    plan = arm.get("plan", {})
    said = [f"{name} {value}" for name, value in plan.items() if not name.startswith(_OF_PLANS)]
    if arm.get("sparsity"):
        said.append(f"sparsity {shown(arm['sparsity'], 'share')}")
    return ", ".join(said)
