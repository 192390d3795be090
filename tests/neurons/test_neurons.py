"""Cutting neurons: outputs stay, state is sliced alike, and what cannot go stays with a reason."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaprune.neurons.candidates import blocks_of_group
from dynaprune.neurons.example_inputs import ExampleInputs
from dynaprune.neurons.groups import find_groups
from dynaprune.nn import BlockSparseLayer, swap_layers
from tests.neurons.cutting import BLOCK, batch, cut, kill, mlp, outputs, train

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=2e-3, amsgrad=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=2e-3, fused=True),
}


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.Sigmoid])
def test_constant_and_unread_neurons_go_and_outputs_stay(
    optimizer_name: str, activation: Callable[[], nn.Module]
) -> None:
    model = mlp(64, 100, 96, 10, activation=activation)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    swap_layers(model, BLOCK)
    x, y = batch()
    train(model, optimizer, x, y)
    kill(model, "0", rows=[1, 6])
    kill(model, "2", rows=[0], columns=[4])
    parameters = list(model.parameters())
    report = cut(model, x, [optimizer])
    assert report.neurons == {"0": 2 * 16 + 4, "2": 16}
    assert (model[0].out_features, model[2].in_features) == (64, 64)  # type: ignore[union-attr]
    assert (model[2].out_features, model[4].in_features) == (80, 80)  # type: ignore[union-attr]
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    for parameter in parameters:
        assert parameter.grad is not None and parameter.grad.shape == parameter.shape
        for value in optimizer.state[parameter].values():
            assert value.dim() == 0 or value.shape == parameter.shape
    train(model, optimizer, x, y, steps=3)


def test_what_goes_on_training_is_what_would_have_trained() -> None:
    """Cut against kept: unread neurons change no step, so both nets train to the same weights."""
    torch.set_default_dtype(torch.float64)
    try:
        model = mlp(64, 96, 64, 10)
        swap_layers(model, BLOCK)
        x, y = batch()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, amsgrad=True)
        train(model, optimizer, x, y)
        kill(model, "0", rows=[2])
        kill(model, "2", columns=[2])
        twin = copy.deepcopy(model)
        twin_optimizer = torch.optim.Adam(twin.parameters(), lr=1e-3, amsgrad=True)
        twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert cut(model, x, [optimizer]).neurons == {"0": 16}
        train(model, optimizer, x, y, steps=25)
        train(twin, twin_optimizer, x, y, steps=25)
        keep = torch.cat([torch.arange(32), torch.arange(48, 96)])
        for mine, other in [
            (model[0].weight, twin[0].weight[keep]),  # type: ignore[index, union-attr]
            (model[0].bias, twin[0].bias[keep]),  # type: ignore[index, union-attr]
            (model[2].weight, twin[2].weight[:, keep]),  # type: ignore[index, union-attr]
            (model[4].weight, twin[4].weight),
        ]:
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)  # type: ignore[arg-type]
    finally:
        torch.set_default_dtype(torch.float32)


def test_every_sliced_tensor_is_the_old_one_at_the_kept_places() -> None:
    model = mlp(64, 96, 10)
    optimizer = torch.optim.Adam(model.parameters(), amsgrad=True)
    swap_layers(model, BLOCK)
    x, y = batch()
    train(model, optimizer, x, y)
    kill(model, "0", rows=[3])
    layer, reader = model[0], model[2]
    assert isinstance(layer, BlockSparseLayer) and isinstance(reader, nn.Linear)
    keep = torch.cat([torch.arange(48), torch.arange(64, 96)])

    def tensors() -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            values = {k: v for k, v in optimizer.state[parameter].items() if v.dim()}
            values["grad"] = parameter.grad  # type: ignore[assignment]
            for key, value in values.items():
                dense = layer.to_dense_shape(value) if parameter is layer.values else value.clone()
                found[f"{name} {key}"] = dense
        return found

    before = tensors()
    assert cut(model, x, [optimizer]).neurons == {"0": 16}
    after = tensors()
    assert set(before) == set(after) and len(before) == 4 * 4
    for key, old in before.items():
        expected = (
            old[:, keep] if key.startswith("2.weight") else old if key.startswith("2.bias") else old[keep]
        )
        assert torch.equal(after[key], expected), key


@pytest.mark.parametrize("blocks", [(16, 32), (32, 16), (8, 24)])
def test_rectangular_blocks_go_in_whole_groups_of_both(blocks: tuple[int, int]) -> None:
    model = mlp(96, 192, 192, 10)
    swap_layers(model, blocks)
    x, y = batch((96,))
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), x, y, steps=3)
    groups = find_groups(model, ExampleInputs.of(x)).of("0")
    size = {(16, 32): 32, (32, 16): 32, (8, 24): 24}[blocks]
    assert [g.neurons.tolist() for g in groups] == [list(range(i, i + size)) for i in range(0, 192, size)]
    rows = size // blocks[0]
    kill(model, "0", rows=range(rows))
    if rows > 1:
        kill(model, "0", rows=[rows])  # a row of the second group, whose other rows live
    assert cut(model, x).neurons == {"0": size}


def test_two_readers_and_a_plain_one() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.left, self.right = nn.Linear(64, 64), nn.Linear(64, 48), nn.Linear(64, 48)
            self.plain, self.head = nn.Linear(64, 48), nn.Linear(48, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.stem(x))
            return self.head(torch.relu(self.left(x)) + torch.tanh(self.right(x)) + self.plain(x))

    model = Fork()
    swap_layers(model, BLOCK, exclude=["plain"])
    x, y = batch()
    train(model, torch.optim.Adam(model.parameters()), x, y)
    kill(model, "left", columns=[1])
    assert cut(model, x).neurons == {}, "two readers still read it"
    kill(model, "stem", rows=[1, 2])
    report = cut(model, x)
    assert report.neurons == {"stem": 32}
    assert [m.in_features for m in (model.left, model.right, model.plain)] == [32, 32, 32]


def test_dropout_between_and_random_state() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Sigmoid(), nn.Dropout(0.5), nn.Linear(64, 10))
    swap_layers(model, BLOCK)
    x, _ = batch()
    kill(model, "0", rows=[1])
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index, union-attr]
    assert cut(model, x).neurons == {"0": 16}
    torch.set_rng_state(states[0])
    outputs(model, x)
    assert random.getstate() == states[1] and np.random.get_state()[1].tolist() == states[2]  # type: ignore[index, union-attr]


def test_blocks_of_a_group_are_what_a_trial_suspends() -> None:
    model = mlp(64, 96, 64, 10)
    swap_layers(model, BLOCK)
    x, _ = batch()
    group = find_groups(model, ExampleInputs.of(x)).of("0")[2]
    masks = blocks_of_group(model, group)
    assert masks["0"].nonzero()[:, 0].unique().tolist() == [2] and masks["0"].sum() == 4
    assert masks["2"].nonzero()[:, 1].unique().tolist() == [2] and masks["2"].sum() == 4
    for name, blocks in masks.items():
        model.get_submodule(name).layout.release_(blocks)  # type: ignore[union-attr, operator]
    report = cut(model, x)
    assert report.neurons == {"0": 16} and report.blocks == 0
    rows, columns, neurons = report.kept["2"]
    assert rows.tolist() == [0, 1, 2, 3] and columns.tolist() == [0, 1, 3, 4, 5] and len(neurons) == 64


def test_blocks_that_go_along_are_counted() -> None:
    model = mlp(64, 96, 64, 10)
    swap_layers(model, BLOCK)
    kill(model, "2", columns=[0])
    assert cut(model, batch()[0]).blocks == 4


def test_held_loss_does_not_break_the_next_backward() -> None:
    model = mlp(64, 64, 64, 10)
    optimizer = torch.optim.AdamW(model.parameters())
    swap_layers(model, BLOCK)
    x, y = batch()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    kill(model, "0", rows=[1])
    assert cut(model, x, [optimizer]).neurons == {"0": 16}
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert model[0].values.grad.shape == model[0].values.shape  # type: ignore[union-attr]
    assert loss is not None


def test_compiled_model_is_traced_uncompiled() -> None:
    model = mlp(64, 64, 64, 10)
    swap_layers(model, BLOCK)
    x, y = batch()
    model.compile(backend="aot_eager")
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), x, y, steps=2)
    kill(model, "0", rows=[1])
    assert cut(model, x).neurons == {"0": 16}
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), x, y, steps=2)


def test_tap_follows_the_new_grid() -> None:
    model = mlp(64, 64, 64, 10)
    swap_layers(model, BLOCK)
    for index in (0, 2):
        model[index].enable_tap_()  # type: ignore[operator]
    x, y = batch()
    kill(model, "0", rows=[1])
    assert cut(model, x).neurons == {"0": 16}
    F.cross_entropy(model(x), y).backward()
    assert model[0].tap.grad.shape == (2, 3 * 4) and model[2].tap.grad.shape == (2, 4 * 3)  # type: ignore[union-attr]
