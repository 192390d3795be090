"""An arm's memory by kind: which steps are measured, what the report says, and that training is the same."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dynaprune import MemoryByKind
from dynaprune.experiment import metrics
from dynaprune.experiment.arm import Arm
from dynaprune.experiment.epochs import train_epochs
from dynaprune.experiment.figure_text import shown
from dynaprune.experiment.interrupts import StopRequest
from dynaprune.experiment.memory import MemoryRecord
from dynaprune.experiment.memory_figures import KINDS, MEMORY, figures_of_steps, tables
from dynaprune.experiment.network import DenseNetwork
from dynaprune.experiment.report import build_report
from dynaprune.experiment.report_text import table_rows, write_markdown
from dynaprune.experiment.run_config import RunConfig
from dynaprune.experiment.steps import TrainState
from dynaprune.experiment.task_results import read_results
from dynaprune.pruning.early_stopping import EarlyStopping
from tests.experiment.killed import run, small_arms, small_digits
from tests.experiment.same_course import differences
from tests.experiment.test_table import single
from tests.experiment.test_train import CPU, TASK, _build, _data, _Shrinking


def entry(step: int, peak: int, weights: int, activations: int) -> dict[str, Any]:
    """A measured step: what is neither weights nor activations are temporaries."""
    kinds = dict.fromkeys(KINDS, 0)
    at_peak = {
        **kinds,
        "weights": weights,
        "activations": activations,
        "temporaries": peak - weights - activations,
    }
    most = {**at_peak, "activations": 2 * activations}
    state = {"step": step, "weights": weights, "peak": peak, "training_state": 4 * weights}
    return {**state, "at_peak": at_peak, "most": most}


def test_the_kinds_are_those_that_are_measured() -> None:
    assert list(KINDS) == [each.name for each in fields(MemoryByKind)]


def test_structures_are_measured_that_differ_from_all_before() -> None:
    record = MemoryRecord()

    def due(weights: int) -> bool:
        if found := record.due(weights):
            record.measured.append(entry(1, weights, weights, 0))
        return found

    assert due(1000)
    assert [due(size) for size in (1000, 1020, 1021, 820)] == [False, False, True, False]
    assert [due(size) for size in (800, 660, 640, 513, 512)] == [True, False, True, False, True]
    assert [due(size) for size in (700, 1021, 1100)] == [False, False, True]


class _Counted(_Shrinking):
    """An event at the end of every fourth step, and the seconds that are left out."""

    left_out = 0.0

    def event_next(self) -> bool:
        return (self.step + 1) % 4 == 0

    def leave_out(self, seconds: float) -> None:
        self.left_out += seconds


def _arm(rows: int, widths: dict[int, int]) -> tuple[Arm, _Counted]:
    data = _data(rows)
    model = _build(data, 0.0)
    assert isinstance(model, nn.Sequential)
    config = RunConfig(task="digits", batch_size=8, epochs=6)
    state = TrainState(config, TASK, model, torch.optim.SGD(model.parameters(), 0.05), CPU)
    network = _Counted(model, widths, reached=99, spoil=99)
    order = torch.Generator().manual_seed(0)
    return Arm("pruned", state, data, network, order, EarlyStopping(5)), network


def test_a_whole_step_of_each_structure_is_measured_and_none_with_an_event(tmp_path: Path) -> None:
    """Five steps an epoch, the last one on 4 samples. The first step of a structure counts FLOPs; step 2 is
    the first that is timed. Step 8 ends with an event, and step 25 is on 4 samples."""
    arm, network = _arm(36, {6: 8, 23: 4})
    train_epochs(arm, StopRequest(), tmp_path, quiet=True)
    assert [each["step"] for each in arm.memory.measured] == [3, 9, 26]
    sizes = [4 * (7 * h + 2 * h + 2) for h in (12, 8, 4)]
    assert [each["at_peak"]["weights"] for each in arm.memory.measured] == sizes
    assert len(arm.state.step_seconds) == 30 - 3 - 3
    assert network.left_out == pytest.approx(arm.memory.seconds) and arm.memory.seconds > 0


def test_the_process_counts_from_before_the_model() -> None:
    record = MemoryRecord()
    assert record.process_bytes(CPU) is None
    record.held_before = metrics.peak_memory_bytes(CPU) - 1000
    assert record.process_bytes(CPU) >= 1000  # type: ignore[operator]
    later = MemoryRecord(held_before=2**50)
    later.load_state_dict({"measured": [], "seconds": 1.5, "process": 5000})
    assert later.process_bytes(CPU) == 5000
    assert later.state_dict(CPU) == {"measured": [], "seconds": 1.5, "process": 5000}


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of a small pruned arm, with and without measuring, and of its baseline."""
    out = tmp_path_factory.mktemp("arms")
    with small_arms(), pytest.MonkeyPatch.context() as patch:
        for arm in ("baseline", "pruned"):
            assert run(small_digits(), arm, out / arm) is not None
        patch.setattr(MemoryRecord, "due", lambda *_: False)
        assert run(small_digits(), "pruned", out / "unmeasured") is not None
    return {name: out / name for name in ("baseline", "pruned", "unmeasured")}


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "arm.json").read_text())["result"]
    return found


def test_measuring_changes_nothing_of_the_training(arms: dict[str, Path]) -> None:
    assert differences(arms["pruned"], arms["unmeasured"]) == []
    assert len(result(arms["unmeasured"])["memory_bytes_measured"]) == 1


def test_an_arm_tells_its_memory_by_kind(arms: dict[str, Path]) -> None:
    found = result(arms["pruned"])
    measured = found["memory_bytes_measured"]
    assert 3 <= len(measured) <= 12 and measured[0]["step"] == 3
    assert measured[-1]["step"] == found["steps"] == 80
    assert measured[0]["weights"] > measured[-1]["weights"]
    for each in measured:
        assert sum(each["at_peak"].values()) == each["peak"]
        assert each["most"]["weights"] == each["weights"]
        assert each["training_state"] >= 4 * each["weights"]
    assert set(MEMORY) <= found.keys()
    assert found["memory_bytes_tensors"] == max(each["peak"] for each in measured)
    assert found["memory_bytes_tensors_last"] == measured[-1]["peak"]
    assert found["memory_bytes_state"] == max(each["training_state"] for each in measured)
    assert found["memory_bytes_index"] > 0 and found["memory_bytes_pruner"] > 0
    assert 0 < found["memory_bytes_process"] < found["peak_memory_bytes"]
    # What the closing step holds is what is counted after it.
    assert found["memory_bytes_state_last"] == found["training_state_bytes"]
    dense = result(arms["baseline"])
    assert [each["step"] for each in dense["memory_bytes_measured"]] == [3, 80]
    # Scratch memory is the process's: what ran in it before may have left some.
    assert dense["memory_bytes_index"] == dense["memory_bytes_pruner"] == 0


def test_the_report_has_tables_by_kind(arms: dict[str, Path], tmp_path: Path) -> None:
    both = {arm: {**result(arms[arm]), "process_seconds": 1.0} for arm in ("baseline", "pruned")}
    report = build_report(RunConfig(task="digits").to_json(), {}, both)
    ratio = both["pruned"]["memory_bytes_tensors"] / both["baseline"]["memory_bytes_tensors"]
    assert report["ratios"]["memory_bytes_tensors"] == pytest.approx(ratio)
    assert "memory_bytes_index" not in report["ratios"]
    write_markdown(tmp_path / "report.md", report, [])
    text = (tmp_path / "report.md").read_text()
    weights = [shown(both[arm]["memory_bytes_weights_last"], "bytes") for arm in both]
    last = text[text.index("| at the last structure |") :]
    assert f"| weights | {weights[0]} | {weights[1]} |" in last
    assert "| **all of these** |" in text and "| buffers |" not in text
    labels = [row[0] for row in table_rows(report)]
    assert "peak of tensors in a step" in labels
    assert "peak memory of the process, less what it held before the model" in labels


def test_figures_are_of_the_highest_peak_and_of_the_last_structure() -> None:
    steps = [entry(3, 90, 10, 40), entry(9, 100, 8, 50), entry(20, 60, 4, 30)]
    found = figures_of_steps(steps, closed=True)
    assert found["memory_bytes_tensors"] == 100 and found["memory_bytes_activations"] == 50
    assert found["memory_bytes_most_activations"] == 100 and found["memory_bytes_state"] == 40
    assert found["memory_bytes_tensors_last"] == 60 and found["memory_bytes_state_last"] == 16
    assert found["memory_bytes_measured"] == steps
    cut = figures_of_steps(steps, closed=False)
    assert cut["memory_bytes_tensors"] == 100 and not any(key.endswith("_last") for key in cut)
    assert figures_of_steps([], closed=False) == {}
    assert tables({"baseline": None, "pruned": None, "ratios": {}}, shown) == []


def test_the_table_over_tasks_has_them_where_every_run_has(tmp_path: Path) -> None:
    def measured(report: dict[str, Any]) -> None:
        for arm, size in (("baseline", 100), ("pruned", 60)):
            report[arm] |= figures_of_steps([entry(3, size, 10, 40)], closed=True)

    single(tmp_path / "with", measured)
    single(tmp_path / "without", seed=1)
    (alone,) = read_results([tmp_path / "with"])
    figures = {(each.label, each.of): each.interval["mean"] for each in alone.figures()}
    assert figures["peak of tensors in a step", "ratio"] == pytest.approx(0.6)
    assert figures["activations at that peak", "baseline"] == 40
    assert figures["temporaries at that peak", "ratio"] == pytest.approx(10 / 50)
    (both,) = read_results([tmp_path / "with", tmp_path / "without"])
    assert "peak of tensors in a step" not in {each.label for each in both.figures()}


def test_a_dense_network_has_no_events() -> None:
    network = DenseNetwork(nn.Linear(2, 2))
    assert network.pruner is None and not network.event_next()
