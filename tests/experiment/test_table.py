"""The table over tasks: its figures and intervals against plain computations, and what it refuses."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dynaprune.cli import app
from dynaprune.experiment.paired import of_folds
from dynaprune.experiment.repeat import plan
from dynaprune.experiment.report import build_report
from dynaprune.experiment.run_config import RunConfig
from dynaprune.experiment.summary import summarise
from dynaprune.experiment.table import table_csv, table_markdown
from dynaprune.experiment.task_results import read_results
from dynaprune.experiment.write import write_json

ENVIRONMENT = {
    "cpu": "some | CPU",
    "threads": 1,
    "device": "cpu",
    "versions": {"torch": "2.13.0"},
    "commit": "abc",
}
SIZES = [60, 20, 40]


def arm(accuracy: float, scale: float, **more: Any) -> dict[str, Any]:
    figures = {
        "test_accuracy": accuracy,
        "test_f1": accuracy - 0.1,
        "test_loss": 1.0,
        "train_seconds": 10 * scale,
        "peak_memory_bytes": 2**20,
        "memory_bytes_last": int(2**20 * scale),
        "training_state_bytes": int(2**24 * scale),
        "parameters_active": int(1000 * scale),
        "flops_per_step_last": int(10**9 * scale),
        "flops_total": int(10**12 * scale),
        "step_seconds_last": 0.01 * scale,
        "epochs": 5,
        "interrupted": False,
        "data": {"sizes": SIZES},
    }
    return {**figures, **more}


def report(
    config: RunConfig, accuracies: tuple[float, float] = (0.9, 0.95), scale: float = 0.5
) -> dict[str, Any]:
    pruned = arm(accuracies[1], scale, sparsity=0.8, target_reached=True, step_seconds_dense=0.02 * scale)
    arms = {"baseline": arm(accuracies[0], 1.0), "pruned": pruned}
    return build_report(config.to_json(), ENVIRONMENT, arms)


def repeated(
    out: Path, task: str = "digits", folds: int = 3, seeds: tuple[int, ...] = (0, 1), **config: Any
) -> dict[str, dict[str, Any]]:
    """The folder that ``compare --seeds 0,1 --folds 3`` leaves, and its reports."""
    reports = {}
    for number, (name, each) in enumerate(plan(RunConfig(task=task, **config), list(seeds), folds)):
        accuracies = (0.9 - 0.01 * number, 0.91 + 0.003 * number**2 / 10)
        reports[name] = report(each, accuracies, 0.3 + 0.05 * number)
        (out / name).mkdir(parents=True)
        write_json(out / name / "report.json", reports[name])
    write_json(out / "summary.json", summarise(reports, len(reports)))
    return reports


def single(out: Path, change: Callable[[dict[str, Any]], Any] = lambda r: None, **config: Any) -> Path:
    out.mkdir(parents=True)
    found = report(RunConfig(**{"task": "digits", **config}))
    change(found)
    (out / "report.json").write_text(json.dumps(found))
    return out


def rows(folders: list[Path]) -> dict[tuple[str, str, str], dict[str, str]]:
    found = csv.DictReader(io.StringIO(table_csv(read_results(folders))))
    return {(row["task"], row["figure"], row["of"]): row for row in found}


def test_every_figure_is_the_mean_over_the_runs_with_the_of_folds(tmp_path: Path) -> None:
    reports = repeated(tmp_path / "runs").values()
    found = rows([tmp_path / "runs"])
    expected: dict[tuple[str, str], list[float]] = {
        ("test accuracy", "baseline"): [r["baseline"]["test_accuracy"] for r in reports],
        ("test accuracy", "difference"): [
            r["pruned"]["test_accuracy"] - r["baseline"]["test_accuracy"] for r in reports
        ],
        ("test F1", "pruned"): [r["pruned"]["test_f1"] for r in reports],
        ("training time", "ratio"): [r["pruned"]["train_seconds"] / 10 for r in reports],
        ("weights + gradients + optimizer state", "pruned"): [
            r["pruned"]["training_state_bytes"] for r in reports
        ],
        ("active parameters", "ratio"): [r["pruned"]["parameters_active"] / 1000 for r in reports],
        ("step time", "ratio to the dense twin"): [0.5] * 6,
        ("sparsity of the prunable weights", "pruned"): [0.8] * 6,
    }
    for (figure, of), values in expected.items():
        row = found["digits", figure, of]
        wanted = of_folds(values, SIZES[2], SIZES[0])
        assert row["runs"] == "6"
        assert float(row["mean"]) == pytest.approx(statistics.mean(values))
        for bound in ("low", "high"):
            assert float(row[bound]) == pytest.approx(wanted[bound]), (figure, of, bound)
    figures = {(figure, of) for _, figure, of in found}
    for figure in ("peak memory of the process", "FLOPs of the last step", "FLOPs of the whole training"):
        assert {(figure, of) for of in ("baseline", "pruned", "ratio")} <= figures
    assert not any("loss" in figure for figure, _ in figures)


def test_the_difference_agrees_with_the_summary_of_the_runs(tmp_path: Path) -> None:
    repeated(tmp_path / "runs")
    summary = json.loads((tmp_path / "runs" / "summary.json").read_text())["differences"]["test_f1"]
    row = rows([tmp_path / "runs"])["digits", "test F1", "difference"]
    assert [float(row[k]) for k in ("mean", "low", "high")] == [summary[k] for k in ("mean", "low", "high")]


def test_markdown_has_a_column_for_each_task_and_a_dash_for_what_it_lacks(tmp_path: Path) -> None:
    repeated(tmp_path / "digits")
    single(
        tmp_path / "titanic",
        lambda r: [r[a].update(test_wer=0.25) for a in ("baseline", "pruned")],
        task="titanic",
    )
    text = table_markdown(read_results([tmp_path / "titanic", tmp_path / "digits"]))
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table[0] == "| | titanic | digits |"
    assert {line.count("|") for line in table} == {4}
    cells = {line.split(" | ")[0].strip("| "): line for line in table}
    assert (
        cells["test word error rate, baseline"]
        == "| test word error rate, baseline | 25.00 % (no interval) | - |"
    )
    assert cells["runs"] == "| runs | 1 | 6 (3 folds, seeds: 2) |"
    assert cells["target sparsity"] == "| target sparsity | 0.9, reached in 1 | 0.9, reached in 6 |"
    assert "| 500 (no interval)" in cells["active parameters, pruned"]
    assert "+5.00 (no interval)" in cells["test accuracy, difference in points"]
    assert "No interval: a single run says nothing of the spread (titanic)." in text
    assert "some \\| CPU, device cpu, threads 1, torch 2.13.0, commit abc." in text


def test_what_is_said_of_the_data_stands_in_the_table(tmp_path: Path) -> None:
    data = {"sizes": SIZES, "copy": "JPEG copy", "note": "Images were compressed.\nTwice."}
    text = table_markdown(read_results([single(tmp_path / "a", lambda r: r["baseline"].update(data=data))]))
    assert text.startswith("| | digits (JPEG copy) |\n")
    assert "- digits: Images were compressed. Twice.\n" in text


def test_figures_that_a_machine_cannot_tell_are_left_out(tmp_path: Path) -> None:
    def forget(found: dict[str, Any]) -> None:
        found["baseline"].update(memory_bytes_last=None, test_wer="x", **{"test_|": 1.0})

    found = {(figure, of) for _, figure, of in rows([single(tmp_path / "a", forget)])}
    assert ("peak memory in the last 20 steps", "pruned") in found
    assert ("peak memory in the last 20 steps", "ratio") not in found
    assert not any("|" in figure or "word error" in figure for figure, _ in found)


def test_a_single_run_has_empty_bounds_in_csv(tmp_path: Path) -> None:
    found = rows([single(tmp_path / "a")])
    assert {(row["low"], row["high"]) for row in found.values()} == {("", "")}


def test_folders_of_one_task_are_joined(tmp_path: Path) -> None:
    repeated(tmp_path / "a", seeds=(0,))
    repeated(tmp_path / "b", seeds=(1, 2))
    assert rows([tmp_path / "a", tmp_path / "b"])["digits", "test F1", "pruned"]["runs"] == "9"
    with pytest.raises(ValueError, match="are the same run of digits: seed 0, fold 0"):
        read_results([tmp_path / "a", tmp_path / "a"])


def test_mixed_settings_and_machines_are_refused(tmp_path: Path) -> None:
    first = single(tmp_path / "a")
    other = single(tmp_path / "b", seed=1, lr=0.01, target_sparsity=0.5)
    with pytest.raises(
        ValueError, match=r"different settings.*lr 0.001 and 0.01; target_sparsity 0.9 and 0.5"
    ):
        read_results([first, other])
    other = single(tmp_path / "c", lambda r: r.update(environment={**ENVIRONMENT, "threads": 2}), seed=1)
    with pytest.raises(ValueError, match=r"different machines.*threads 1 and 2"):
        read_results([first, other])
    repeated(tmp_path / "runs")
    path = tmp_path / "runs" / "seed-1-fold-2" / "report.json"
    write_json(path, report(RunConfig("digits", seed=1, fold=2, folds=3, epochs=7)))
    with pytest.raises(ValueError, match="epochs 50 and 7"):
        read_results([tmp_path / "runs"])


def test_unfinished_runs_are_refused_by_name(tmp_path: Path) -> None:
    out = tmp_path / "runs"
    repeated(out)
    (out / "seed-0-fold-1" / "report.json").unlink()
    interrupted = json.loads((out / "seed-1-fold-0" / "report.json").read_text())
    write_json(out / "seed-1-fold-0" / "report.json", {**interrupted, "interrupted": True, "pruned": None})
    with pytest.raises(ValueError, match=r"seed-0-fold-1 \(no report.json\), seed-1-fold-0 \(interrupted\)"):
        read_results([out])


def test_planned_runs_that_were_not_begun_are_missed(tmp_path: Path) -> None:
    out = tmp_path / "runs"
    reports = repeated(out)
    write_json(out / "summary.json", summarise(reports, 20))
    with pytest.raises(ValueError, match="14 of 20 planned runs not begun"):
        read_results([out])
    (out / "summary.json").unlink()
    with pytest.raises(ValueError, match=r"no summary.json"):
        read_results([out])


def test_folders_without_a_finished_run_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, said in (
        (tmp_path, "no finished run"),
        (tmp_path / "file", "is none"),
        (tmp_path / "x", "is none"),
    ):
        with pytest.raises(ValueError, match=said):
            read_results([path])
    out = single(tmp_path / "cut", lambda r: r.update(interrupted=True))
    with pytest.raises(ValueError, match="no finished run"):
        read_results([out])
    with pytest.raises(ValueError, match="at least one folder"):
        read_results([])


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "an unknown task": lambda r: r.update(task="| x |"),
    "task as a list": lambda r: r.update(task=["digits"]),
    "config as a list": lambda r: r.update(config=[]),
    "seed as text": lambda r: r["config"].update(seed="0"),
    "fold as a float": lambda r: r["config"].update(fold=1.5),
    "no arm": lambda r: r.update(pruned=None),
    "accuracy as text": lambda r: r["baseline"].update(test_accuracy="0.9"),
    "accuracy as a bool": lambda r: r["baseline"].update(test_accuracy=True),
    "accuracy not finite": lambda r: r["pruned"].update(test_f1=float("nan")),
    "a huge integer": lambda r: r["pruned"].update(parameters_active=10**400),
    "another huge integer": lambda r: r["baseline"].update(flops_total=10**400),
    "seconds as text": lambda r: r["pruned"].update(step_seconds_dense="fast"),
    "no sizes": lambda r: r["baseline"].update(data={}),
    "sizes of zero": lambda r: r["baseline"].update(data={"sizes": [0, 1, 1]}),
    "other sizes": lambda r: r["pruned"].update(data={"sizes": [1, 1, 1]}),
    "environment as text": lambda r: r.update(environment="x"),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_reports_are_refused_by_file_and_key(
    change: Callable[[dict[str, Any]], Any], tmp_path: Path
) -> None:
    out = single(tmp_path / "a", change)
    with pytest.raises(ValueError, match=r"report\.json: expected "):
        read_results([out])


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "[]", '"x"', "\x00", '{"interrupted": false}'])
def test_damaged_files_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ValueError, match=r"report\.json"):
        read_results([tmp_path])


def test_the_command_prints_or_writes(tmp_path: Path) -> None:
    repeated(tmp_path / "runs")
    results, run = read_results([tmp_path / "runs"]), CliRunner().invoke
    assert run(app, ["table", str(tmp_path / "runs")]).stdout == table_markdown(results)
    done = run(
        app, ["table", str(tmp_path / "runs"), "--format", "csv", "--out", str(tmp_path / "table.csv")]
    )
    assert done.exit_code == 0
    assert (tmp_path / "table.csv").read_text() == table_csv(results)
    assert not list(tmp_path.glob(".*.tmp"))
    for wrong in (["--format", "html"], ["--out", str(tmp_path)], ["--out", str(tmp_path / "no" / "x")]):
        done = run(app, ["table", str(tmp_path / "runs"), *wrong])
        assert done.exit_code == 2 and "error: --" in done.stderr
    done = run(app, ["table", str(tmp_path)])
    assert done.exit_code == 2 and "no finished run" in done.stderr
