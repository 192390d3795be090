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

from dynaprune.nn import BlockSparseLayer, swap_layers
from dynaprune.pruning.neuron_groups import ExampleInputs, InputCapture, find_groups
from dynaprune.pruning.neurons import CutReport, blocks_of_group, cut_dead_neurons
from dynaprune_kernels import BlockLayout, ConvGeometry

BLOCK = 16
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=2e-3, amsgrad=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=2e-3, fused=True),
}


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
    taps = 1 if layout.conv is None else layout.conv.taps
    dead = torch.zeros(layout.rows, taps, layout.columns // taps, dtype=torch.bool)
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


class Residual(nn.Module):
    """Two blocks around skip connections; ``skip`` feeds the input's width through."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 96), nn.Linear(96, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(x + self.b(torch.relu(self.a(x))))


def test_skip_connection_ties_producers_together() -> None:
    model = Residual()
    swap_layers(model, BLOCK)
    x, y = batch()
    train(model, torch.optim.Adam(model.parameters()), x, y)
    groups = find_groups(model, ExampleInputs.of(x))
    coupled = next(g for g in groups.groups if g.name == "stem")
    assert {m.name for m in coupled.producers} == {"stem", "b"}
    assert {m.name for m in coupled.readers} == {"a", "head"}
    kill(model, "stem", rows=[2])
    assert cut(model, x).neurons == {}, "b still adds to it"
    kill(model, "b", rows=[2])
    report = cut(model, x)
    assert sum(report.neurons.values()) == 16
    assert (model.head.in_features, model.a.in_features, model.b.out_features) == (48, 48, 48)


def test_skip_from_the_input_is_refused_by_running_the_model() -> None:
    class FromInput(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.b(torch.relu(self.a(x))))

    model = FromInput()
    swap_layers(model, BLOCK)
    x, _ = batch()
    kill(model, "b", rows=[1])
    kill(model, "a", rows=[0])
    report = cut(model, x)
    assert report.neurons == {"a": 16} and "b" in report.refused
    assert model.b.out_features == 64


def test_forward_that_knows_a_width_is_taken_back_bitwise() -> None:
    class Knows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.b(torch.relu(self.a(x))).view(-1, 4, 16)).reshape(-1, 64))

    model = Knows()
    optimizer = torch.optim.Adam(model.parameters(), amsgrad=True)
    swap_layers(model, BLOCK)
    x, y = batch()
    train(model, optimizer, x, y)
    kill(model, "b", rows=[1], columns=[3])
    untouched = [model.b.bias, model.head.weight, model.head.bias]
    before = [(p.detach().clone(), p.grad.clone(), copy.deepcopy(optimizer.state[p])) for p in untouched]  # type: ignore[union-attr]
    report = cut(model, x, [optimizer])
    assert report.neurons == {"a": 16} and "does not run" in report.refused["b"]
    for parameter, (data, grad, state) in zip(untouched, before, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter, data) and torch.equal(parameter.grad, grad)
        for key, value in state.items():
            assert torch.equal(optimizer.state[parameter][key], value)


def test_an_interrupt_in_the_middle_leaves_the_model_whole() -> None:
    class Interrupted(nn.Sequential):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 3:  # trace, constants, the check after the cut
                raise KeyboardInterrupt
            return super().forward(x)

    model = Interrupted(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    swap_layers(model, BLOCK)
    x, _ = batch()
    kill(model, "0", rows=[1])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        cut_dead_neurons(model, find_groups(model, ExampleInputs.of(x)), ExampleInputs.of(x))
    assert model.calls == 3
    now = model.state_dict()
    assert all(torch.equal(now[key], value) for key, value in before.items())
    assert model(x).shape == (37, 10)


def test_outputs_with_infinities_are_compared_where_finite() -> None:
    class Masked(nn.Module):
        def __init__(self, broken: bool) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
            self.broken = broken

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.head(torch.relu(self.b(torch.relu(self.a(x))))).index_fill(
                1, torch.tensor([3]), -torch.inf
            )
            return y, y.argmax(1) + (self.b.in_features if self.broken else 0)

    x, _ = batch()
    for broken in (False, True):
        model = Masked(broken)
        swap_layers(model, BLOCK)
        kill(model, "a", rows=[1])
        example = ExampleInputs.of(x)
        report = cut_dead_neurons(model, find_groups(model, example), example)
        assert report.neurons == ({} if broken else {"a": 16})
        assert model.a.out_features == (64 if broken else 48)
        assert not broken or "outputs change" in report.refused["a"]


def test_classifier_and_model_outputs_are_never_cut() -> None:
    class TwoOutputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 32)

        def forward(self, x: Tensor) -> dict[str, Any]:
            hidden = self.b(torch.relu(self.a(x)))
            return {"logits": self.head(hidden), "more": (hidden,)}

    model = TwoOutputs()
    swap_layers(model, BLOCK, include=["a", "b", "head"])
    x, _ = batch()
    for name in ("a", "b", "head"):
        kill(model, name, rows=[0])
    example = ExampleInputs.of(x)
    groups = find_groups(model, example)
    assert groups.refused == dict.fromkeys(["b", "head"], "its outputs are outputs of the model")
    assert cut_dead_neurons(model, groups, example).neurons == {"a": 16}
    assert (model.b.out_features, model.head.out_features) == (64, 32)


def with_norm(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, 64), norm(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def test_batch_norm_is_sliced_with_its_statistics() -> None:
    model = with_norm(nn.BatchNorm1d)
    optimizer = torch.optim.Adam(model.parameters())
    swap_layers(model, BLOCK)
    x, y = batch()
    train(model, optimizer, x, y)
    norm: Any = model[1]
    mean, weight = norm.running_mean.clone(), norm.weight.detach().clone()
    kill(model, "3", columns=[1])
    assert cut(model, x, [optimizer]).neurons == {"0": 16}
    keep = torch.cat([torch.arange(16), torch.arange(32, 64)])
    assert torch.equal(norm.running_mean, mean[keep]) and torch.equal(norm.weight, weight[keep])
    assert norm.num_features == 48 and optimizer.state[norm.weight]["exp_avg"].shape == (48,)
    train(model, optimizer, x, y, steps=2)


def test_dead_neurons_behind_a_batch_norm_wait_for_its_statistics() -> None:
    model = with_norm(nn.BatchNorm1d)
    swap_layers(model, BLOCK)
    x, y = batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    train(model, optimizer, x, y, steps=3)
    kill(model, "0", rows=[1])
    report = cut(model, x, [optimizer])
    assert report.neurons == {} and "caught up" in report.refused["0"]
    train(model, optimizer, x, y, steps=250)
    before = model(x).detach()  # training mode: batch statistics
    model.eval()
    assert cut(model, x, [optimizer]).neurons == {"0": 16}
    model.train()
    assert float((model(x) - before).detach().abs().max()) < 1e-2 * float(before.abs().max())


def test_layer_norm_is_refused() -> None:
    model = with_norm(nn.LayerNorm)
    swap_layers(model, BLOCK)
    x, _ = batch()
    kill(model, "0", rows=[1])
    kill(model, "3", rows=[1], columns=[1])
    example = ExampleInputs.of(x)
    groups = find_groups(model, example)
    assert "LayerNorm" in groups.refused["0"] and cut(model, x).neurons == {"3": 16}


def test_reader_without_bias_takes_only_zeros() -> None:
    model = nn.Sequential(
        nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 10)
    )
    swap_layers(model, BLOCK)
    x, _ = batch()
    kill(model, "0", rows=[1, 2])
    with torch.no_grad():
        model[0].bias[16:32] = 0  # type: ignore[index, union-attr]
    report = cut(model, x)
    assert report.neurons == {"0": 16} and "no bias" in report.refused["0"]
    assert model[2].bias is None and model[0].out_features == 48  # type: ignore[union-attr]


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


@pytest.mark.parametrize("padding", [0, 1])
def test_convolutions(padding: int) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=padding),
        nn.Sigmoid(),
        nn.Conv2d(64, 48, 3, padding=padding),
        nn.Sigmoid(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(48 * (9 if padding else 1), 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    optimizer = torch.optim.Adam(model.parameters())
    swap_layers(model, BLOCK)
    x, y = batch((3, 8, 8))
    train(model, optimizer, x, y, steps=5)
    kill(model, "3", rows=[1], columns=[1])
    kill(model, "5", rows=[2])
    report = cut(model, x, [optimizer])
    expected = {"0": 16, "5": 16} if padding else {"0": 16, "3": 16, "5": 16}
    assert report.neurons == expected
    if padding:
        assert "pads" in report.refused["3"]
    assert model[0].out_channels == 16 and model[1].num_features == 16  # type: ignore[union-attr]
    assert model[9].in_features == 32 * (9 if padding else 1)  # type: ignore[union-attr]
    assert model[5].to_dense().out_channels == 32  # type: ignore[union-attr, operator]


def test_depthwise_and_conv1d_readers() -> None:
    model = nn.Sequential(
        nn.Conv1d(8, 32, 3),
        nn.Conv1d(32, 32, 3, groups=32),
        nn.InstanceNorm1d(32, affine=True),
        nn.PReLU(32),
        nn.Conv1d(32, 32, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    swap_layers(model, 8, exclude=["1"], include=["re:.*"])
    x, y = batch((8, 20))
    train(model, torch.optim.Adam(model.parameters()), x, y, steps=5)
    kill(model, "4", columns=[2])
    assert cut(model, x).neurons == {"0": 8}
    assert (model[1].groups, model[2].num_features, model[3].num_parameters) == (24, 24, 24)  # type: ignore[union-attr]


def test_floor_and_the_last_group_stay() -> None:
    model = mlp(64, 64, 10)
    swap_layers(model, BLOCK)
    x, _ = batch()
    kill(model, "0", rows=[0, 1, 2, 3])
    report = cut(model, x, floor=0.5)
    assert report.neurons == {"0": 32} and "stay" in report.refused["0"]
    report = cut(model, x)
    assert report.neurons == {"0": 16} and model[0].out_features == 16  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="floor"):
        cut(model, x, floor=1.0)


def test_zero_weights_of_a_plain_layer_are_not_dead() -> None:
    """An output layer that starts at zero reads its inputs as soon as it has trained."""
    model = mlp(64, 64, 10)
    swap_layers(model, BLOCK)
    nn.init.zeros_(model[2].weight)  # type: ignore[arg-type]
    assert cut(model, batch()[0]).plan is None


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


def test_tied_and_parametrized_weights_are_refused() -> None:
    model = mlp(64, 64, 64, 64, 10)
    swap_layers(model, BLOCK, exclude=["2", "4"])
    model[4].weight = model[2].weight
    nn.utils.parametrizations.weight_norm(model[6])
    refused = find_groups(model, ExampleInputs.of(batch()[0])).refused
    assert "shares a weight" in refused["0"]
    model = mlp(64, 64, 10)
    swap_layers(model, BLOCK)
    nn.utils.parametrizations.weight_norm(model[2])
    assert "parametrized" in find_groups(model, ExampleInputs.of(batch()[0])).refused["0"]


def test_attention_and_unreached_layers_are_refused() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.attention = nn.Linear(64, 64), nn.MultiheadAttention(64, 4, batch_first=True)
            self.spare, self.b, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            x = x + self.attention(x, x, x, need_weights=False)[0]
            return self.head(torch.relu(self.b(x)).mean(1))

    model = Attends()
    swap_layers(model, BLOCK)
    groups = find_groups(model, ExampleInputs.of(torch.randn(3, 5, 64)))
    assert set(groups.refused) == {"a", "spare"} and {g.name for g in groups.groups} == {"b"}
    assert "not reach" in groups.refused["spare"]


def test_tracing_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10))
    swap_layers(model, BLOCK)
    model[1].weight.requires_grad_(False)  # type: ignore[union-attr]
    model[3].eval()
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    with torch.no_grad():
        find_groups(model, ExampleInputs.of(x))
    assert modes == [m.training for m in model.modules()] and torch.equal(rng, torch.get_rng_state())
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    for grad, parameter in zip(grads, model.parameters(), strict=True):
        assert (grad is None) == (parameter.grad is None)
        assert grad is None or torch.equal(grad, parameter.grad)  # type: ignore[arg-type]


def test_captured_inputs_are_those_of_the_next_training_forward() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(64, 64), nn.Linear(64, 10)

        def forward(self, *, features: Tensor, scale: float = 1.0) -> Tensor:
            return self.head(torch.relu(self.a(features)) * scale)

    model = Keywords()
    swap_layers(model, BLOCK)
    capture = InputCapture(model)
    capture.arm()
    x, _ = batch()
    model.eval()
    model(features=x * 2)
    assert capture.example is None
    model.train()
    model(features=x.requires_grad_(), scale=0.5)
    assert not model._forward_pre_hooks
    example: Any = capture.example
    assert torch.equal(example.kwargs["features"], x) and not example.kwargs["features"].requires_grad
    assert example.kwargs["scale"] == 0.5
    kill(model, "a", rows=[0])
    assert cut_dead_neurons(model, find_groups(model, example), example).neurons == {"a": 16}
    capture.remove()
    assert capture.example is None


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


def test_concatenation_with_aligned_and_misaligned_widths() -> None:
    class Joined(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(64, width), nn.Linear(64, 64), nn.Linear(width + 64, 64)
            self.head = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            joined = torch.cat([self.a(x), torch.sigmoid(self.b(x))], 1)
            return self.head(torch.relu(self.c(torch.relu(joined))))

    x = torch.randn(5, 64)
    for width, expected in ((32, {"a": 16, "b": 32}), (40, {"a": 16})):
        model = Joined(width)
        swap_layers(model, BLOCK, include=["a", "b", "c"])
        kill(model, "a", rows=[1])
        kill(model, "b", rows=[0, 1])
        refused = find_groups(model, ExampleInputs.of(x)).refused
        assert ("also holds other neurons" in refused.get("b", "")) == (width == 40)
        assert cut(model, x).neurons == expected
        assert model.c.in_features == width + 64 - sum(expected.values())


def test_a_layer_used_twice_reads_one_constant_or_stays() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.again, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.stem(x))
            for _ in range(2):
                x = torch.tanh(self.again(x))
            return self.head(x)

    model = Recurrent()
    swap_layers(model, BLOCK)
    x, y = batch()
    train(model, torch.optim.Adam(model.parameters()), x, y)
    for name in ("stem", "again"):
        kill(model, name, rows=[1])
    report = cut(model, x)
    assert report.neurons == {} and "between calls" in report.refused["stem"]
    with torch.no_grad():
        model.again.bias[16:32] = model.stem.bias[16:32]
    assert cut(model, x).neurons == {"stem": 16}
    assert (model.again.out_features, model.again.in_features, model.head.in_features) == (48, 48, 48)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), x, y, steps=2)


class Encoder(nn.Module):
    """One transformer layer, pre-norm, on token numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(50, 64), nn.LayerNorm(64)
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(64, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        q, k, v = (
            m(self.norm(x)).view(*x.shape[:2], 4, 16).transpose(1, 2) for m in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.o(attended)
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x.mean(1))


def test_transformer_loses_hidden_neurons_and_keeps_heads_and_width() -> None:
    model = Encoder()
    optimizer = torch.optim.AdamW(model.parameters())
    swap_layers(model, BLOCK)
    tokens = torch.randint(0, 50, (3, 7))
    train(model, optimizer, tokens, torch.arange(3), steps=5)
    kill(model, "up", rows=[1])
    kill(model, "down", rows=[2], columns=[3])
    for name in "qkv":
        kill(model, name, rows=[2])
    example = ExampleInputs.of({"tokens": tokens})
    before = outputs(model, tokens)
    groups = find_groups(model, example)
    report = cut_dead_neurons(model, groups, example, [optimizer])
    assert report.neurons == {"up": 32} and model.down.in_features == 96
    assert float((outputs(model, tokens) - before).abs().max()) <= rounding(before)
    assert "Embedding" in groups.refused["o"] and "Embedding" in groups.refused["down"]
    assert "does not run" in report.refused["q"] and model.v.out_features == 64
    train(model, optimizer, tokens, torch.arange(3), steps=2)


def test_residual_block_loses_inner_channels() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 32, 3, padding=1), nn.Linear(32, 10)
            self.conv1, self.norm1 = nn.Conv2d(32, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48)
            self.conv2, self.norm2 = nn.Conv2d(48, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x))
            inner = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
            return self.head(F.adaptive_avg_pool2d(torch.relu(x + inner), 1).flatten(1))

    model = Block()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    swap_layers(model, BLOCK)
    x, y = batch((3, 8, 8))
    train(model, optimizer, x, y, steps=3)
    kill(model, "conv2", rows=[1], columns=[1])
    assert cut(model, x, [optimizer]).neurons == {"conv1": 16}
    assert (model.norm1.num_features, model.conv2.in_channels, model.norm2.num_features) == (32, 32, 32)
    train(model, optimizer, x, y, steps=2)


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


def test_dropping_rows_and_columns_refuses_what_makes_no_sense() -> None:
    layout = BlockLayout(64, 40, (16, 16))
    none, columns = torch.zeros(4, dtype=torch.bool), torch.tensor([False, True, False])
    with pytest.raises(TypeError, match="bool rows"):
        layout.drop_(none.int(), columns)
    with pytest.raises(ValueError, match=r"columns of shape \(3,\), got \(4,\)"):
        layout.drop_(none, none)
    with pytest.raises(ValueError, match="at least one of 4 block rows"):
        layout.drop_(~none, columns)
    grouped = BlockLayout(64, 64, (16, 16), conv=ConvGeometry(3, 3, groups=2))
    with pytest.raises(ValueError, match="groups=2"):
        grouped.drop_(none, torch.zeros(2, dtype=torch.bool))
    assert (layout.out_features, layout.in_features, layout.capacity) == (64, 40, 12)
    old_slot = layout.drop_(none, columns)
    assert (layout.out_features, layout.in_features, layout.capacity) == (64, 24, 8)
    assert old_slot.tolist() == [0, 2, 3, 5, 6, 8, 9, 11]
