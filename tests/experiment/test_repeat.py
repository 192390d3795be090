"""The summary over seeds and folds: its interval, its worst cases, and which runs it keeps."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dynaprune.experiment import repeat as repeating
from dynaprune.experiment.paired import of_folds
from dynaprune.experiment.repeat import plan, repeat
from dynaprune.experiment.report import build_report
from dynaprune.experiment.run_config import RunConfig
from dynaprune.experiment.summary import summarise
from dynaprune.experiment.summary_text import summary_markdown


def test_the_interval_against_a_hand_computation() -> None:
    """J = 4 differences 1, 2, 3, 6: mean 3, s^2 = (4 + 1 + 0 + 9) / 3 = 14/3, n_test/n_train = 1/4, so the
    variance of the mean is (1/4 + 1/4) * 14/3 = 7/3. Student's t with 3 degrees of freedom: 3.18245
    two-sided, 2.35336 one-sided (printed tables)."""
    found = of_folds([1.0, 2.0, 3.0, 6.0], test_rows=20, train_rows=80)
    error = math.sqrt(7 / 3)
    assert found["mean"] == 3
    assert found["standard_error"] == pytest.approx(error)
    assert found["low"] == pytest.approx(3 - 3.18245 * error, rel=1e-5)
    assert found["high"] == pytest.approx(3 + 3.18245 * error, rel=1e-5)
    assert found["low_one_sided"] == pytest.approx(3 - 2.35336 * error, rel=1e-5)


def test_the_one_sided_bound_is_on_the_side_of_the_worse() -> None:
    differences = [1.0, 2.0, 3.0, 6.0]
    higher = of_folds(differences, 20, 80)
    lower = of_folds([-d for d in differences], 20, 80, lower_is_better=True)
    assert lower["high_one_sided"] == -(higher["low_one_sided"] or 0) and "low_one_sided" not in lower
    assert of_folds([0.5], 1, 4, lower_is_better=True)["high_one_sided"] is None


def test_the_interval_is_wider_than_that_of_independent_runs() -> None:
    differences = [0.1, -0.2, 0.3, 0.0, 0.2]
    independent = of_folds(differences, 1e-12, 1.0)
    shared = of_folds(differences, 1, 4)
    factor = math.sqrt((1 / 5 + 1 / 4) / (1 / 5))
    assert independent["standard_error"] is not None
    assert shared["standard_error"] == pytest.approx(factor * independent["standard_error"])


def test_one_run_has_a_mean_and_no_interval() -> None:
    assert of_folds([0.5], 1, 4) == {
        "mean": 0.5,
        "standard_error": None,
        "low": None,
        "high": None,
        "low_one_sided": None,
    }
    with pytest.raises(ValueError, match="at least one difference"):
        of_folds([], 1, 4)
    with pytest.raises(ValueError, match="positive row counts"):
        of_folds([1.0], 0, 4)


def test_the_plan_has_every_fold_of_every_seed() -> None:
    config = RunConfig(task="digits")
    runs = plan(config, [0, 7], 3)
    assert [name for name, _ in runs] == [f"seed-{s}-fold-{f}" for s in (0, 7) for f in range(3)]
    assert [(c.seed, c.fold, c.folds) for _, c in runs] == [(s, f, 3) for s in (0, 7) for f in range(3)]
    assert len({c.model_seed for _, c in runs}) == 6
    assert [name for name, _ in plan(config, [4], None)] == ["seed-4"]
    with pytest.raises(ValueError, match="different seeds"):
        plan(config, [1, 1], None)


def _arm(accuracy: float, **more: Any) -> dict[str, Any]:
    arm = {"test_accuracy": accuracy, "test_f1": accuracy - 0.01, "epochs": 9, "interrupted": False}
    return arm | {"parameters_active": 100, "data": {"sizes": [70, 10, 20]}} | more


def _report(
    config: RunConfig, baseline: float, pruned: float, active: int, reached: bool = True
) -> dict[str, Any]:
    small = _arm(pruned, parameters_active=active, sparsity=1 - active / 100, target_reached=reached)
    return build_report(config.to_json(), {"cpu": "test"}, {"baseline": _arm(baseline), "pruned": small})


def test_the_summary_pairs_the_arms_and_names_the_worst_run() -> None:
    config = RunConfig(task="digits")
    figures = [(0.9, 0.92, 20), (0.8, 0.81, 35), (0.95, 0.95, 10)]
    reports = {
        name: _report(each, *figure)
        for (name, each), figure in zip(plan(config, [0], 3), figures, strict=True)
    }
    summary = summarise(reports, planned=5)
    assert (summary["runs"], summary["complete"], summary["target_reached_in_all"]) == (3, False, True)
    accuracy = summary["differences"]["test_accuracy"]
    expected = of_folds([0.02, 0.01, 0.0], 20, 70)
    assert {k: accuracy[k] for k in expected} == pytest.approx(expected)
    sparsity = summary["promises"]["pruned.sparsity"]
    assert (sparsity["worst_run"], sparsity["worst"]) == ("seed-0-fold-1", pytest.approx(0.65))
    active = summary["promises"]["ratios.parameters_active"]
    assert (active["worst_run"], active["worst"], active["min"]) == ("seed-0-fold-1", 0.35, 0.1)
    text = summary_markdown(summary)
    assert "+1.00" in text and "Nadeau" in text and "in every run" in text


def test_a_missed_target_is_named() -> None:
    config = RunConfig(task="digits", seed=3)
    summary = summarise({"seed-3": _report(config, 0.9, 0.9, 50, reached=False)}, 1)
    assert not summary["target_reached_in_all"] and summary["target_missed_in"] == ["seed-3"]
    assert "not in seed-3" in summary_markdown(summary)


def test_finished_runs_are_kept_and_unfinished_ones_made_again(tmp_path: Path, monkeypatch: Any) -> None:
    made: list[tuple[int, int | None]] = []

    def pretend(config: RunConfig, out: Path, **_: Any) -> dict[str, Any]:
        made.append((config.seed, config.fold))
        report = _report(config, 0.9, 0.91, 20)
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.json").write_text(json.dumps(report))
        return report

    monkeypatch.setattr(repeating, "compare", pretend)
    config = RunConfig(task="digits")
    summary, interrupted = repeat(config, tmp_path, [0, 1], 2, quiet=True)
    assert summary is not None and summary["complete"] and not interrupted and len(made) == 4

    cut = tmp_path / "seed-1-fold-0" / "report.json"
    cut.write_text(json.dumps(json.loads(cut.read_text()) | {"interrupted": True}))
    (tmp_path / "seed-0-fold-1" / "report.json").unlink()
    made.clear()
    summary, _ = repeat(config, tmp_path, [0, 1], 2, quiet=True)
    assert made == [(0, 1), (1, 0)]
    assert json.loads((tmp_path / "summary.json").read_text())["runs"] == 4

    with pytest.raises(ValueError, match=r"other settings \(lr\)"):
        repeat(replace(config, lr=0.5), tmp_path, [0, 1], 2, quiet=True)
