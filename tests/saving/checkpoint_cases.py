"""One network in several structures, for the tests of checkpoints."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaprune.neurons.cut import cut_dead_neurons
from dynaprune.neurons.example_inputs import ExampleInputs
from dynaprune.neurons.groups import find_groups
from dynaprune.nn import swap_layers
from tests.neurons.cutting import kill


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.BatchNorm2d(32),
        nn.PReLU(32),
        nn.Conv2d(32, 48, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(48, 64),
        nn.ReLU(),
        nn.Linear(64, 64, bias=False),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


INPUT = (5, 3, 8, 8)


def pruned() -> nn.Sequential:
    """Trained, with dead blocks, a compacted layer and cut neurons in sparse and plain layers."""
    model = network()
    swap_layers(model, 16)
    x = torch.randn(INPUT)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(5)).backward()
        optimizer.step()
    kill(model, "3", columns=[0])
    kill(model, "9", columns=[2])
    example = ExampleInputs.of(x)
    report = cut_dead_neurons(model, find_groups(model, example), example, [optimizer])
    assert report.neurons == {"0": 16, "7": 16}
    kill(model, "3", rows=[1])
    with torch.no_grad():
        free = model[3].layout.block_of_slot < 0  # type: ignore[union-attr, operator]
        model[3].values[free] = torch.nan  # type: ignore[index, union-attr]
    return model


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(x)


def swapped() -> nn.Sequential:
    model = network()
    swap_layers(model, 16)
    kill(model, "9", rows=[1])
    return model


def other_block() -> nn.Sequential:
    model = network()
    swap_layers(model, (8, 32))
    return model


class Tied(nn.Module):
    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(40, 32), nn.Linear(32, 32)
        self.decoder = nn.Linear(32, 40, bias=False)
        if tie:
            self.decoder.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.relu(self.hidden(self.embedding(x))))
