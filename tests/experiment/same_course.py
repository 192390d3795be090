"""Whether two arms took the same course: everything that they write but times and memory, bit for bit."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_FILES = ("config.json", "density.csv", "masks.json", "model.safetensors")


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two arms' folders, by name; empty where they took the same course."""
    found = [name for name in _FILES if _bytes(one / name) != _bytes(other / name)]
    found += [f"history.csv: {said}" for said in _unlike(_history(one), _history(other))]
    found += [f"arm.json: {said}" for said in _unlike(_result(one), _result(other))]
    found += [f"masks.npz: {said}" for said in _unlike(_masks(one), _masks(other))]
    return found


def is_measured(name: str) -> bool:
    """Whether a figure of that name is of a clock or of the process's memory."""
    return "seconds" in name or name == "share" or ("memory" in name and "bytes" in name)


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _history(folder: Path) -> list[dict[str, str]]:
    with (folder / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _result(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "arm.json").read_text())["result"]
    return {name: value for name, value in result.items() if name not in ("parts", "checkpoints")}


def _masks(folder: Path) -> dict[str, Any]:
    if not (folder / "masks.npz").is_file():
        return {}
    with np.load(folder / "masks.npz") as arrays:
        return {name: [str(each.dtype), each.shape, each.tobytes()] for name, each in arrays.items()}


def _unlike(one: Any, other: Any, where: str = "") -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for name in one.keys() | other.keys():
            if not is_measured(name):
                yield from _unlike(one.get(name, "(none)"), other.get(name, "(none)"), f"{where}.{name}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from _unlike(a, b, f"{where}[{number}]")
    elif one != other and not (one != one and other != other):
        yield f"{where.lstrip('.')} {str(one)[:60]} / {str(other)[:60]}"
