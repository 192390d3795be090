"""``dynaprune compare`` and ``train`` as a user starts them: whole processes, a few epochs."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from dynaprune.cli import app
from dynaprune.experiment.compare import _forget
from dynaprune.experiment.out_folder import check_empty
from dynaprune.experiment.report import PRUNED_METRICS, figures_of
from dynaprune.experiment.steps import evaluate
from dynaprune.experiment.tasks import Split, get_task
from dynaprune.nn import BlockSparseLayer
from dynaprune.saving.checkpoint import load

ROOT = Path(__file__).resolve().parents[2]
PNG = b"\x89PNG\r\n"
SHORT = (
    "--epochs",
    4,
    "--seed",
    1,
    "--target-sparsity",
    0.6,
    "--calibration-samples",
    128,
    "--trial-budget",
    1,
)


def _start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dynaprune", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _invoke(*arguments: object) -> Result:
    """The command line in this process; the arms of a comparison are processes all the same."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module", autouse=True)
def same_threads_everywhere() -> Iterator[None]:
    """The arms' processes find the packages and the number of threads of this one."""
    with pytest.MonkeyPatch.context() as patch:
        path = os.environ.get("PYTHONPATH", "")
        patch.setenv(
            "PYTHONPATH", os.pathsep.join([str(ROOT / "python"), str(ROOT), path]).rstrip(os.pathsep)
        )
        patch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
        yield


def _report(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "report.json").read_text()))


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A short comparison on digits: small blocks of work, all of the way through."""
    out = tmp_path_factory.mktemp("compare") / "run"
    process = _start("compare", "digits", "--out", out, *SHORT)
    said, complained = process.communicate(timeout=240)
    assert process.returncode == 0, complained
    return out, said + complained


def test_the_report_has_the_contract_keys_in_both_arms(compared: tuple[Path, str]) -> None:
    report = _report(compared[0])
    assert {"task", "seed", "config", "environment", "baseline", "pruned", "ratios"} <= set(report)
    assert (report["task"], report["seed"], report["interrupted"]) == ("digits", 1, False)
    for arm in ("baseline", "pruned"):
        for name in figures_of("digits"):
            assert isinstance(report[arm][name], (int, float)), (arm, name)
            assert report["ratios"][name] == pytest.approx(report["pruned"][name] / report["baseline"][name])
    for name in PRUNED_METRICS:
        assert isinstance(report["pruned"][name], (int, float, bool)), name
        assert name not in report["baseline"]
    assert isinstance(report["pruned"]["target_reached"], bool)
    assert report["config"]["epochs"] == 4 and report["config"]["target_sparsity"] == 0.6
    assert {"versions", "cpu", "threads", "commit"} <= set(report["environment"])


def test_the_measured_figures_belong_together(compared: tuple[Path, str]) -> None:
    report = _report(compared[0])
    baseline, pruned = report["baseline"], report["pruned"]
    parameters = 64 * 1024 + 2 * 1024 * 1024 + 1024 * 10 + 3 * 1024 + 10
    assert (
        baseline["parameters_total"]
        == baseline["parameters_active"]
        == parameters
        == pruned["parameters_total"]
    )
    assert baseline["training_state_bytes"] == 16 * parameters + 8 * 4
    products = [64 * 1024, 1024 * 1024, 1024 * 1024, 1024 * 10]
    dense = 2 * 32 * (3 * sum(products) - products[0])
    assert baseline["flops_per_step_first"] == baseline["flops_per_step_last"] == dense
    assert baseline["flops_total"] == pytest.approx(dense * 1257 / 32 * baseline["epochs"], rel=1e-6)
    assert pruned["flops_per_step_first"] == dense
    assert pruned["target_reached"] and pruned["sparsity"] >= 0.6
    gone = pruned["sparsity"] * sum(products[:3])
    assert parameters - pruned["parameters_active"] == pytest.approx(gone, abs=1024 + 2)
    assert pruned["flops_per_step_last"] < 0.6 * dense
    assert pruned["sparsity_of_model"] == pytest.approx(1 - pruned["parameters_active"] / parameters)
    said = pruned["pruner"]["parameters"]
    assert (said["total"], said["prunable"], said["other"]) == (parameters, sum(products[:3]), 3 * 1024 + 10)
    markdown = (compared[0] / "report.md").read_text()
    assert f"| sparsity of all parameters |  | {100 * pruned['sparsity_of_model']:.2f} % |" in markdown
    classifier = "the classifier (the last Linear) stays dense unless named"
    assert f"| {classifier} | 1 | 10,240 | {100 * 10240 / parameters:.2f} % |" in markdown
    assert "| biases, parameters of norms, and other vectors |  | 3,082 |" in markdown
    assert "of all parameters)" in compared[1]
    assert pruned["training_state_bytes"] < 0.7 * baseline["training_state_bytes"]
    assert pruned["blocks_removed"] >= pruned["removed_passed"] + pruned["removed_forced"] > 1000
    assert pruned["removed_untested"] == 0
    assert pruned["flops_total"] > pruned["flops_trials"] > 0
    for arm in (baseline, pruned):
        assert arm["test_accuracy"] > 0.8
        assert arm["memory_bytes_last"] <= arm["peak_memory_bytes"]


def test_histories_pictures_and_the_table_are_there(compared: tuple[Path, str]) -> None:
    out, said = compared
    with (out / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    report = _report(out)
    for arm in ("baseline", "pruned"):
        mine = [row for row in rows if row["arm"] == arm]
        assert [int(row["epoch"]) for row in mine] == list(range(1, report[arm]["epochs"] + 1))
        best = [int(row["epoch"]) for row in mine if row["best"] == "True"]
        assert best[-1] == report[arm]["best_epoch"]
    eligible = [row for row in rows if row["arm"] == "pruned" and row["best"] == "True"]
    assert all(row["target_reached"] == "True" for row in eligible)
    for name in ("curves.png", "density.png", "masks.png"):
        assert (out / name).read_bytes().startswith(PNG) and name in (out / "report.md").read_text()
        assert str(out / name) in said
    assert "baseline" in said and "ratio" in said and "test accuracy" in said
    assert not list(out.rglob("*.tmp*"))


def test_the_masks_on_disk_are_those_of_the_report(compared: tuple[Path, str]) -> None:
    out, _ = compared
    described = json.loads((out / "pruned" / "masks.json").read_text())
    first, last = described["frames"][0], described["frames"][-1]
    assert first["sparsity"] == 0 and last["sparsity"] == pytest.approx(_report(out)["pruned"]["sparsity"])
    with np.load(out / "pruned" / "masks.npz", allow_pickle=False) as arrays:
        for frame in (first, last):
            live = sum(int((arrays[layer["key"]] > 0).sum()) for layer in frame["layers"].values())
            assert live * 1024 == pytest.approx((1 - frame["sparsity"]) * (64 + 2048) * 1024, rel=1e-6)


def test_the_saved_model_is_the_one_that_was_tested(compared: tuple[Path, str]) -> None:
    """Loaded into a fresh network it takes the pruned structure, and has the reported loss, accuracy and
    size."""
    out, _ = compared
    pruned = _report(out)["pruned"]
    task = get_task("digits")
    data = task.load(Split(seed=1), {})
    model = load(lambda: task.build_model(data, 0.0), out / "pruned" / "model.safetensors")
    loss, scores = evaluate(task, model, data.test, torch.device("cpu"))
    assert loss == pytest.approx(pruned["test_loss"], rel=1e-6)
    assert scores["accuracy"] == pruned["test_accuracy"] and scores["f1"] == pruned["test_f1"]
    live = sum(m.live_values() - m.values.numel() for m in model.modules() if isinstance(m, BlockSparseLayer))
    assert sum(p.numel() for p in model.parameters()) + live == pruned["parameters_active"]


REPEATED = ("test_accuracy", "test_loss", "parameters_active", "flops_total", "best_epoch")


def test_the_same_seed_gives_the_same_run(compared: tuple[Path, str], tmp_path: Path) -> None:
    """The baseline; the pruned arm is repeated where a comparison goes on."""
    done = _invoke("train", "digits", "--arm", "baseline", "--out", tmp_path / "arm", "--quiet", *SHORT)
    assert done.exit_code == 0, done.output
    again = json.loads((tmp_path / "arm" / "arm.json").read_text())["result"]
    before = _report(compared[0])["baseline"]
    assert {name: again[name] for name in REPEATED} == {name: before[name] for name in REPEATED}


def test_an_interrupt_leaves_a_usable_report(tmp_path: Path) -> None:
    """One SIGINT to the parent alone, while the first arm trains: that arm is tested and reported, the other
    is null."""
    out = tmp_path / "run"
    process = _start("compare", "digits", "--out", out, "--epochs", 500, "--patience", 500)
    try:
        _wait_for(out / "baseline" / "history.csv", process)
        process.send_signal(signal.SIGINT)
        said, complained = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, complained
    report = _report(out)
    assert report["interrupted"] and report["baseline"]["interrupted"] and report["pruned"] is None
    assert 1 <= report["baseline"]["epochs"] < 500 and report["baseline"]["test_accuracy"] > 0.5
    assert report["baseline"]["state"] == "interrupted"
    assert "interrupted" in (out / "report.md").read_text()
    assert (out / "curves.png").read_bytes().startswith(PNG)
    assert "baseline" in said


def test_an_interrupt_of_the_pruned_arm_says_that_the_target_was_not_reached(tmp_path: Path) -> None:
    out = tmp_path / "arm"
    process = _start("train", "digits", "--arm", "pruned", "--out", out, "--epochs", 200)
    try:
        _wait_for(out / "history.csv", process)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    result = json.loads((out / "arm.json").read_text())["result"]
    assert result["interrupted"] and not result["target_reached"] and result["best_epoch"] is None
    for name in {*figures_of("digits")} - {"memory_bytes_last"}:
        assert isinstance(result[name], (int, float)), name


def _wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.is_file():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)


def test_a_comparison_that_was_cut_short_goes_on_with_the_arm_that_is_missing(
    compared: tuple[Path, str], tmp_path: Path
) -> None:
    out = shutil.copytree(compared[0], tmp_path / "run")
    complete = _report(out)
    (out / "report.json").write_text(json.dumps(complete | {"interrupted": True, "pruned": None}))
    cut = json.loads((out / "pruned" / "arm.json").read_text())
    cut["result"]["interrupted"] = True
    (out / "pruned" / "arm.json").write_text(json.dumps(cut))
    (out / "pruned" / "left.txt").touch()
    baseline = json.loads((out / "baseline" / "arm.json").read_text())
    elsewhere = baseline | {"environment": baseline["environment"] | {"threads": 64}}
    (out / "baseline" / "arm.json").write_text(json.dumps(elsewhere))
    refused = _invoke("compare", "digits", "--out", out, *SHORT)
    assert refused.exit_code == 2 and "threads 64, now" in " ".join(refused.stderr.split())
    (out / "baseline" / "arm.json").write_text(json.dumps(baseline))
    kept = (out / "baseline" / "arm.json").stat().st_mtime_ns
    other = _invoke("compare", "digits", "--out", out, *SHORT, "--lr", 0.01)
    assert other.exit_code == 2 and "other settings (lr)" in other.stderr
    process = _start("compare", "digits", "--out", out, *SHORT)
    _, complained = process.communicate(timeout=240)
    assert process.returncode == 0, complained
    assert (out / "baseline" / "arm.json").stat().st_mtime_ns == kept
    assert not (out / "pruned" / "left.txt").exists()
    report = _report(out)
    assert report["baseline"] == complete["baseline"] and not report["interrupted"]
    for name in REPEATED:  # the same seed gives the same run
        assert report["pruned"][name] == complete["pruned"][name], name
    again = _invoke("compare", "digits", "--out", out, *SHORT)
    assert again.exit_code == 2 and "holds files" in again.stderr


def test_repeating_resumes_and_summarises(tmp_path: Path, data_dir: Path) -> None:
    """Two runs on titanic; the second start finds both, makes none, and other settings are refused."""
    out = tmp_path / "runs"
    given = ("compare", "titanic", "--out", out, "--epochs", 1, "--seeds", "0,1", "--data", data_dir)
    done = _invoke(*given)
    assert done.exit_code == 0, done.output
    summary = json.loads((out / "summary.json").read_text())
    assert summary["complete"] and summary["runs"] == 2 and set(summary["each"]) == {"seed-0", "seed-1"}
    low, high = (summary["differences"]["test_accuracy"][k] for k in ("low", "high"))
    assert low <= summary["differences"]["test_accuracy"]["mean"] <= high
    stamps = [(out / f"seed-{s}" / "report.json").stat().st_mtime_ns for s in (0, 1)]
    again = _invoke(*given)
    assert again.exit_code == 0 and "2 of 2 runs are there already" in again.stderr
    assert stamps == [(out / f"seed-{s}" / "report.json").stat().st_mtime_ns for s in (0, 1)]
    other = _invoke(*given, "--lr", 0.01)
    assert other.exit_code == 2 and "other settings (lr)" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("compare", "mnist"), "unknown task 'mnist': expected one of digits, titanic"),
        (("compare", "digits", "--lr", "-1"), "lr must be above 0, got -1.0"),
        (("compare", "digits", "--epochs", "ten"), "--epochs"),
        (
            ("compare", "digits", "--target-sparsity", "1.2"),
            "target sparsity is a fraction above 0 and below 1",
        ),
        (("compare", "digits", "--seeds", "0,x"), "--seeds takes whole numbers"),
        (("compare", "digits", "--seeds", "0", "--seed", "1"), "--seed or --seeds, not both"),
        (("compare", "digits", "--block-size", "5"), "block size"),
        (("compare", "digits", "--folds", "1"), "folds must be at least 2, got 1"),
        (("compare", "titanic", "--data", "/no/such/folder"), "/no/such/folder is not a folder"),
        (("train", "digits", "--arm", "sparse"), "--arm must be one of baseline, pruned, small, "),
    ],
)
def test_wrong_input_is_said_and_ends_with_2(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = _invoke(*arguments, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    done = _invoke("compare", "digits", "--out", tmp_path)
    assert done.exit_code == 2 and "holds files" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_an_arm_that_cannot_start_says_why_and_leaves_nothing(tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "data").mkdir()
    done = _invoke("compare", "titanic", "--out", tmp_path / "out", "--data", tmp_path / "data")
    said = capfd.readouterr().err
    assert done.exit_code == 2 and "Traceback" not in said
    assert "expected the table titanic/train.parquet in the data folder" in said
    assert not list((tmp_path / "out").iterdir())


def test_info_tells_which_backends_run(capfd: Any) -> None:
    done = _invoke("info")
    assert done.exit_code == 0 and "reference" in done.output + capfd.readouterr().out


def test_an_arm_that_could_not_start_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "baseline").mkdir()
    for name in ("config.json", "pretrained.safetensors", "pretrained.json"):
        (tmp_path / name).touch()
    _forget(tmp_path, tmp_path / "config.json", "baseline", tmp_path / "baseline" / "checkpoint")
    check_empty(tmp_path)
