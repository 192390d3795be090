"""Per-row results of the test part: they are the metrics, and damaged files are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dynaprune.experiment.run_config import resolve
from dynaprune.experiment.test_rows import ROWS_FILE, read_test_rows, write_test_rows
from dynaprune.experiment.train import run_arm


def test_an_arm_keeps_what_each_row_adds_to_its_score(tmp_path: Path) -> None:
    result = run_arm(resolve("digits", steps=20, device="cpu"), "baseline", tmp_path, quiet=True)
    rows = read_test_rows(tmp_path)
    assert set(rows) == {"test_accuracy"} and len(rows["test_accuracy"]) == result["data"]["sizes"][2]
    assert float(rows["test_accuracy"].mean()) == pytest.approx(result["test_accuracy"])
    assert 0 < result["test_accuracy"] < 1


def test_damaged_rows_are_named(tmp_path: Path) -> None:
    assert read_test_rows(tmp_path) == {}
    write_test_rows(tmp_path, {"test_nats": torch.tensor([1.5, 2.5])})
    assert read_test_rows(tmp_path)["test_nats"].tolist() == [1.5, 2.5]
    path = tmp_path / ROWS_FILE
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=str(path)):
        read_test_rows(tmp_path)
    write_test_rows(tmp_path, {"test_nats": torch.tensor([1.5, float("nan")])})
    with pytest.raises(ValueError, match="finite"):
        read_test_rows(tmp_path)
