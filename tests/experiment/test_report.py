"""The report's keys, ratios and files."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from dynaprune.experiment.figure_text import shown
from dynaprune.experiment.report import build_report, figures_of, ratios
from dynaprune.experiment.report_text import write_markdown
from dynaprune.experiment.run_config import RunConfig, resolve
from dynaprune.experiment.write import write_csv, write_json
from dynaprune.saving import durable


def test_ratios_are_pruned_over_baseline_where_both_have_a_number() -> None:
    baseline = {
        "test_accuracy": 0.8,
        "flops_total": 100,
        "epochs": 4,
        "memory_bytes_last": None,
        "train_seconds": 0,
    }
    pruned = {
        "test_accuracy": 0.6,
        "flops_total": 25,
        "epochs": 6,
        "memory_bytes_last": 5,
        "train_seconds": 2,
    }
    pruned |= {"step_seconds_last": 0.3, "step_seconds_dense": 0.6}
    assert ratios(baseline, pruned, figures_of("digits")) == pytest.approx(
        {"test_accuracy": 0.75, "flops_total": 0.25, "epochs": 1.5, "step_seconds_last_to_dense": 0.5}
    )
    assert ratios(baseline, None) == {}


def test_an_arm_that_never_ran_is_null_and_the_report_says_interrupted(tmp_path: Path) -> None:
    config = RunConfig(task="digits").to_json()
    arm = {"interrupted": False, "state": "stopped early", "epochs": 3, "best_epoch": 1, "test_accuracy": 0.5}
    report = build_report(config, {}, {"baseline": arm, "pruned": None})
    assert report["pruned"] is None and report["ratios"] == {} and report["interrupted"]
    write_markdown(tmp_path / "report.md", report, [])
    text = (tmp_path / "report.md").read_text()
    assert "interrupted" in text and "weights of epoch 1" in text


def test_files_appear_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"a": math.nan, "b": [1, math.inf]})
    assert json.loads(path.read_text()) == {"a": None, "b": [1, None]}

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(durable.os, "replace", cut)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": None, "b": [1, None]}


def test_csv_rows_come_back(tmp_path: Path) -> None:
    write_csv(tmp_path / "h.csv", [{"epoch": 1, "note": 'a, "b"'}, {"epoch": 2, "note": ""}])
    with (tmp_path / "h.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [{"epoch": "1", "note": 'a, "b"'}, {"epoch": "2", "note": ""}]


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (0.9634, "share", "96.34 %"),
        (0.00519, "time", "5.19 ms"),
        (34816192, "bytes", "33.2 MiB"),
        (413007872, "flops", "413 MFLOP"),
        (2176010, "count", "2,176,010"),
        (False, "truth", "no"),
        (None, "bytes", "-"),
        (1000 * 2**20, "bytes", "1000 MiB"),
        (1.2, "time", "1200 ms"),
    ],
)
def test_numbers_for_people(value: object, kind: str, text: str) -> None:
    assert shown(value, kind) == text


def test_settings_resolve_task_defaults_then_what_was_given() -> None:
    config = resolve("titanic", epochs=3, block_size=None, device="cpu")
    assert (config.epochs, config.block_size, config.lr, config.batch_size) == (3, 16, 1e-3, 32)
    assert (config.patience, config.weight_decay, config.dropout, config.threshold) == (5, 1e-4, 0.5, 0.01)
    free = resolve("digits", self_paced=True)
    assert free.target_sparsity is None and free.pruning["interval"] * 10 < free.epochs * 40
    assert RunConfig(**json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"epochs": 0}, "epochs must be a whole number of at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be"),
        ({"lr": math.nan}, "lr must be above 0, got nan"),
        ({"threshold": 1.0}, "probability above 0 and below 1, got 1.0"),
        ({"target_sparsity": 1.5}, "target sparsity is a fraction .* got 1.5"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"device": "tpu"}, "auto, cpu or cuda, got 'tpu'"),
        ({"data": "/nowhere/at/all"}, "not a folder"),
        ({"self_paced": True, "target_sparsity": 0.5}, "leave --target-sparsity out"),
        ({"schedule": "step"}, "schedule must be one of constant, linear, cosine, got 'step'"),
        ({"optimizer": "lion"}, "optimizer must be one of adam, adamw, got 'lion'"),
        ({"preset": "huge"}, "digits has the presets paper, got 'huge'"),
        ({"options": {"width": 0.5}}, "digits has no setting 'width'; its own settings: none"),
    ],
)
def test_bad_settings_are_refused_by_name(given: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        resolve("digits", **given)  # type: ignore[arg-type]
