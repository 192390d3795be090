"""``--units neurons``: an arm whose layers stay plain, from the setting to its files and pictures."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from dynaprune import load
from dynaprune.experiment.pictures import draw_all
from dynaprune.experiment.report import build_report
from dynaprune.experiment.run_config import RunConfig, resolve, settings
from dynaprune.experiment.saved_results import read_arm
from dynaprune.experiment.tasks import get_task
from dynaprune.nn import BlockSparseLayer
from tests.experiment.killed import run, small_arms, small_digits
from tests.experiment.same_course import differences


def test_the_setting_reaches_the_pruner() -> None:
    assert "units" in [setting.name for setting in settings()]
    assert RunConfig(task="digits").units == "blocks"
    for units in ("blocks", "neurons", "both"):
        config = resolve("digits", units=units)
        assert config.pruning_config(total_steps=100).units == units
        assert RunConfig(**config.to_json()) == config
    with pytest.raises(ValueError, match="units to be one of blocks, neurons, both, got 'heads'"):
        resolve("digits", units="heads")


def small(units: str) -> RunConfig:
    config = small_digits(units=units, target_sparsity=0.7, trial_budget=1.0)
    return replace(config, pruning={"end": 0.5, "interval": 4})


@pytest.fixture(scope="module", autouse=True)
def small_network() -> Iterator[None]:
    with small_arms():
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("undisturbed") / "pruned"
    result = run(small("neurons"), "pruned", out)
    assert result is not None
    return out, result


def test_an_arm_of_whole_neurons_leaves_plain_layers(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    out, result = undisturbed
    assert result["target_reached"] and result["blocks_removed"] == 0
    assert result["neurons_removed"] == result["removed_passed"] + result["removed_forced"] > 50
    assert result["neurons_passed"] + result["neurons_forced"] == result["neurons_removed"]
    assert 0.6 < result["forward_flops_gone"] < 1
    assert result["flops_per_step_last"] < 0.35 * result["flops_per_step_first"]
    assert result["parameters_active"] < 0.32 * result["parameters_total"]
    task, config = get_task("digits"), small("neurons")
    data = task.load(config.split(), config.options)
    model = load(lambda: task.build_model(data, 0.0), out / "model.safetensors")
    assert not any(isinstance(module, BlockSparseLayer) for module in model.modules())
    assert sum(p.numel() for p in model.parameters()) == result["parameters_active"]
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    widths = result["pruner"]["widths"]
    assert [w["outputs"] for w in widths.values()] == [layer.out_features for layer in layers]


def test_its_pictures_show_densities_and_no_masks(
    undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = undisturbed[0]
    with (out / "density.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "sparsity", "0", "2", "4"] and float(rows[-1]["sparsity"]) >= 0.7
    found = read_arm(out, "pruned", "digits")
    assert found is not None
    shutil.copytree(out, tmp_path / "pruned")
    shutil.copy(out / "history.csv", tmp_path / "history.csv")
    report = build_report(small("neurons").to_json(), found["environment"], {"pruned": found["result"]})
    assert draw_all(tmp_path, report) == ["curves.png", "density.png"]


@pytest.mark.parametrize("units", ["neurons", "both"])
def test_a_killed_arm_ends_as_the_undisturbed_one(
    units: str, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = undisturbed[0]
    if units == "both":
        out = tmp_path / "whole"
        assert run(small(units), "pruned", out) is not None
    for number in (13, 14, 40):
        assert run(small(units), "pruned", tmp_path / "killed", kill=number, minutes=0) is None
    assert run(small(units), "pruned", tmp_path / "killed") is not None
    assert differences(out, tmp_path / "killed") == []
