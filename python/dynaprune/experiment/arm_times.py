"""The times of a comparison's arms by step times measured alone (``times.json``), read beside its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynaprune.experiment.arm_settings import BASELINE
from dynaprune.experiment.saved_results import is_number, read_json

__all__ = ["TIMES", "add_times"]

TIMES = "times.json"


def add_times(report: dict[str, Any], folder: Path) -> None:
    """Give each arm of a comparison's ``report`` its ``seconds_alone``, in place, where ``folder`` or the one
    above it has a ``times.json`` with all of them: the measured ratio times the arm's own steps."""
    path = next((each for each in (folder / TIMES, folder.parent / TIMES) if each.is_file()), None)
    if path is None:
        return
    measured = read_json(path).get("arms")
    arms = {"baseline": report["baseline"], "pruned": report["pruned"], **report.get("controls", {})}
    if not isinstance(measured, dict) or any(not _is_time(measured.get(name)) for name in arms):
        raise ValueError(f"{path}: expected the ratio of each arm ({', '.join(arms)}): measure them anew")
    dense_step = measured[BASELINE]["seconds_dense"] / measured[BASELINE]["steps"]
    for name, arm in arms.items():
        if arm is not None and is_number(arm.get("steps")):
            arm["seconds_alone"] = measured[name]["ratio"] * arm["steps"] * dense_step


def _is_time(said: Any) -> bool:
    wanted = ("ratio", "seconds_dense", "steps")
    return isinstance(said, dict) and all(is_number(said.get(key)) and said[key] > 0 for key in wanted)
