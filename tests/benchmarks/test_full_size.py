"""The benchmark of full-size training steps: the networks it builds, and the figures of a small one."""

from __future__ import annotations

import csv
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import full_size


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("resnet18", 11_173_962), ("bert-base", 109_483_778), ("wav2vec2-base", 94_396_320)],
)
def test_the_networks_have_their_published_numbers_of_parameters(name: str, parameters: int) -> None:
    if name != "resnet18":
        pytest.importorskip("transformers")
    with torch.device("meta"):
        model = full_size.PROBLEMS[name].build()
    assert sum(p.numel() for p in model.parameters()) == parameters


def small_loss(model: nn.Module, generator: torch.Generator) -> Tensor:
    x = torch.randn(20, 64, generator=generator)
    return F.cross_entropy(model(x), torch.randint(10, (20,), generator=generator))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """64-128-128-10 in place of the networks."""

    def build() -> nn.Module:
        layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)]
        return nn.Sequential(*layers)

    monkeypatch.setattr(full_size, "PROBLEMS", {"small": full_size.Problem(build, small_loss, "20 rows")})
    return build()


def test_figures_follow_from_the_share_of_live_blocks(
    small: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "full_size.csv"
    options = ["--models", "small", "--sparsities", "0,0.75", "--block", "16", "--out", str(out)]
    flushed = torch.tensor(1e-40).mul(1.0).item() == 0
    try:
        assert full_size.main(options) == 0
    finally:
        torch.set_flush_denormal(flushed)
    with out.open() as file:
        dense, full, sparse = csv.DictReader(file)
    prunable, all_of_them = 64 * 128 + 128 * 128, sum(p.numel() for p in small.parameters())
    assert (dense["arm"], full["arm"], sparse["arm"]) == ("dense", "block-sparse", "block-sparse")
    assert (dense["steps"], full["steps"], sparse["steps"]) == ("10", "5", "5")
    assert int(dense["parameters"]) == int(full["parameters"]) == all_of_them
    assert float(sparse["sparsity"]) == 0.75 and sparse["swapped_layers"] == "2"
    assert int(sparse["parameters"]) == all_of_them - prunable * 3 // 4
    # forward and dW of every layer, dX of all but the first, two operations per weight and row
    assert int(dense["flops"]) == 2 * 20 * (3 * (prunable + 1280) - 64 * 128)
    assert int(sparse["flops"]) == 2 * 20 * (3 * (prunable // 4 + 1280) - 64 * 128 // 4)
    # weight, gradient and two moments of four bytes each, and Adam's count of steps for six tensors
    assert int(dense["state_bytes"]) == 16 * all_of_them + 6 * 4 == int(full["state_bytes"])
    assert int(sparse["state_bytes"]) == 16 * int(sparse["parameters"]) + 6 * 4
    assert float(sparse["swapped_state_ratio"]) == 0.25
    for row in (full, sparse):
        assert 0 < float(row["step_ms_least"]) <= float(row["step_ms"]) <= float(row["step_ms_most"])
        ratio = float(row["step_ms"]) / float(row["dense_ms_in_turn"])
        assert float(row["step_ratio"]) == pytest.approx(ratio, rel=0.2)
        assert row["torch"] == version("torch") and row["threads"] == str(torch.get_num_threads())
    assert not list(out.parent.glob(".*"))
    assert "| small | 0.75 |" in capsys.readouterr().out


def test_a_pruned_step_trains_the_live_blocks_only(small: nn.Module) -> None:
    training = full_size.Training(full_size.PROBLEMS["small"], 0.75, 16)
    layer = training.sparse[1]
    dead = layer.weight == 0
    before = layer.weight.detach().clone()
    training.step()
    assert int(dead.sum()) == 128 * 128 * 3 // 4
    assert torch.equal(layer.weight == 0, dead)
    assert not torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--sparsities=1", "fractions of at least 0 and below 1, got 1"),
        ("--sparsities=0.5,-0.1", "fractions of at least 0 and below 1"),
        ("--models=bert", "expected resnet18, bert-base, wav2vec2-base, got bert"),
        ("--steps=4", "--steps must be at least 5, got 4"),
    ],
)
def test_wrong_options_are_refused(option: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        full_size.main([option])
    assert said in capsys.readouterr().err
