"""The sweep over families: a sound network works, and what is wrong, refused or endless is told apart."""

from __future__ import annotations

import os
import re
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import families, family_checks
from benchmarks.family_models import Family
from dynaprune.nn import BlockSparseLinear


class Network(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layers = [nn.Linear(32, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def family(build: Any = Network) -> Family:
    return Family("network", "torch", build, lambda n: {"x": torch.randn(n, 32)})


def test_a_sound_network_works() -> None:
    found = family_checks.quietly(family())
    assert (found.verdict, found.reason) == ("works", "")
    assert found.sparsity >= family_checks.TARGET and found.neurons > 0 and 0.9 < found.swapped < 1
    assert found.cut == f"layers.* {found.neurons} of 132"


def test_outputs_cut_count_by_kind_of_layer() -> None:
    before = {"0.fc1": (64, 32), "1.fc1": (64, 32), "1.fc2": (32, 64), "1.norm": (32, 0), "2": (4, 64)}
    after = {"0.fc1": (48, 32), "1.fc1": (56, 32), "1.fc2": (32, 56), "1.norm": (24, 0), "2": (4, 48)}
    assert family_checks.outputs_cut(before, after) == "*.fc1 24 of 128"


def test_a_sparsity_that_is_not_reached_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynaprune.pruning.pruner.prune", lambda *_: None)
    found = family_checks.quietly(family())
    assert found.verdict == "wrong" and "sparsity after training: 0.0000" in found.reason


def test_rows_of_families_named_replace_those_of_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    known = [Family(name, "torch", Network, lambda n: {}) for name in ("a", "b")]
    monkeypatch.setattr(families, "families", lambda: known)
    out = tmp_path / "families.csv"

    def sweep(verdict: str, *names: str) -> int:
        row = {"verdict": verdict, "reason": "so, and so", "seconds": 1.0}
        monkeypatch.setattr(families, "examined", lambda *_: row)
        monkeypatch.setattr(sys, "argv", ["families", *names, "--out", str(out)])
        return families.main()

    assert sweep("refused") == 0
    assert sweep("wrong", "b") == 1
    rows = families.read(out)
    assert {name: row["verdict"] for name, row in rows.items()} == {"a": "refused", "b": "wrong"}
    assert all(row["torch"] == version("torch") and row["commit"] for row in rows.values())
    assert sweep("refused") == 0
    assert {row["verdict"] for row in families.read(out).values()} == {"refused"}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda y: y * 1.01, "outputs after attach"),
        (
            lambda y: y if torch.is_grad_enabled() is False else y + 0.1 * y.detach(),
            "masked twin|after a cut",
        ),
    ],
)
def test_a_wrong_function_is_noticed(wrong: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = BlockSparseLinear.forward
    monkeypatch.setattr(BlockSparseLinear, "forward", lambda self, x: wrong(right(self, x)))
    found = family_checks.quietly(family())
    assert found.verdict == "wrong" and re.search(said, found.reason)


def test_a_refusal_is_not_an_error() -> None:
    found = family_checks.quietly(family(lambda: Network(4)))
    assert found.verdict == "refused" and "would store" in found.reason


def test_an_error_in_training_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("dynaprune.pruning.pruner.prune", fail)
    found = family_checks.quietly(family())
    assert (found.verdict, found.reason) == ("error", "ZeroDivisionError: by zero")


def never() -> nn.Module:
    time.sleep(600)
    return Network()


def dies() -> nn.Module:
    os._exit(3)


@pytest.mark.parametrize(
    ("build", "limit", "verdict", "reason"),
    [
        (never, 1.0, "hangs", "still running after 1 s"),
        (dies, 60.0, "died", "exit status 3"),
        (lambda: Network(4), 60.0, "refused", "would store"),
    ],
)
def test_a_process_that_hangs_or_dies_is_told_apart(
    build: Any, limit: float, verdict: str, reason: str
) -> None:
    row = families.examined(family(build), limit)
    assert row["verdict"] == verdict and reason in str(row["reason"])
