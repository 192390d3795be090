"""The grid of rates: which arms it runs, what it reads of them, and that it goes on where it stopped."""

from __future__ import annotations

import csv
import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command

from benchmarks import rate_grid
from dynaprune import PruningConfig, attach
from dynaprune.cli import app
from dynaprune.experiment.tasks.llama import build, llama_config, size_of
from dynaprune.experiment.write import write_csv


def _finish(folder: Path, losses: list[float]) -> None:
    folder.mkdir(parents=True)
    environment = {"commit": "abc", "cpu": "one", "cpu_kernels": "avx2", "threads": 1}
    result = {"flops_total": 7, "train_seconds": 1.25, "steps": 3}
    arm = {"arm": "pruned", "environment": environment, "result": result}
    (folder / "arm.json").write_text(json.dumps(arm), encoding="utf-8")
    with (folder / "history.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["epoch", "validation_loss"], *enumerate(losses, 1)])


def test_a_grid_is_the_dense_network_and_every_density_with_every_multiplier() -> None:
    cells = list(rate_grid.cells("transformer"))
    assert cells.count(rate_grid.Cell("transformer", 1, 1)) == 1
    assert {(cell.density, cell.multiplier) for cell in cells if cell.density < 1} == {
        (density, multiplier) for density in (0.5, 0.25, 0.1) for multiplier in (1, 2, 4, 8)
    }
    assert len({cell.folder for cell in cells}) == len(cells) == 13


def test_what_the_rules_compare_comes_first() -> None:
    rules: list[Callable[[float], float]] = [
        lambda density: 1,
        lambda density: 1 / density,
        lambda density: min(1 / density, 4),
        lambda density: math.exp(1.969 * (1 - density) ** 2 + 0.29 * (1 - density)),
    ]
    wanted = {
        (density, min(rate_grid.MULTIPLIERS, key=lambda each: abs(math.log(each / rule(density)))))
        for density in rate_grid.DENSITIES
        for rule in rules
    }
    first = list(rate_grid.cells("batchnorm"))[: len(wanted)]
    assert {(cell.density, cell.multiplier) for cell in first} == wanted


@pytest.mark.parametrize("density", rate_grid.DENSITIES)
def test_blocks_are_small_enough_for_the_language_model_to_begin_that_sparse(density: float) -> None:
    model = build(llama_config(size_of("small"), entries=64, context=16, dropout=0.0))
    sparsity = 1 - density
    config = PruningConfig(
        block_size=rate_grid.BLOCK_SIZES[density],
        initial_sparsity=sparsity,
        target_sparsity=sparsity,
        total_steps=4,
    )
    pruner = attach(model, torch.optim.AdamW(model.parameters()), config)
    assert pruner.sparsity >= sparsity - 1e-6


@pytest.mark.parametrize("network", rate_grid.NETWORKS)
def test_its_commands_are_what_the_command_line_takes(network: str, tmp_path: Path) -> None:
    train = get_command(app).commands["train"]  # type: ignore[attr-defined]
    for cell in rate_grid.cells(network):
        command = cell.command("data", tmp_path, tmp_path)
        given = train.make_context("train", command[4:]).params
        assert given["arm"] == ("baseline" if cell.density == 1 else "pruned")
        assert given["seed"] == 100 and given["epochs"] in (None, 5)
        if cell.density < 1:
            assert given["initial_sparsity"] == given["target_sparsity"] == 1 - cell.density
            assert float(given["sparse_rate"]) == cell.multiplier


def test_finished_cells_stay_and_the_table_has_the_lowest_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells, table = list(rate_grid.cells("batchnorm")), tmp_path / "results" / "table.csv"
    other = rate_grid.Cell("transformer", 1, 1)
    for cell in (other, cells[0]):
        _finish(tmp_path / cell.folder, [2.0, 1.5, 1.75])
    done = [rate_grid.row_of(cell, tmp_path / cell.folder) for cell in (other, cells[0])]
    table.parent.mkdir()
    write_csv(table, done)
    ran = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        assert options["env"]["OMP_NUM_THREADS"] == "1"
        folder = Path(command[command.index("--out") + 1])
        ran.append(folder.name)
        if len(ran) == 3:
            return subprocess.CompletedProcess(command, 9)
        _finish(folder, [1.0])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    arguments = ["batchnorm", "--data", "data", "--out", str(tmp_path), "--table", str(table)]
    assert rate_grid.main(arguments) == 9
    assert ran == [cell.folder for cell in cells[1:4]]
    assert rate_grid.main(arguments) == 0
    assert ran[3:] == [cell.folder for cell in cells[3:]]
    rows = rate_grid.read_table(table)
    assert list(rows) == [other.key, *(cell.key for cell in cells)]
    assert rows[cells[0].key] == {
        "network": "batchnorm", "density": "0.5", "multiplier": "1", "validation_loss": "1.5000",
        "flops": "7", "seconds": "1", "steps": "3",
        "commit": "abc", "cpu": "one", "cpu_kernels": "avx2", "threads": "1",
    }  # fmt: skip
    assert rows[cells[5].key]["validation_loss"] == "1.0000"
