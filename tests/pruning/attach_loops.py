"""The plainest training loop, what it ends with, and checks against it."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

import dynaprune
from tests.pruning.attached import (
    BLOCKS,
    STEPS,
    adam,
    assert_equal,
    dense_weights,
    loss_of,
    mlp,
    settings,
    sparse_layers,
)


@functools.cache
def plain(accumulate: int = 1, fused: bool = False, clip: float | None = None) -> tuple[list[Tensor], str]:
    """Weights and score after the plainest loop."""
    model = mlp()
    optimizer = adam(model, fused=fused)
    pruner = dynaprune.attach(model, optimizer, settings())
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(accumulate):
            (loss_of(model, accumulate * step + part) / accumulate).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return dense_weights(model), str(pruner.state_dict()["score"])


def assert_like_plain(model: nn.Module, pruner: dynaprune.Pruner, **options: Any) -> None:
    assert_pruned(model, pruner)
    weights, score = plain(**options)
    assert_equal(dense_weights(model), weights)
    assert str(pruner.state_dict()["score"]) == score


def assert_pruned(model: nn.Module, pruner: dynaprune.Pruner) -> None:
    report = pruner.report()
    assert pruner.steps == report["steps"] == STEPS
    assert pruner.target_reached and report["sparsity"] == 0.75
    assert report["blocks_removed"] == report["removed_untested"] == BLOCKS * 3 // 4
    assert sum(layer.layout.capacity for layer in sparse_layers(model)) == BLOCKS // 4
    assert pruner.structure_final and pruner.structure_version == len(report["history"]) - 1
