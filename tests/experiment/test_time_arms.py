"""Times of arms by step times measured alone: what they are summed from, and where tables show them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dynaprune.cli import app
from dynaprune.experiment.arm_times import add_times
from dynaprune.experiment.run_config import resolve
from dynaprune.experiment.time_arms import Structure, _told, measure_arm, structures_of
from dynaprune.experiment.train import run_arm
from dynaprune.experiment.write import write_json


def _result(*history: tuple[int, dict[str, float]], steps: int = 10) -> dict[str, Any]:
    rows = [{"step": step, "density": density} for step, density in history]
    return {"steps": steps, "pruner": {"history": rows}}


def test_structures_are_what_lies_between_changes() -> None:
    half, less = {"a": 0.5, "b": 1.0}, {"a": 0.5, "b": 0.5}
    assert structures_of({"steps": 10}) == [Structure(10, {})]
    assert structures_of(_result((0, half), (4, less))) == [Structure(4, half), Structure(6, less)]
    assert structures_of(_result((3, half))) == [Structure(3, {}), Structure(7, half)]
    assert structures_of(_result((0, half), (3, half), (5, dict(half)))) == [Structure(10, half)]
    assert structures_of(_result((0, half), (10, less))) == [Structure(10, half)]
    assert structures_of(_result((0, half), (0, less))) == [Structure(10, less)]


def test_events_that_come_too_late_to_be_measured_are_told() -> None:
    time = {"seconds": 10.0, "ratio": 0.5, "events": 4, "event_seconds": None}
    assert _told(time).endswith("4 events left out: none within 120 steps")
    assert _told({**time, "event_seconds": 0.25}).endswith("4 events of 0.25 s")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of digits whose pruned arm changes in its first epoch, with times."""
    out = tmp_path_factory.mktemp("times") / "run"
    config = resolve("digits", epochs=1, target_sparsity=0.6, block_size=8, calibration_samples=0)
    for arm in ("baseline", "pruned"):
        run_arm(config, arm, out / arm, quiet=True)
    done = CliRunner().invoke(app, ["time", str(out)])
    assert done.exit_code == 0, done.output
    assert "baseline" in done.stderr and "pruned" in done.stderr
    return out


def test_a_time_is_the_sum_over_structures_and_events(finished: Path) -> None:
    said = json.loads((finished / "times.json").read_text(encoding="utf-8"))
    arm = json.loads((finished / "pruned" / "arm.json").read_text(encoding="utf-8"))["result"]
    pruned, baseline = said["arms"]["pruned"], said["arms"]["baseline"]
    structures = structures_of(arm)
    assert len(structures) > 2 and sum(each.steps for each in structures) == arm["steps"] == pruned["steps"]
    assert pruned["events"] > 2 and pruned["event_seconds"] > 0
    assert 2 <= len(pruned["structures"]) <= 6
    assert pruned["structures"][0]["mean_density"] == 1
    assert pruned["structures"][-1]["mean_density"] == pytest.approx(structures[-1].mean_density)
    ratios = [each["step_seconds"] / each["step_seconds_dense"] for each in pruned["structures"]]
    of_steps = pruned["seconds"] - pruned["events"] * pruned["event_seconds"]
    assert min(ratios) - 1e-9 <= of_steps / pruned["seconds_dense"] <= max(ratios) + 1e-9
    assert pruned["ratio"] == pytest.approx(pruned["seconds"] / pruned["seconds_dense"])
    assert baseline["events"] == 0 and len(baseline["structures"]) == 1
    assert said["environment"]["cpu"]


def test_reports_get_the_times_of_their_own_steps(finished: Path) -> None:
    said = json.loads((finished / "times.json").read_text(encoding="utf-8"))["arms"]
    report = {"baseline": {"steps": 100}, "pruned": {"steps": 50}}
    add_times(report, finished)
    dense_step = said["baseline"]["seconds_dense"] / said["baseline"]["steps"]
    assert report["baseline"]["seconds_alone"] == pytest.approx(100 * dense_step * said["baseline"]["ratio"])
    assert report["pruned"]["seconds_alone"] == pytest.approx(50 * dense_step * said["pruned"]["ratio"])
    (finished / "seed-1").mkdir()
    below = {"baseline": {"steps": 100}, "pruned": {"steps": 50}}
    add_times(below, finished / "seed-1")
    assert below == report


def test_without_the_file_nothing_is_added_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    report: dict[str, Any] = {
        "baseline": {"steps": 1},
        "pruned": {"steps": 1},
        "controls": {"small": {"steps": 1}},
    }
    add_times(report, tmp_path)
    assert report["baseline"] == {"steps": 1}
    good = {"ratio": 1.0, "seconds_dense": 2.0, "steps": 4}
    for arms in (
        None,
        {"baseline": good, "pruned": good},
        {"baseline": good, "pruned": good, "small": {"ratio": 0}},
    ):
        write_json(tmp_path / "times.json", {"arms": arms})
        with pytest.raises(
            ValueError, match=r"times.json: expected the ratio of each arm \(baseline, pruned, small\)"
        ):
            add_times(report, tmp_path)


def test_plain_layers_that_get_narrower_are_refused(tmp_path: Path) -> None:
    config = resolve("digits", units="neurons").to_json()
    with pytest.raises(ValueError, match="pruned in blocks, got units='neurons'"):
        measure_arm({**_result(), "settings": config}, resolve("digits"), tmp_path)


@pytest.mark.parametrize("said", [{}, {"result": None}, {"result": {"settings": {"task": "chess"}}}], ids=str)
def test_a_damaged_arm_is_named(said: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "baseline").mkdir()
    write_json(tmp_path / "baseline" / "arm.json", said)
    done = CliRunner().invoke(app, ["time", str(tmp_path)])
    assert done.exit_code == 2 and "expected the settings of an arm" in " ".join(done.stderr.split())


def test_unfinished_arms_are_not_measured(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["time", str(tmp_path)])
    assert done.exit_code == 2 and "baseline/arm.json" in done.stderr.replace("\n", "")
