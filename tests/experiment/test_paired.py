"""Summaries and tables over seeds: which interval they show, test rows, controls, and the chart."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from typer.testing import CliRunner

from dynaprune.cli import app
from dynaprune.experiment.intervals import paired_bootstrap
from dynaprune.experiment.paired import of_folds, of_rows, of_runs, of_seeds, resampled
from dynaprune.experiment.repeat import plan, rows_of_runs
from dynaprune.experiment.report import build_report
from dynaprune.experiment.run_config import RunConfig
from dynaprune.experiment.summary import summarise
from dynaprune.experiment.summary_text import summary_markdown
from dynaprune.experiment.table import table_csv, table_markdown
from dynaprune.experiment.task_results import read_results
from dynaprune.experiment.test_rows import write_test_rows
from dynaprune.experiment.write import write_json
from tests.experiment.test_table import ENVIRONMENT, arm

ROWS = 40
ACCURACIES = {"baseline": (30, 31, 29), "pruned": (32, 34, 30), "small": (28, 33, 31)}


def repeated(out: Path, task: str = "cifar10") -> dict[str, dict[str, Any]]:
    """Three seeds with the control small, and the rows of every arm."""
    reports = {}
    draw = np.random.default_rng(0)
    for number, (name, config) in enumerate(plan(RunConfig(task=task), [0, 1, 2], None)):
        arms = {}
        for each, scale in (("baseline", 1.0), ("pruned", 0.4), ("small", 0.5)):
            right = torch.zeros(ROWS, dtype=torch.uint8)
            right[torch.from_numpy(draw.permutation(ROWS)[: ACCURACIES[each][number]])] = 1
            more = {"sparsity": 0.8, "target_reached": True} if each == "pruned" else {}
            arms[each] = arm(float(right.double().mean()), scale, **more)
            (out / name / each).mkdir(parents=True)
            write_test_rows(out / name / each, {"test_accuracy": right})
        reports[name] = build_report(config.to_json(), ENVIRONMENT, arms)
        write_json(out / name / "report.json", reports[name])
    folders = {name: out / name for name in reports}
    write_json(out / "summary.json", summarise(reports, 3, rows_of_runs(folders, ["small"])))
    return reports


def test_seeds_on_a_fixed_test_part_have_a_paired_t_interval_and_one_over_rows(tmp_path: Path) -> None:
    repeated(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["interval"] == "t"
    for other, found in (
        ("baseline", summary["differences"]["test_accuracy"]),
        ("small", summary["controls"]["small"]["differences"]["test_accuracy"]),
    ):
        differences = [(p - o) / ROWS for p, o in zip(ACCURACIES["pruned"], ACCURACIES[other], strict=True)]
        low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
        assert found[f"{other}_mean"] == pytest.approx(statistics.mean(ACCURACIES[other]) / ROWS)
        means = [found["mean"], found["over_rows"]["mean"]]
        assert means == pytest.approx([statistics.mean(differences)] * 2)
        assert (found["low"], found["high"]) == pytest.approx((low, high))
        assert found["over_rows"]["rows"] == ROWS
        assert found["over_rows"]["low"] < found["mean"] < found["over_rows"]["high"]
    control = summary["controls"]["small"]
    assert (control["runs"], control["flops_total"]) == (3, 0.5)
    text = summary_markdown(summary)
    assert "Student's t" in text and "bootstrap" in text and "Nadeau" not in text
    assert "| small | 0.500 | 0.500 | test accuracy | 76.67 % | 80.00 % | +3.33 |" in text


def test_test_parts_that_are_drawn_anew_have_the_corrected_interval_alone(tmp_path: Path) -> None:
    reports = repeated(tmp_path, "titanic")
    summary = json.loads((tmp_path / "summary.json").read_text())
    found = summary["differences"]["test_accuracy"]
    differences = [r["pruned"]["test_accuracy"] - r["baseline"]["test_accuracy"] for r in reports.values()]
    assert summary["interval"] == "corrected" and found["over_rows"] is None
    wanted = of_folds(differences, 40, 60)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    assert "Nadeau" in summary_markdown(summary)
    assert resampled(True, {"folds": 5}) and resampled(False, {}) and not resampled(True, {"folds": None})


def test_the_table_has_lines_of_controls_and_over_test_rows(tmp_path: Path) -> None:
    repeated(tmp_path)
    results = read_results([tmp_path])
    summary = json.loads((tmp_path / "summary.json").read_text())
    figures = {(figure.label, figure.of): figure for figure in results[0].figures()}
    for of, found in (
        ("difference", summary["differences"]["test_accuracy"]),
        ("pruned - small", summary["controls"]["small"]["differences"]["test_accuracy"]),
    ):
        for name, wanted in ((of, found), (f"{of} over test rows", found["over_rows"])):
            interval = figures["test accuracy", name].interval
            bounds = ("mean", "low", "high")
            assert [interval[k] for k in bounds] == pytest.approx([wanted[k] for k in bounds])
    assert figures["FLOPs of the whole training", "ratio of small"].interval["mean"] == 0.5
    assert figures["training time", "small"].interval["mean"] == 5.0
    text = table_markdown(results)
    assert "cifar10: Student's t" in text and "over test rows in points |" in text and "Nadeau" not in text
    assert "cifar10,test accuracy,pruned - small,share,3," in table_csv(results)


def test_the_chart_is_drawn(tmp_path: Path) -> None:
    repeated(tmp_path / "runs")
    chart = tmp_path / "chart.png"
    done = CliRunner().invoke(app, ["table", str(tmp_path / "runs"), "--chart", str(chart)])
    assert done.exit_code == 0 and chart.read_bytes().startswith(b"\x89PNG") and "small" in done.stdout
    wrong = CliRunner().invoke(app, ["table", str(tmp_path / "runs"), "--chart", str(tmp_path / "chart.svg")])
    assert wrong.exit_code == 2 and "--chart must be a .png file" in wrong.stderr


def test_rows_that_differ_in_number_are_drawn_by_their_place() -> None:
    """The mean over all rows stays what it is."""
    draw = np.random.default_rng(1)
    runs = [(draw.normal(size=n), draw.normal(size=n)) for n in (30, 30)]
    found = of_rows(runs)
    plain = paired_bootstrap(np.stack([second - first for first, second in runs]), seed=0)
    assert found is not None and (found["low"], found["high"]) == pytest.approx((plain.low, plain.high))
    longer = (draw.normal(size=37), draw.normal(size=37))
    found = of_rows([*runs, longer])
    assert found is not None and found["rows"] == 30
    assert found["mean"] == pytest.approx(np.mean([(s - f).mean() for f, s in [*runs, longer]]))
    assert of_rows([(None, np.zeros(3))]) is None and of_rows([]) is None
    with pytest.raises(ValueError, match="as many test rows in both arms, got 2 and 3"):
        of_rows([(np.zeros(2), np.zeros(3))])


def test_one_run_has_no_interval_over_seeds_but_one_over_rows(tmp_path: Path) -> None:
    reports = repeated(tmp_path)
    first = dict([next(iter(reports.items()))])
    summary = summarise(first, 1, rows_of_runs({name: tmp_path / name for name in first}, []))
    found = summary["differences"]["test_accuracy"]
    assert found["low"] is None and found["over_rows"]["low"] < found["over_rows"]["high"]
    assert of_runs([0.5], (60, 40), resampled=False) == of_seeds([0.5])


@pytest.mark.parametrize("controls", [[], {"| x |": {}}, {"small": None}, {"small": {"test_accuracy": "1"}}])
def test_hostile_controls_are_refused(controls: Any, tmp_path: Path) -> None:
    reports = repeated(tmp_path)
    name, report = next(iter(reports.items()))
    write_json(tmp_path / name / "report.json", {**report, "controls": controls})
    with pytest.raises(ValueError, match=r"report\.json: expected controls"):
        read_results([tmp_path])
