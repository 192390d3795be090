"""An arm that begins sparse, from the command line's settings to what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dynaprune.cli import app
from dynaprune.experiment.report_text import table_rows
from dynaprune.experiment.run_config import RunConfig, resolve
from dynaprune.experiment.train import run_arm


@pytest.mark.filterwarnings("ignore:block-sparse ops:RuntimeWarning")
def test_an_arm_begins_sparse_and_says_what_was_never_there(tmp_path: Path) -> None:
    config = resolve("digits", epochs=1, initial_sparsity=0.8, target_sparsity=0.8, calibration_samples=64)
    result = run_arm(config, "pruned", tmp_path, quiet=True)
    products = [64 * 1024, 1024 * 1024, 1024 * 1024, 1024 * 10]
    dense = 2 * 32 * (3 * sum(products) - products[0])
    assert 0.8 <= result["sparsity"] < 0.801 and result["target_reached"]
    assert 0.2 * dense < result["flops_per_step_first"] == result["flops_per_step_last"] < 0.22 * dense
    assert result["flops_trials"] == result["blocks_removed"] == result["neurons_removed"] == 0
    assert result["blocks_never_present"] == 1690
    live = result["parameters_active"]
    assert live < 0.21 * result["parameters_total"]
    assert result["training_state"]["weights"] == result["training_state"]["gradients"] == 4 * live
    frames = json.loads((tmp_path / "masks.json").read_text())["frames"]
    assert [frame["step"] for frame in frames] == [0, result["steps"]]
    assert RunConfig.read(_written(tmp_path, config)) == config
    rows = table_rows({"baseline": None, "pruned": result, "ratios": {}})
    assert ("blocks that training began without", "", "1,690", "") in rows


def _written(folder: Path, config: RunConfig) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config.to_json()))
    return path


def test_settings_that_do_not_fit_are_told_by_the_command_line(tmp_path: Path) -> None:
    told = CliRunner().invoke(
        app, ["compare", "digits", "--initial-sparsity", "0.95", "--out", str(tmp_path / "run")]
    )
    assert told.exit_code == 2
    assert "at least the initial_sparsity (0.95), got 0.9" in told.output


@pytest.mark.filterwarnings("ignore:block-sparse ops:RuntimeWarning")
def test_an_arm_audits_its_swaps_and_counts_that_with_the_trials(tmp_path: Path) -> None:
    given: dict[str, Any] = {"initial_sparsity": 0.8, "target_sparsity": 0.8, "pruning": {"neurons": False}}
    given |= {"epochs": 1, "calibration_samples": 64, "rewire": 0.3, "rewire_growth": "random"}
    config = resolve("digits", **given, rewire_audit=2)
    result = run_arm(config, "pruned", tmp_path, quiet=True)
    audit = result["pruner"]["rewire_audit"]
    assert audit["count"] == 2 and audit["blocks_tested"] == result["swaps_tested"] > 0
    assert 0 <= result["swaps_failed"] <= result["swaps_tested"] < result["blocks_swapped"]
    evaluations = sum(1 + len(event["p_values"]) for event in audit["events"])
    assert result["trial_calls"] == evaluations >= 4
    # A forward pass is at least a third of a step, but for the blocks that are suspended.
    of_steps = result["data"]["sizes"][0] * result["flops_per_step_last"] / 32
    assert result["flops_total"] == of_steps + result["flops_probes"] + result["flops_trials"]
    assert 0.7 * 64 * evaluations * result["flops_per_step_last"] / 32 / 3 < result["flops_trials"]
    rows = {row[0]: row[2] for row in table_rows({"baseline": None, "pruned": result, "ratios": {}})}
    assert rows["of these tested as they went"] == f"{result['swaps_tested']:,}"
    assert RunConfig.read(_written(tmp_path, config)) == config


@pytest.mark.filterwarnings("ignore:block-sparse ops:RuntimeWarning")
def test_an_arm_rewires_and_counts_what_measuring_gradients_took(tmp_path: Path) -> None:
    given: dict[str, Any] = {"initial_sparsity": 0.8, "target_sparsity": 0.8, "pruning": {"neurons": False}}
    given |= {"epochs": 1, "calibration_samples": 64, "rewire": 0.3, "rewire_until": 0.5}
    config = resolve("digits", **given)
    result = run_arm(config, "pruned", tmp_path, quiet=True)
    until, samples = result["steps"] // 2, 32
    assert until // 20 == 1, "an event after every step"
    of_a_block, dead = 2 * samples * 32 * 32, result["blocks_never_present"]
    assert result["flops_probes"] == (until - 1) * of_a_block * dead
    assert result["flops_per_step_first"] == result["flops_per_step_last"]
    of_steps = result["data"]["sizes"][0] * result["flops_per_step_last"] / samples
    assert result["flops_total"] == of_steps + result["flops_probes"]
    assert result["blocks_swapped"] > 0 and 0.2 < result["blocks_ever_lived"] < 1
    assert result["flops_trials"] == result["removed_untested"] == result["blocks_removed"] == 0
    rows = {row[0]: row[2] for row in table_rows({"baseline": None, "pruned": result, "ratios": {}})}
    assert rows["blocks that changed places"] == f"{result['blocks_swapped']:,}"
    assert "blocks that live or have lived" in rows and "of these tested as they went" not in rows
    assert RunConfig.read(_written(tmp_path, config)) == config
