"""The kernel benchmark: what it reports, what it refuses to report, and the picture of it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import plot, providers, run
from benchmarks.kernel_cases import Call, Case, Operands
from dynaprune_kernels import ConvGeometry, reference

LINEAR = Case("linear_wgrad", 24, 64, 96, 16, 0.5, torch.float32)
CONV = Case("conv2d_dgrad", 2, 32, 32, 16, 0.25, torch.float32, ConvGeometry(3, 3, 1, 1, 1, 1), (6, 5))
# Milliseconds that a made-up clock shows for each provider, in the order in which they are timed.
TIMES = {"dense": 8.0, "dense-conv1x1": 10.0, "dynaprune-cpu": 2.0, "dynaprune-dense": 16.0}


def providers_of(case: Case) -> list[str]:
    return [name for name in TIMES if case.conv is None or name != "dense-conv1x1"]


def made_up_clock(case: Case) -> run.Timer:
    times = iter([TIMES[name] for name in providers_of(case)])

    def clock(call: Call) -> run.Quantiles:
        call()
        middle = next(times)
        return middle / 2, middle, middle * 2

    return clock


@pytest.mark.parametrize("case", [LINEAR, CONV], ids=lambda case: case.op)
def test_efficiency_is_density_times_dense_time_over_time(case: Case) -> None:
    faults: list[str] = []
    rows = {row["provider"]: row for row in run.measured(case, "cpu", made_up_clock(case), faults)}
    assert faults == []
    assert list(rows) == providers_of(case)
    assert float(rows["dynaprune-cpu"]["efficiency"]) == pytest.approx(case.density * 8 / 2)
    assert float(rows["dense"]["efficiency"]) == 1.0
    assert (rows["dense"]["ms_20"], rows["dense"]["ms_80"]) == ("4", "16")
    assert float(rows["dense"]["tflops"]) == pytest.approx(
        float(rows["dynaprune-cpu"]["tflops"]) * 2 / 8 / case.density, rel=1e-3
    )


def test_a_wrong_result_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def misses_a_block(case: Case, operands: Operands) -> Call:
        right = providers.PROVIDERS["dynaprune-dense"](case, operands)

        def call() -> torch.Tensor:
            result = right()
            result[0] = 0
            return result

        return call

    monkeypatch.setitem(providers.PROVIDERS, "dynaprune-cpu", misses_a_block)
    faults: list[str] = []
    rows = run.measured(LINEAR, "cpu", made_up_clock(LINEAR), faults)
    assert [row["provider"] for row in rows] == ["dense", "dense-conv1x1", "dynaprune-dense"]
    assert len(faults) == 1 and "dynaprune-cpu is wrong: relative error" in faults[0]


def test_the_command_writes_a_table_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "matrix_cases", lambda *arguments: iter([LINEAR]))
    monkeypatch.setattr(run, "timer", lambda device, quick: made_up_clock(LINEAR))
    table, picture = tmp_path / "linear.csv", tmp_path / "speedup.png"
    assert run.main(["--suite", "linear", "--device", "cpu", "--out", str(table)]) == 0
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == run.COLUMNS
    assert all(row["device"] and row["versions"].startswith("torch ") for row in rows)
    assert plot.speedups(rows) == {
        ("linear_wgrad", LINEAR.shape, "float32"): {
            "dynaprune-cpu, 16": [(0.5, 4.0)],
            "dynaprune-dense, 16": [(0.5, 0.5)],
        }
    }
    plot.main([str(table), "--out", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")


def any_time(call: Call) -> run.Quantiles:
    call()
    return 1.0, 2.0, 3.0


@pytest.mark.parametrize("suite", ["saliency", "layout"])
def test_suites_without_a_product(suite: str) -> None:
    faults: list[str] = []
    (rows,) = run.other_rows(suite, "cpu", True, any_time, faults)
    assert faults == []
    assert [row["provider"] for row in rows] == ["dynaprune-cpu", "dynaprune-dense"]
    assert all(row["ms_50"] == "2" for row in rows)


@pytest.mark.parametrize("suite", ["saliency", "layout"])
def test_a_wrong_statistic_or_list_is_not_reported(suite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        @staticmethod
        def block_saliency(*arguments: Any) -> tuple[torch.Tensor, ...]:
            return tuple(2 * sums for sums in reference.block_saliency(*arguments))

        @staticmethod
        def layout_update(mask: torch.Tensor, *arguments: Any) -> None:
            mask[0] = True
            reference.layout_update(mask, *arguments)

    monkeypatch.setitem(run.OURS, "dynaprune-cpu", Wrong)
    faults: list[str] = []
    (rows,) = run.other_rows(suite, "cpu", True, any_time, faults)
    assert [row["provider"] for row in rows] == ["dynaprune-dense"]
    assert len(faults) == 1 and "dynaprune-cpu is wrong" in faults[0]
