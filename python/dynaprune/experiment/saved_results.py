"""What earlier runs have left on the disk, read without trusting it.

Each error is a ValueError of one line that names the file, and the row and column or the key in it."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dynaprune.experiment.memory_figures import MEMORY
from dynaprune.experiment.report import figures_of, scores_of
from dynaprune.experiment.tasks import task_names
from dynaprune.saving.tensor_file import unique_names

__all__ = ["check_report", "is_number", "read_arm", "read_json", "read_report"]

# Fields of the configuration that tell runs of the same settings apart.
OF_A_RUN = ("seed", "fold")
_CONTROL = re.compile(r"[a-z-]{1,30}")
_HISTORY = ("arm", "epoch", "step", "train_loss", "validation_loss", "best")
_NO_NUMBERS = {"arm": None, "best": ("True", "False"), "target_reached": ("True", "False")}


def is_number(value: Any) -> bool:
    """Whether ``value`` is a number that can be squared and summed: finite, and within 1e60."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e60


def _wrong(path: Path, key: str, expected: str, got: Any) -> ValueError:
    return ValueError(f"{path}: expected {key} to be {expected}, got {str(got)[:60]!r}")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; ValueError with line and column where it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_names)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {type(error).__name__}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} should hold a JSON object, got {type(found).__name__}")
    return found


def read_report(path: Path) -> dict[str, Any] | None:
    """The checked report of a comparison that was not cut short; None for one that was."""
    report = read_json(path)
    if type(report.get("interrupted")) is not bool:
        raise _wrong(path, "interrupted", "true or false", report.get("interrupted"))
    if report["interrupted"]:
        if not isinstance(report.get("config"), dict):
            raise _wrong(path, "config", "an object", report.get("config"))
        return None
    check_report(path, report)
    if not isinstance(report.get("ratios"), dict) or not all(map(is_number, report["ratios"].values())):
        raise _wrong(path, "ratios", "an object of numbers", report.get("ratios"))
    if type(report["pruned"].get("target_reached")) is not bool:
        raise _wrong(path, "pruned.target_reached", "true or false", report["pruned"].get("target_reached"))
    return report


def check_report(path: Path, report: dict[str, Any], costs: Sequence[str] = ()) -> None:
    """ValueError unless the finished ``report`` of ``path`` has what tables and summaries read: both arms
    must have the task's scores and the figures ``costs``."""
    if report.get("task") not in task_names():
        raise _wrong(path, "task", f"one of {', '.join(task_names())}", report.get("task"))
    for key in ("config", "environment", "baseline", "pruned"):
        if not isinstance(report.get(key), dict):
            raise _wrong(path, key, "an object", report.get(key))
    config = report["config"]
    for key in OF_A_RUN:
        value = config.get(key)
        if not (type(value) is int or (key == "fold" and value is None)):
            raise _wrong(path, f"config.{key}", "a whole number", value)
    for arm in ("baseline", "pruned"):
        _check_figures(path, f"{arm}.", report[arm], (*scores_of(report["task"]), *costs), report["task"])
    _check_controls(path, report, costs)
    if report["baseline"]["data"]["sizes"] != report["pruned"]["data"]["sizes"]:
        sizes = report["pruned"]["data"]["sizes"]
        raise _wrong(path, "pruned.data.sizes", "those of the baseline", sizes)


def _check_controls(path: Path, report: dict[str, Any], costs: Sequence[str]) -> None:
    """Reports without controls have no word of them."""
    controls = report.get("controls", {})
    if not isinstance(controls, dict) or not all(_CONTROL.fullmatch(name) for name in controls):
        raise _wrong(path, "controls", "an object of arms by name", controls)
    for name, arm in controls.items():
        if not isinstance(arm, dict):
            raise _wrong(path, f"controls.{name}", "an object", arm)
        needed = (*scores_of(report["task"]), *costs)
        _check_figures(path, f"controls.{name}.", arm, needed, report["task"])


def _check_figures(
    path: Path, prefix: str, result: dict[str, Any], numbers: Sequence[str], task: str
) -> None:
    for key in numbers:
        if not is_number(result.get(key)):
            raise _wrong(path, f"{prefix}{key}", "a number", result.get(key))
    for key in (*figures_of(task), *MEMORY, "sparsity", "sparsity_of_model", "step_seconds_dense"):
        if result.get(key) is not None and not is_number(result[key]):
            raise _wrong(path, f"{prefix}{key}", "a number or null", result[key])
    data = result.get("data")
    sizes = data.get("sizes") if isinstance(data, dict) else None
    if not (isinstance(sizes, list) and len(sizes) == 3 and all(type(n) is int and n > 0 for n in sizes)):
        raise _wrong(path, f"{prefix}data.sizes", "the rows of train, validation and test", sizes)


def read_arm(folder: Path, arm: str, task: str) -> dict[str, Any] | None:
    """The checked ``arm.json`` of an arm of ``task`` that was trained to its end, whose history is whole.

    None for an arm that was cut short: ``arm.json`` is the last file that an arm writes."""
    path = folder / "arm.json"
    if not path.is_file():
        return None
    found = read_json(path)
    if found.get("arm") != arm:
        raise _wrong(path, "arm", repr(arm), found.get("arm"))
    for key in ("environment", "result"):
        if not isinstance(found.get(key), dict):
            raise _wrong(path, key, "an object", found.get(key))
    result = found["result"]
    if type(result.get("interrupted")) is not bool:
        raise _wrong(path, "result.interrupted", "true or false", result.get("interrupted"))
    if result["interrupted"]:
        return None
    numbers = [name for name in figures_of(task) if name != "memory_bytes_last"]
    _check_figures(path, "result.", result, numbers, task)
    if not isinstance(result.get("state"), str):
        raise _wrong(path, "result.state", "text", result.get("state"))
    _check_parts(path, result.get("parts", []))
    _check_history(folder / "history.csv", arm, result["epochs"])
    if (folder / "density.csv").is_file() or arm == "pruned":
        _check_structure(folder)
    return found


def _check_parts(path: Path, parts: Any) -> None:
    """Arms of earlier versions have none."""
    if not isinstance(parts, list) or not all(
        isinstance(part, dict)
        and type(part.get("steps_before")) is int
        and is_number(part.get("process_seconds"))
        and isinstance(part.get("environment"), dict)
        for part in parts
    ):
        raise _wrong(path, "result.parts", "steps_before, process_seconds and environment of each", parts)


def _read_rows(path: Path) -> list[list[str]]:
    try:
        return list(csv.reader(io.StringIO(path.read_text(encoding="utf-8")), strict=True))
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}") from None


def _check_structure(folder: Path) -> None:
    """What the pictures of a pruned arm are drawn from: ``density.csv``, ``masks.json`` and ``masks.npz``."""
    path = folder / "density.csv"
    rows = _read_rows(path)
    if len(rows) < 2 or rows[0][:2] != ["step", "sparsity"]:
        raise ValueError(f"{path}, row 1: expected the columns step, sparsity and the layers, and rows")
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(rows[0]) or not all(cell and _fits("", cell, "", 0) for cell in row):
            raise ValueError(f"{path}, row {number}: expected {len(rows[0])} numbers, got {str(row)[:60]}")
    path = folder / "masks.json"
    described = read_json(path)
    if not isinstance(described.get("shapes"), dict) or not isinstance(described.get("frames"), list):
        raise _wrong(path, "shapes and frames", "an object and a list", described)
    path = folder / "masks.npz"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for frame in described["frames"]:
                for layer in frame["layers"].values():
                    arrays[layer["key"]]
    except Exception as error:  # zipfile and numpy raise whatever a damaged archive leads them to
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {str(error)[:100]}") from None


def _check_history(path: Path, arm: str, epochs: int) -> None:
    rows = _read_rows(path)
    header = rows[0] if rows else []
    missing = [name for name in _HISTORY if name not in header]
    if missing or len(set(header)) != len(header):
        raise ValueError(
            f"{path}, row 1: expected the columns {', '.join(_HISTORY)}, got {', '.join(header)}"
        )
    if len(rows) != epochs + 1:
        raise ValueError(f"{path}: expected {epochs} epochs as arm.json has them, got {len(rows) - 1}")
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(header):
            raise ValueError(f"{path}, row {number}: expected {len(header)} columns, got {len(row)}")
        for name, cell in zip(header, row, strict=True):
            if not _fits(name, cell, arm, number - 1):
                raise ValueError(f"{path}, row {number}, column {name}: got {cell[:40]!r}")


def _fits(column: str, cell: str, arm: str, epoch: int) -> bool:
    if column == "arm":
        return cell == arm
    if column == "epoch":
        return cell == str(epoch)
    if column in _NO_NUMBERS:
        return cell in (_NO_NUMBERS[column] or ())
    try:
        float(cell or "0")  # an empty cell: a figure that this machine cannot tell
    except ValueError:
        return False
    return True
