"""One attach line in the training loops people write."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dynaprune
from dynaprune.nn import BlockSparseLinear

STEPS = 30


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
    ).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float32, rows: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(rows, 32, generator=generator, dtype=torch.float64).to(dtype)
    return x, (x[:, :4].sum(1, keepdim=True) * torch.tensor([1.0, -1.0, 0.5, 0.0]).to(dtype)).argmax(1)


def loss_of(model: nn.Module, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x, y = batch(step, dtype)
    return nn.functional.cross_entropy(model(x), y)


def config(**changes: object) -> dynaprune.PruningConfig:
    settings: dict[str, object] = {
        "target_sparsity": 0.75, "block_size": 8, "total_steps": STEPS, "interval": 3, "observe_every": 1,
    }
    return dynaprune.PruningConfig(**{**settings, **changes})  # type: ignore[arg-type]


def assert_pruned(model: nn.Module, pruner: dynaprune.Pruner, steps: int = STEPS) -> None:
    report = pruner.report()
    assert pruner.steps == report["steps"] == steps
    assert pruner.target_reached and 0.75 <= report["sparsity"] < 0.76
    assert report["blocks_removed"] == report["removed_untested"] == 72
    layers = [m for m in model.modules() if isinstance(m, BlockSparseLinear)]
    assert sum(layer.layout.capacity for layer in layers) == 24
    assert all(torch.isfinite(layer.weight).all() for layer in layers)


def test_plain_loop_that_holds_its_last_loss() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    identity = [id(p) for p in model.parameters()]
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    pruner = dynaprune.attach(model, optimizer, config())
    held: list[Tensor] = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        held.append(loss)
    assert_pruned(model, pruner)
    assert [id(p) for p in model.parameters()] == identity
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == groups
    assert float(held[-1]) < float(held[0])
    assert pruner.report()["trials"]["tested"] is False
