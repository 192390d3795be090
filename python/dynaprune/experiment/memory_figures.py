"""The figures of an arm's memory: their keys in ``report.json``, and their tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["KINDS", "MEMORY", "figures_of_steps", "tables"]

# Those of `dynaprune.MemoryByKind`, in its order; this module does not wait for torch.
KINDS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "temporaries": "temporaries",
    "scratch": "scratch memory of the kernels",
    "buffers": "buffers",
    "index": "masks and index lists of blocks",
    "pruner": "statistics of the pruner",
    "inputs": "inputs",
}
_OF_A_STEP = ("tensors", "state", "most_activations", *KINDS)
_LAST = "_last"
# Keys of the figures that both arms have. Those that end in "_last" are of the last structure, the others of
# the step with the highest peak.
MEMORY = (
    "memory_bytes_process",
    *(f"memory_bytes_{name}" for name in _OF_A_STEP),
    *(f"memory_bytes_{name}{_LAST}" for name in _OF_A_STEP),
)


def figures_of_steps(measured: Sequence[Mapping[str, Any]], *, closed: bool) -> dict[str, Any]:
    """The figures of `MEMORY` that ``measured`` steps tell, and the steps themselves.

    The training state is the largest of all steps, whichever has the peak. ``closed``: the last one is of the
    last structure."""
    if not measured:
        return {}
    highest = max(measured, key=lambda entry: entry["peak"])
    state = max(entry["training_state"] for entry in measured)
    return {
        **_figures(highest, ""),
        "memory_bytes_state": state,
        **(_figures(measured[-1], _LAST) if closed else {}),
        "memory_bytes_measured": list(measured),
    }


def _figures(entry: Mapping[str, Any], suffix: str) -> dict[str, int]:
    named = {
        "tensors": entry["peak"],
        "state": entry["training_state"],
        "most_activations": entry["most"]["activations"],
        **entry["at_peak"],
    }
    return {f"memory_bytes_{name}{suffix}": size for name, size in named.items()}


def tables(report: Mapping[str, Any], shown: Any) -> list[str]:
    """Two Markdown tables by kind, at the highest peak of the training and at that of the last structure;
    nothing where nothing was measured. ``shown(bytes, "bytes")`` makes text."""
    found: list[str] = []
    for suffix, title in (("", "at the highest peak of the training"), (_LAST, "at the last structure")):
        rows = _rows(report, suffix, shown)
        if rows:
            found += [f"| {title} | baseline | pruned | ratio |", "|---|---:|---:|---:|", *rows, ""]
    return found


def _rows(report: Mapping[str, Any], suffix: str, shown: Any) -> list[str]:
    arms = [report["baseline"] or {}, report["pruned"] or {}]
    labels = {
        **KINDS,
        "tensors": "**all of these**",
        "most_activations": "activations when they were most",
        "state": "weights + gradients + optimizer state when they were most",
    }
    rows = []
    for name, label in labels.items():
        key = f"memory_bytes_{name}{suffix}"
        if any(arm.get(key) for arm in arms):
            ratio = report["ratios"].get(key)
            cells = [shown(arm[key], "bytes") if key in arm else "" for arm in arms]
            rows.append(f"| {label} | {' | '.join(cells)} | {'' if ratio is None else f'{ratio:.3f}'} |")
    return rows
