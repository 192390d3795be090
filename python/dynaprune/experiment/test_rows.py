"""What an arm's network made of each row of the test part: ``test_rows.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dynaprune.saving.tensor_file import read_tensors, write_tensors

__all__ = ["ROWS_FILE", "read_test_rows", "write_test_rows"]

ROWS_FILE = "test_rows.safetensors"
_METADATA = "dynaprune.test_rows"


def write_test_rows(folder: Path, metrics: Mapping[str, Tensor]) -> None:
    """Write each row's part of every metric that is a mean over rows: ``[rows]`` by the metric's key, losses
    as float32, whether a prediction was right as uint8.

    OSError: a folder that cannot be written."""
    write_tensors(folder / ROWS_FILE, dict(metrics), {_METADATA: json.dumps({"version": 1})})


def read_test_rows(folder: Path) -> dict[str, Tensor]:
    """What `write_test_rows` wrote, as float64 ``[rows]`` by the metric's key; empty where there is no file.

    ValueError: a damaged file, or one of something else."""
    path = folder / ROWS_FILE
    if not path.is_file():
        return {}
    try:
        found = read_tensors(path)
        version = json.loads(found.metadata.get(_METADATA, "null"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not found.sealed or version != {"version": 1}:
        raise ValueError(f"{path} should hold the results of test rows, and it does not")
    rows = {name: tensor.to(torch.float64) for name, tensor in found.tensors.items()}
    if any(tensor.dim() != 1 or not bool(tensor.isfinite().all()) for tensor in rows.values()):
        raise ValueError(f"{path}: expected finite numbers, one for each row")
    return rows
