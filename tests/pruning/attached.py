"""A small classifier, its batches and a pruner's settings, shared by the tests of ``attach``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dynaprune import PruningConfig
from dynaprune.nn import BlockSparseLayer

STEPS = 24
BLOCKS = 96


def mlp(dtype: torch.dtype = torch.float32, *, bias: bool = True) -> nn.Sequential:
    """32-64-64-4: the two hidden layers hold 32 and 64 blocks of 8x8."""
    torch.manual_seed(1)
    layers = [nn.Linear(32, 64, bias=bias), nn.ReLU(), nn.Linear(64, 64, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 4, bias=bias)).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float32, rows: int = 16) -> tuple[Tensor, Tensor]:
    """Inputs ``[rows, 32]`` and classes ``[rows]`` of one step."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(rows, 32, generator=generator, dtype=torch.float64).to(dtype)
    return x, x[:, :4].argmax(1)


def loss_of(model: nn.Module, step: int, dtype: torch.dtype = torch.float32, rows: int = 16) -> Tensor:
    x, y = batch(step, dtype, rows)
    return nn.functional.cross_entropy(model(x), y)


def settings(**changes: Any) -> PruningConfig:
    """Three quarters of the blocks go, untested, in an event every third step up to half of training. Trials
    may cost what they like."""
    chosen: dict[str, Any] = {
        "target_sparsity": 0.75,
        "block_size": 8,
        "total_steps": STEPS,
        "interval": 3,
        "observe_every": 1,
        "neurons": False,
        "trial_budget": None,
    }
    return PruningConfig(**{**chosen, **changes})


def sparse_layers(model: nn.Module) -> list[BlockSparseLayer]:
    return [m for m in model.modules() if isinstance(m, BlockSparseLayer)]


def dense_weights(model: nn.Module) -> list[Tensor]:
    """Every weight and bias, block-sparse ones in their dense shape."""
    found = []
    for module in model.modules():
        if hasattr(module, "weight") and isinstance(module.weight, Tensor):
            found.append(module.weight.detach().clone())
            if module.bias is not None:
                found.append(module.bias.detach().clone())
    return found


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    """The same tensors, bit for bit."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and torch.equal(a, b), (a - b).abs().max()


def adam(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-2, **options)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int = STEPS,
    start: int = 0,
    after: Callable[[], None] = lambda: None,
) -> None:
    """A plain loop over the batches from ``start`` on."""
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        after()
