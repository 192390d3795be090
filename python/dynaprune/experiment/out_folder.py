"""What a folder for results may hold when a run begins: nothing, or the same run cut short."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dynaprune.experiment.run_config import RunConfig, differing_settings
from dynaprune.experiment.saved_results import read_arm, read_json, read_report
from dynaprune.experiment.sole_writer import LOCK_NAME

_OF_PILOTS = ("pilot", "pilot.json")

__all__ = [
    "CONFIG",
    "arm_is_finished",
    "check_empty",
    "check_settings",
    "check_unfinished",
    "check_value",
]

CONFIG = "config.json"


def check_empty(out: Path) -> None:
    """ValueError unless ``out`` is a folder with nothing in it, pilots aside, or does not exist."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, and {out} is a file")
    if out.is_dir() and any(each.name not in (LOCK_NAME, *_OF_PILOTS) for each in out.iterdir()):
        raise ValueError(
            f"--out must be new or empty, and {out} holds files: choose another folder or remove it"
        )


def check_settings(folder: Path, found: dict[str, Any], config: RunConfig) -> None:
    """ValueError, with names and values, unless the settings ``found`` in ``folder`` are those of
    ``config``."""
    if other := differing_settings(found, config):
        values = "; ".join(f"{name} {theirs!r}, here {mine!r}" for name, (theirs, mine) in other.items())
        raise ValueError(
            f"{folder} holds a run with other settings ({', '.join(other)}): choose another --out ({values})"
        )


def check_unfinished(out: Path, config: RunConfig, arms: Sequence[str] = ()) -> None:
    """ValueError unless ``out`` is new, empty, holds folders of some of the ``arms`` (by name), or a
    comparison of these settings that was cut short or lacks one of them."""
    if not (out / CONFIG).is_file():
        if not any((out / arm / CONFIG).is_file() for arm in arms):
            check_empty(out)
        return
    report = out / "report.json"
    found = read_report(report) if report.is_file() else None
    if found is not None and all(arm in found or arm in found.get("controls", {}) for arm in arms):
        check_empty(out)
    check_settings(out, read_json(out / CONFIG), config)


def check_value(folder: Path, result: Mapping[str, Any], arm: str) -> None:
    """ValueError unless the ``result`` in ``folder`` is of the ``arm`` as it is given now: NAME or
    NAME=VALUE."""
    plan = result.get("plan", {})
    asked = plan.get("asked", arm.partition("=")[0])
    if asked != arm:
        raise ValueError(f"{folder} holds the arm {asked}, here {arm}: choose another --out")


def arm_is_finished(out: Path, arm: str, config: RunConfig) -> bool:
    """Whether ``out`` holds this ``arm`` (NAME or NAME=VALUE) of these settings, trained to its end.

    ValueError unless ``out`` is new, empty, or holds an arm of these settings, finished or cut short, whose
    files are whole."""
    if not (out / CONFIG).is_file():
        check_empty(out)
        return False
    check_settings(out, read_json(out / CONFIG), config)
    found = read_arm(out, arm.partition("=")[0], config.task)
    if found is not None:
        check_value(out, found["result"], arm)
    return found is not None
