"""The sweep over families: a sound network works, and what is wrong, refused or endless is told apart."""

from __future__ import annotations

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


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda y: y * 1.01, "outputs after attach"),
        (lambda y: y if torch.is_grad_enabled() is False else y + 0.1 * y.detach(), "masked twin"),
    ],
)
def test_a_wrong_function_is_noticed(wrong: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = BlockSparseLinear.forward
    monkeypatch.setattr(BlockSparseLinear, "forward", lambda self, x: wrong(right(self, x)))
    found = family_checks.quietly(family())
    assert found.verdict == "wrong" and said in found.reason


def test_a_refusal_is_not_an_error() -> None:
    found = family_checks.quietly(family(lambda: Network(4)))
    assert found.verdict == "refused" and "would store" in found.reason


def test_an_error_in_training_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("dynaprune.pruning.pruner.run_pruning_event", fail)
    found = family_checks.quietly(family())
    assert (found.verdict, found.reason) == ("error", "ZeroDivisionError: by zero")


def test_what_takes_too_long_hangs() -> None:
    pytest.importorskip("transformers")
    row = families.examined("BERT", limit=0.01)
    assert row["verdict"] == "hangs"
