"""``--units neurons``: an arm whose layers stay plain, from the setting to its files and pictures."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import nn

from dynaprune import load
from dynaprune.experiment.pictures import draw_all
from dynaprune.experiment.report import build_report
from dynaprune.experiment.run_config import RunConfig, resolve, settings
from dynaprune.experiment.saved_results import read_arm
from dynaprune.experiment.tasks import get_task
from dynaprune.experiment.train import run_arm
from dynaprune.nn import BlockSparseLayer


def test_the_setting_reaches_the_pruner() -> None:
    assert "units" in [setting.name for setting in settings()]
    assert RunConfig(task="digits").units == "blocks"
    for units in ("blocks", "neurons", "both"):
        config = resolve("digits", units=units)
        assert config.pruning_config(total_steps=100).units == units
        assert RunConfig(**config.to_json()) == config
    with pytest.raises(ValueError, match="units to be one of blocks, neurons, both, got 'heads'"):
        resolve("digits", units="heads")


def test_an_arm_of_whole_neurons_leaves_plain_layers(tmp_path: Path) -> None:
    config = resolve("digits", units="neurons", epochs=1, target_sparsity=0.8, calibration_samples=64)
    result = run_arm(config, "pruned", tmp_path / "pruned", quiet=True)
    found = read_arm(tmp_path / "pruned", "pruned", "digits")
    assert found is not None and result["target_reached"] and result["blocks_removed"] == 0
    assert result["neurons_removed"] == result["removed_passed"] + result["removed_forced"] > 1000
    assert result["flops_per_step_last"] < 0.25 * result["flops_per_step_first"]
    assert result["parameters_active"] < 0.22 * result["parameters_total"]
    data = get_task("digits").load(config.split(), {})
    model = load(lambda: get_task("digits").build_model(data, 0.0), tmp_path / "pruned" / "model.safetensors")
    assert not any(isinstance(module, BlockSparseLayer) for module in model.modules())
    assert sum(p.numel() for p in model.parameters()) == result["parameters_active"]
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    widths = result["pruner"]["widths"]
    assert [w["outputs"] for w in widths.values()] == [layer.out_features for layer in layers]
    assert torch.isfinite(model(torch.randn(3, 64))).all()
    with (tmp_path / "pruned" / "density.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "sparsity", "0", "2", "4", "6"] and float(rows[-1]["sparsity"]) >= 0.8
    (tmp_path / "pruned" / "history.csv").rename(tmp_path / "history.csv")
    report = build_report(config.to_json(), found["environment"], {"pruned": found["result"]})
    assert draw_all(tmp_path, report) == ["curves.png", "density.png"]
