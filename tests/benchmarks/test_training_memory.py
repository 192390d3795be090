"""The benchmark of training memory: the figures of a small network, and the options that it refuses."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks import training_memory
from benchmarks.training_memory import Setting, trained

pytest.importorskip("transformers")


def test_the_training_state_falls_with_the_blocks_and_activations_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training_memory, "in_a_process", trained)
    out = tmp_path / "results" / "training_memory.csv"
    options = ["--networks=bert-tiny", "--tokens=8", "--block=16", "--sparsity=0.5", "--steps=1"]
    assert training_memory.main([*options, "--out", str(out)]) == 0
    with out.open() as file:
        found = {row["figure"]: row for row in csv.DictReader(file)}
    weights = int(found["weights at the peak"]["dense_bytes"])
    left = weights - int(found["weights at the peak"]["sparse_bytes"])
    # Half of two layers' weights and of the pooler's, of four bytes each.
    assert left == 4 * (2 * (4 * 64 * 64 + 2 * 64 * 128) + 64 * 64) / 2
    state = found["training state"]
    assert int(state["dense_bytes"]) >= 4 * weights
    assert float(state["ratio"]) == pytest.approx(1 - left / weights, abs=1e-3)
    assert float(found["activations at their most"]["ratio"]) == pytest.approx(1, abs=0.05)
    peak = found["peak of tensors"]
    parts = [row for name, row in found.items() if name.endswith("at the peak")]
    for arm in ("dense_bytes", "sparse_bytes"):
        assert sum(int(row[arm]) for row in parts) == int(peak[arm])
    assert found["index at the peak"]["dense_bytes"] == "0" and found["index at the peak"]["ratio"] == ""
    assert "network bert-tiny, batch 4, block 16, dropout 0.1" in (printed := capsys.readouterr().out)
    assert "| training state |" in printed


def test_a_network_replaces_its_own_rows_only(tmp_path: Path) -> None:
    def values() -> list[tuple[str, str]]:
        with out.open() as file:
            return [(row["network"], row["dense_bytes"]) for row in csv.DictReader(file)]

    out = tmp_path / "training_memory.csv"
    for network, size in (("resnet18", 1), ("bert-base", 2), ("resnet18", 3)):
        training_memory._write(out, network, [{"network": network, "dense_bytes": size + i} for i in (0, 1)])
    assert values() == [("bert-base", "2"), ("bert-base", "3"), ("resnet18", "3"), ("resnet18", "4")]


@pytest.mark.parametrize("network", ["bert-tiny", "resnet18-half"])
def test_steps_are_those_of_a_real_training(network: str) -> None:
    found = trained(Setting(network, 4, 8, 16, 0.0, 0.5), 2)
    assert len(found["losses"]) == 4 and len(set(found["losses"])) == 4


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--sparsity=1", "--sparsity must be above 0 and below 1, got 1"),
        ("--steps=0", "--steps must be at least 1, got 0"),
        ("--batch=0", "--batch must be at least 1, got 0"),
        ("--networks=bert", "invalid choice: 'bert'"),
    ],
)
def test_wrong_options_are_refused(option: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        training_memory.main([option])
    assert said in capsys.readouterr().err
