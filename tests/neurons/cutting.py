"""Layers that die on command, cuts whose outputs are checked, and small networks to cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaprune.neurons.cut import cut_dead_neurons
from dynaprune.neurons.cut_plan import CutReport
from dynaprune.neurons.example_inputs import ExampleInputs
from dynaprune.neurons.groups import find_groups
from dynaprune.nn import BlockSparseLayer

BLOCK = 16


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int = 20) -> None:
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def batch(features: tuple[int, ...] = (64,), samples: int = 37) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, *features), torch.randint(0, 10, (samples,))


def kill(model: nn.Module, name: str, rows: Any = (), columns: Any = ()) -> None:
    """Let whole block rows and block columns (of input channels) of a layer die."""
    layer = model.get_submodule(name)
    assert isinstance(layer, BlockSparseLayer)
    layout = layer.layout
    dead = torch.zeros(layout.rows, layout.taps, layout.columns // layout.taps, dtype=torch.bool)
    dead[list(rows)] = True
    dead[:, :, list(columns)] = True
    layout.release_(dead.view(layout.rows, layout.columns))


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    training = model.training
    model.eval()
    with torch.no_grad():
        y = model(x)
    model.train(training)
    return y


def rounding(y: Tensor) -> float:
    """The cut's own check allows 256 eps of the greatest output."""
    return 256 * torch.finfo(y.dtype).eps * float(y.abs().max())


def cut(model: nn.Module, x: Tensor, optimizers: Any = (), **settings: Any) -> CutReport:
    """Cut, and check that the outputs stay."""
    before = outputs(model, x)
    example = ExampleInputs.of(x)
    report = cut_dead_neurons(model, find_groups(model, example), example, optimizers, **settings)
    assert float((outputs(model, x) - before).abs().max()) <= rounding(before)
    fresh = torch.randn_like(x)
    assert torch.isfinite(outputs(model, fresh)).all()
    return report


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(len(widths) - 1):
        layers.append(nn.Linear(widths[i], widths[i + 1], bias=bias or i == len(widths) - 2))
        if i < len(widths) - 2:
            layers.append(activation())
    return nn.Sequential(*layers)


class Residual(nn.Module):
    """Two blocks around skip connections; ``skip`` feeds the input's width through."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 96), nn.Linear(96, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(x + self.b(torch.relu(self.a(x))))


def with_norm(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, 64), norm(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
