"""The benchmark of a model that does not fit dense: its steps and its figures, on a tiny network."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from benchmarks import large_from_meta
from dynaprune.experiment.tasks.llama import build, llama_config
from dynaprune.experiment.tasks.lm import VOCABULARY
from tests.experiment.tasks.test_lm import reviews, write


def test_the_loss_falls_and_the_dense_state_is_that_of_the_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write(tmp_path, reviews(60, 0), reviews(30, 1)), tmp_path / "results" / "large.csv"
    given = [
        "--size=tiny",
        "--density=0.5",
        "--block=16",
        "--steps=3",
        "--batch=2",
        "--context=16",
        "--lr=1e-3",
    ]
    assert large_from_meta.main([*given, "--data", str(data), "--out", str(out)]) == 0
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert float(rows[0]["held_out_loss_after"]) < float(rows[2]["held_out_loss_before"])
    assert len({row["loss"] for row in rows}) == 3
    size = large_from_meta.SIZES["tiny"]
    twin = build(llama_config(size, VOCABULARY, 16))
    whole = sum(parameter.numel() for parameter in twin.parameters())
    prunable = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 176)
    assert int(rows[0]["parameters_dense"]) == whole and int(rows[0]["parameters_prunable"]) == prunable
    assert int(rows[0]["dense_state_bytes"]) == 16 * whole
    kept = whole - 0.5 * prunable
    assert 16 * kept <= int(rows[2]["state_bytes"]) < 16 * kept * 1.01
    assert f"of {prunable:,} left out" in capsys.readouterr().out


def test_there_is_no_memory_before_prepare() -> None:
    model = large_from_meta.on_meta(large_from_meta.SIZES["3b"], 64)
    assert all(each.is_meta for group in (model.parameters(), model.buffers()) for each in group)
    state = large_from_meta.STATE * sum(parameter.numel() for parameter in model.parameters())
    assert state > 44 * 2**30


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--density=0", "--density must be above 0 and below 1, got 0"),
        ("--steps=0", "--steps must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_refused(option: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        large_from_meta.main([option])
    assert said in capsys.readouterr().err
