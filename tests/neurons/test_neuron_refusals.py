"""What is not cut, with a reason, and what a cut that is refused, taken back or interrupted leaves alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaprune.neurons.cut import cut_dead_neurons
from dynaprune.neurons.example_inputs import ExampleInputs, InputCapture
from dynaprune.neurons.groups import find_groups
from dynaprune.nn import swap_layers
from dynaprune_kernels import BlockLayout, ConvGeometry
from tests.neurons.cutting import BLOCK, batch, cut, kill, mlp, train


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
