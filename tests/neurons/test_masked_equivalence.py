"""Training with live masks, regrowth and compaction is training dense with the same masks multiplied in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

import dynaprune
from tests.pruning.attached import batch, mlp, settings, sparse_layers

TRAINING = 50
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg")
Maker = Callable[[Any], Optimizer]

OPTIMIZERS: dict[str, Maker] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.05),
    "SGD, momentum, weight decay": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3),
    "SGD, nesterov, foreach": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, foreach=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, fused=True),
    "Adam, for-loop": lambda p: torch.optim.Adam(p, 3e-3, foreach=False, fused=False),
    "Adam, foreach": lambda p: torch.optim.Adam(p, 3e-3, weight_decay=1e-3, foreach=True),
    "Adam, fused": lambda p: torch.optim.Adam(p, 3e-3, weight_decay=1e-3, fused=True),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, 3e-3, amsgrad=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, 3e-3, weight_decay=0.1, fused=True),
    "AdamW, amsgrad, foreach": lambda p: torch.optim.AdamW(p, 3e-3, amsgrad=True, foreach=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9),
}


class Masked(nn.Module):
    """A dense network whose weights are multiplied by masks."""

    def __init__(self, dense: nn.Sequential, masks: dict[int, Tensor]) -> None:
        super().__init__()
        self.dense, self.masks = dense, masks

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.dense):
            if number in self.masks:
                x = nn.functional.linear(x, layer.weight * self.masks[number], layer.bias)
            else:
                x = layer(x)
        return x

    def change(self, number: int, mask: Tensor, optimizer: Optimizer) -> tuple[int, int]:
        """Take over a mask as the pruner does: how many weights died and how many came alive."""
        before, weight = self.masks[number] > 0, self.dense[number].weight
        died, grown = before & ~mask, mask & ~before
        with torch.no_grad():
            weight[died | grown] = 0
            for key, state in optimizer.state[weight].items():
                if state is not None and state.shape == weight.shape:
                    state[died] = 0
                    state[grown] = state[before & mask].mean() if key in SECOND_MOMENTS else 0
        self.masks[number] = mask.to(weight.dtype)
        return int(died.sum()), int(grown.sum())


def elements(mask: Tensor, shape: tuple[int, int], block: int = 8) -> Tensor:
    """The mask of weights that a mask of blocks stands for."""
    return mask.repeat_interleave(block, 0).repeat_interleave(block, 1)[: shape[0], : shape[1]]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masked_training_is_the_same(name: str) -> None:
    double = torch.float64
    model, dense = mlp(double), mlp(double)
    optimizer, dense_optimizer = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](dense.parameters())
    config = settings(total_steps=TRAINING, end=0.6, regrow=0.5, target_sparsity=0.6)
    pruner = dynaprune.attach(model, optimizer, config)
    reference = Masked(dense, {number: torch.ones_like(dense[number].weight) for number in (0, 2)})
    died = grown = 0
    for step in range(TRAINING):
        for network, by in ((model, optimizer), (reference, dense_optimizer)):
            by.zero_grad()
            x, y = batch(step, double)
            nn.functional.cross_entropy(network(x), y).backward()
            by.step()
        for number in (0, 2):
            mask = elements(model[number].layout.mask, tuple(dense[number].weight.shape))
            change = reference.change(number, mask, dense_optimizer)
            died, grown = died + change[0], grown + change[1]
        for number in (0, 2, 4):
            found, expected = model[number].weight, dense[number].weight.detach()
            assert (found - expected).norm() <= 1e-11 * expected.norm(), f"layer {number}, step {step}"
    report = pruner.report()
    assert died > grown > 64 and report["blocks_regrown"] * 64 == grown
    assert report["compactions"] >= 4
    assert sum(layer.layout.capacity for layer in sparse_layers(model)) == 38 == int(0.4 * 96)
    for number in (0, 2):
        kept = pruner.layers[str(number)]
        for key, state in dense_optimizer.state[dense[number].weight].items():
            if state is not None and state.shape == dense[number].weight.shape:
                found = kept.to_dense_shape(optimizer.state[kept.values][key])
                live = reference.masks[number] > 0
                scale = state[live].abs().max()
                assert (found[live] - state[live]).abs().max() <= 1e-10 * scale, key


@pytest.mark.parametrize("optimizer_name", ["SGD, momentum, weight decay", "Adam, fused"])
def test_ragged_blocks_and_convolutions_train_the_same(optimizer_name: str) -> None:
    """Sizes that are no multiples of the block, a strided convolution, masks per kernel tap."""

    def network() -> nn.Sequential:
        torch.manual_seed(2)
        return nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(12, 20, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(20 * 9, 30),
            nn.ReLU(),
            nn.Linear(30, 4),
        ).double()

    def images(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 3, 6, 6, generator=generator, dtype=torch.float64)
        return x, x[:, 0, :2, :2].flatten(1).argmax(1)

    make = OPTIMIZERS[optimizer_name]
    model, dense = network(), network()
    optimizer, dense_optimizer = make(model.parameters()), make(dense.parameters())
    config = settings(total_steps=TRAINING, include=["2", "5"], block_size=(10, 8), target_sparsity=0.6)
    pruner = dynaprune.attach(model, optimizer, config)
    masks: dict[int, Tensor] = {}
    for step in range(TRAINING):
        x, y = images(step)
        for each, by in ((model, optimizer), (dense, dense_optimizer)):
            by.zero_grad()
            nn.functional.cross_entropy(each(x), y).backward()
            if each is dense:
                for number, live in masks.items():
                    each[number].weight.grad[~live] = 0
            by.step()
        for number in (2, 5):
            layer = pruner.layers[str(number)]
            ones = torch.ones_like(layer.values)
            masks[number] = layer.to_dense_shape(ones) > 0
            weight = dense[number].weight
            with torch.no_grad():
                weight[~masks[number]] = 0
                for state in dense_optimizer.state[weight].values():
                    if isinstance(state, Tensor) and state.shape == weight.shape:
                        state[~masks[number]] = 0
        for number in (0, 2, 5, 7):
            found, expected = model[number].weight.detach(), dense[number].weight.detach()
            assert found.shape == expected.shape
            assert (found - expected).norm() <= 1e-11 * expected.norm(), f"layer {number}, step {step}"
    live = sum(int(mask.sum()) for mask in masks.values())
    total = 20 * 12 * 9 + 30 * 180
    assert pruner.target_reached and pruner.sparsity == pytest.approx(1 - live / total)
    assert 0.6 <= pruner.sparsity < 0.62
