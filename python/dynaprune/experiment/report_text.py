"""A report for people: its figures with their units, its table, and ``report.md``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynaprune.experiment import memory_figures
from dynaprune.experiment.controls_text import controls_table
from dynaprune.experiment.figure_text import shown
from dynaprune.experiment.report import data_of
from dynaprune.experiment.tasks.metric import KNOWN
from dynaprune.experiment.write import write_text

__all__ = ["on_copy", "table_rows", "what_stays_whole", "write_markdown"]

_LABELS = {
    **{key: (f"test {metric.label}", metric.unit) for key, metric in KNOWN.items()},
    "train_seconds": ("training time", "seconds"),
    "epochs": ("epochs", "count"),
    "step_seconds_first": ("step time, first 20 steps", "time"),
    "step_seconds_last": ("step time, last 20 steps", "time"),
    "step_seconds_dense": ("step time of the dense twin, in turn with it", "time"),
    "peak_memory_bytes": ("peak memory of the process", "bytes"),
    "memory_bytes_last": ("peak memory in the last 20 steps", "bytes"),
    "memory_bytes_process": ("peak memory of the process, less what it held before the model", "bytes"),
    "memory_bytes_tensors": ("peak of tensors in a step", "bytes"),
    "memory_bytes_tensors_last": ("peak of tensors in a step, last structure", "bytes"),
    "training_state_bytes": ("weights + gradients + optimizer state", "bytes"),
    "parameters_total": ("parameters as built", "count"),
    "parameters_active": ("parameters live at the end", "count"),
    "flops_per_step_first": ("FLOPs of the first step", "flops"),
    "flops_per_step_last": ("FLOPs of the last step", "flops"),
    "flops_total": ("FLOPs of the whole training", "flops"),
    "sparsity": ("sparsity of the prunable weights", "share"),
    "sparsity_of_model": ("sparsity of all parameters", "share"),
    "target_reached": ("target reached", "truth"),
    "blocks_never_present": ("blocks that training began without", "count"),
    "blocks_swapped": ("blocks that changed places", "count"),
    "swaps_tested": ("of these tested as they went", "count"),
    "swaps_failed": ("of these not shown to be harmless", "count"),
    "blocks_ever_lived": ("blocks that live or have lived", "share"),
    "blocks_removed": ("blocks removed", "count"),
    "neurons_removed": ("neurons removed", "count"),
    "removed_passed": ("units removed after passing a trial", "count"),
    "removed_forced": ("units removed by force (backlog)", "count"),
    "removed_untested": ("units removed untested", "count"),
    "neurons_passed": ("of these neurons: after passing a trial", "count"),
    "neurons_forced": ("of these neurons: by force", "count"),
    "neurons_untested": ("of these neurons: untested", "count"),
    "forward_flops_gone": ("forward FLOPs of layers that are gone", "share"),
    "blocks_removed_with_neurons": ("blocks that went with a neuron of theirs", "count"),
}


def on_copy(label: str, data: dict[str, Any]) -> str:
    """``label`` with the copy of the data set that a figure is of, where it is not the original."""
    return f"{label} ({data['copy']})" if data.get("copy") else label


def table_rows(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """``(what, baseline, pruned, ratio)`` lines for the tables on the screen and in ``report.md``."""
    baseline, pruned = report["baseline"] or {}, report["pruned"] or {}
    rows = []
    for name, (label, kind) in _LABELS.items():
        if name not in baseline and name not in pruned:
            continue
        ratio = report["ratios"].get(name)
        if name == "step_seconds_dense":
            ratio = report["ratios"].get("step_seconds_last_to_dense")
        if name in KNOWN:
            label = on_copy(label, data_of(report))
        both = [shown(arm[name], kind) if name in arm else "" for arm in (baseline, pruned)]
        rows.append((label, both[0], both[1], f"{ratio:.3f}" if ratio is not None else ""))
    return rows


_NOTES = """\
- The ratio is pruned / baseline; in the line of the dense twin it is the pruned step over the dense one.
  The twin is the same network dense and without dropout, timed a few steps at a time in turn with the
  pruned model: the honest reference for its step time (the baseline also pays for dropout).
- Peak memory of the process is its largest resident set (CUDA: of the allocator). A run that starts dense
  cannot lower it. The peak of the last 20 steps starts from what is held then, the libraries included; on
  the CPU free pages of the allocator are handed back first, in both arms.
- Peaks of tensors, and memory by kind, are those of measured training steps (torch's MemTracker and the
  kernels' scratch memory): one of the first structure, some between, one of the last. Trials and evaluation
  are not among them, and show in the process only. docs/memory.md says what each kind is.
- Sparsity of the prunable weights leaves out what stays whole; sparsity of all parameters counts each
  parameter once, biases and norms too.
- FLOPs are counted in forward and backward at every change of the structure: those of the whole network's
  matrix products and convolutions, of what stays whole too (block-sparse operations count live blocks). The
  total includes the trials, and the measuring of gradients where blocks may begin.
- The step times at the end are those of 20 further steps after training (40 for the comparison in turn);
  the weights that are tested were kept before them.
"""


def what_stays_whole(report: dict[str, Any]) -> list[str]:
    """The pruned network's parameters that no pruning can reach, by reason, largest first."""
    said = (report["pruned"] or {}).get("pruner") or {}
    if "parameters" not in said:
        return []
    layers, sizes = said["layers"].values(), said["parameters"]
    reasons = dict.fromkeys(layer["exempt"] for layer in layers if layer["exempt"])
    rows = [
        (reason, [layer["weights"] for layer in layers if layer["exempt"] == reason]) for reason in reasons
    ]
    rows = sorted(rows, key=lambda row: -sum(row[1]))
    rows.append(("biases, parameters of norms, and other vectors", [sizes["other"]]))
    lines = ["## What stays whole", ""]
    lines += [f"{shown(sizes['prunable'] / sizes['total'], 'share')} of all parameters are prunable.", ""]
    lines += ["| why | layers | parameters | share of all |", "|---|---:|---:|---:|"]
    for reason, weights in rows:
        count = "" if reason == rows[-1][0] else f"{len(weights)}"
        share = shown(sum(weights) / sizes["total"], "share")
        lines.append(f"| {reason} | {count} | {shown(sum(weights), 'count')} | {share} |")
    return [*lines, ""]


def write_markdown(path: Path, report: dict[str, Any], pictures: list[str]) -> None:
    """``report.md``: the table, the note that the data come with, how it was measured, settings and
    machine."""
    lines = [f"# dynaprune compare {report['task']}", ""]
    if report["interrupted"]:
        lines += ["**This run was interrupted: the figures are of what was done until then.**", ""]
    lines += ["| | baseline | pruned | ratio |", "|---|---:|---:|---:|"]
    lines += [f"| {' | '.join(row)} |" for row in table_rows(report)]
    if note := data_of(report).get("note"):
        lines += ["", f"**{note}**"]
    for mark in report["marks"]:
        lines += ["", f"**{mark}**"]
    lines += ["", *[f"![{name.removesuffix('.png')}]({name})" for name in pictures], ""]
    lines += controls_table(report)
    if memory := memory_figures.tables(report, shown):
        lines += ["## Memory by kind", "", *memory]
    lines += what_stays_whole(report)
    lines += ["## How this was measured", "", _NOTES]
    for arm in ("baseline", "pruned"):
        if report[arm]:
            done = report[arm]
            best = f"weights of epoch {done['best_epoch']}" if done["best_epoch"] else "the last weights"
            lines.append(f"- {arm}: {done['state']} after {done['epochs']} epochs; tested with {best}.")
            if len(parts := done.get("parts") or []) > 1:
                lines.append(f"  It was trained in {len(parts)} parts; seconds are those of all of them.")
            if "process_seconds" in done:
                around = done["process_seconds"] - done["train_seconds"]
                lines.append(
                    f"  Its process took {done['process_seconds']:.1f} s, {around:.1f} s of it around "
                    "the training: imports, data, checkpoints, test, timing."
                )
    pruned = report["pruned"]
    if pruned and pruned.get("trial_seconds") is not None:
        share = 100 * pruned["trial_seconds"] / max(pruned["train_seconds"], 1e-9)
        lines.append(
            f"- Trials took {pruned['trial_seconds']:.2f} s, {share:.1f} % of the pruned training time."
        )
    lines += ["", "## Settings", "", *[f"- {k}: {v}" for k, v in report["config"].items()]]
    lines += ["", "## Machine", "", *[f"- {k}: {v}" for k, v in report["environment"].items()], ""]
    write_text(path, "\n".join(lines))
