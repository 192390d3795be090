"""Which layers a swap takes, which it leaves and why, and that nothing else of the model changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynaprune.nn import (
    BlockSparseConv1d,
    BlockSparseConv2d,
    BlockSparseLayer,
    BlockSparseLinear,
    swap_back,
    swap_layers,
)
from dynaprune.nn.swap import matches


class Network(nn.Module):
    """A stem, two blocks and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Sequential(
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 1)
        )
        self.hidden = nn.Linear(32, 64)
        self.classifier = nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.hidden(self.body(self.stem(x)).mean((2, 3))).relu())


def _swapped(model: nn.Module, *arguments: Any, **options: Any) -> list[str]:
    entries = swap_layers(model, *arguments, **options)
    names = [entry.name for entry in entries if entry.swapped]
    assert names == [n for n, m in model.named_modules() if isinstance(m, BlockSparseLayer)]
    return names


def _reasons(model: nn.Module, block_size: int = 8, **options: Any) -> dict[str, str]:
    return {entry.name: entry.reason for entry in swap_layers(model, block_size, **options)}


def test_first_convolution_and_classifier_stay_dense_and_the_rest_goes() -> None:
    model = Network()
    reasons = _reasons(model)
    assert list(reasons) == ["stem", "body.0", "body.3", "hidden", "classifier"]
    assert [name for name, reason in reasons.items() if not reason] == ["body.0", "body.3", "hidden"]
    assert "first convolution" in reasons["stem"] and "classifier" in reasons["classifier"]
    assert isinstance(model.body[0], BlockSparseConv2d) and isinstance(model.hidden, BlockSparseLinear)


def test_a_swapped_model_computes_and_trains_as_before_and_comes_back() -> None:
    torch.manual_seed(0)
    dense = Network().double()
    sparse = copy.deepcopy(dense)
    parameters = dict(sparse.named_parameters())
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (dense, sparse)]
    swap_layers(sparse, 8)
    assert {id(p) for p in sparse.parameters()} == {id(p) for p in parameters.values()}
    for _ in range(3):
        x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
        for model, optimizer in zip((dense, sparse), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    assert swap_back(sparse) is sparse
    assert list(sparse.state_dict()) == list(dense.state_dict())
    for name, parameter in sparse.named_parameters():
        assert parameter is parameters[name]
        torch.testing.assert_close(parameter, dense.get_parameter(name))
        torch.testing.assert_close(parameter.grad, dense.get_parameter(name).grad)
    torch.testing.assert_close(sparse(x), dense(x))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"types": [nn.Linear]}, ["hidden"]),
        ({"types": [nn.Conv2d]}, ["body.0", "body.3"]),
        ({"include": ["body"]}, ["body.0", "body.3"]),
        ({"include": ["body.3", "classifier"]}, ["body.3", "classifier"]),
        ({"include": [r"re:body\.\d"]}, ["body.0", "body.3"]),
        ({"include": ["re:.*[03]"]}, ["body.0", "body.3"]),
        ({"exclude": ["body"]}, ["hidden"]),
        ({"exclude": [r"re:.*\.0", "hidden"]}, ["body.3"]),
        ({"include": ["body", "hidden"], "exclude": ["body.0"]}, ["body.3", "hidden"]),
    ],
)
def test_rules_choose_by_type_name_and_expression(options: dict[str, Any], expected: list[str]) -> None:
    assert _swapped(Network(), 8, **options) == expected


def test_names_match_whole_parts_and_expressions_whole_names() -> None:
    assert matches("body.0", ["body"]) and matches("body.0", ["body.0"]) and matches("body.0", ["re:body.*"])
    assert not matches("body2.0", ["body"]) and not matches("body.0", ["re:body"])
    assert not matches("body.0", [])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.hidden = nn.Linear(16, 16)
        self.decoder = nn.Linear(16, 32)
        self.decoder.weight = self.embed.weight
        self.last = nn.Linear(32, 8)


class LinearOfMyOwn(nn.Linear):
    pass


def _frozen() -> nn.Linear:
    layer = nn.Linear(16, 16)
    layer.weight.requires_grad_(False)
    return layer


def _beside(layer: nn.Module) -> nn.Module:
    """The layer, one that can be swapped, and a classifier."""
    return nn.ModuleDict({"layer": layer, "other": nn.Linear(16, 16), "classifier": nn.Linear(16, 16)})


EXEMPT: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "tied": (Tied, "decoder", "tied to another module"),
    "parametrized": (
        lambda: _beside(nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))),
        "layer",
        "parametrized",
    ),
    "old weight norm": (lambda: _beside(nn.utils.weight_norm(nn.Linear(16, 16))), "layer", "parametrized"),
    "old spectral norm": (
        lambda: _beside(nn.utils.spectral_norm(nn.Linear(16, 16))),
        "layer",
        "not a Parameter",
    ),
    "attention": (
        lambda: _beside(nn.MultiheadAttention(16, 2)),
        "layer.out_proj",
        "read by MultiheadAttention directly",
    ),
    "transformer": (
        lambda: _beside(nn.TransformerEncoderLayer(16, 2, 32)),
        "layer.linear1",
        "read by TransformerEncoderLayer directly",
    ),
    "frozen": (lambda: _beside(_frozen()), "layer", "it is frozen"),
    "lazy": (lambda: _beside(nn.LazyLinear(16)), "layer", "lazy: run a forward pass first"),
    "subclass": (lambda: _beside(LinearOfMyOwn(16, 16)), "layer", "LinearOfMyOwn is a subclass"),
    "groups": (lambda: _beside(nn.Conv1d(24, 24, 3, groups=2)), "layer", "no multiple of the block's 8"),
    "padding": (lambda: _beside(nn.Linear(16, 12)), "layer", "33% of padding for 12x16"),
}


@pytest.mark.parametrize("name", EXEMPT)
def test_exempt_layers_stay_dense_with_a_reason(name: str) -> None:
    make, exempt, reason = EXEMPT[name]
    model = nn.ModuleDict({"first": nn.Conv1d(8, 8, 3), "model": make()})
    layer = model.get_submodule(f"model.{exempt}")
    tensors = {key: value for key, value in layer.state_dict().items() if not nn.parameter.is_lazy(value)}
    before = copy.deepcopy(tensors)
    assert reason in _reasons(model)[f"model.{exempt}"]
    assert model.get_submodule(f"model.{exempt}") is layer
    assert all(torch.equal(layer.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", EXEMPT)
def test_a_layer_asked_for_by_name_is_refused_aloud_and_the_model_left_alone(name: str) -> None:
    make, exempt, reason = EXEMPT[name]
    model = make()
    others = [n for n, m in model.named_modules() if n in ("other", "hidden")]
    if name == "padding":
        assert _swapped(model, 8, include=[exempt]) == [exempt]
        return
    with pytest.raises(ValueError, match=f"layer '{exempt}' was asked for by name .*{reason}"):
        swap_layers(model, 8, include=[*others, exempt])
    assert not any(isinstance(module, BlockSparseLayer) for module in model.modules())


def test_a_first_convolution_and_a_classifier_go_when_named() -> None:
    assert _swapped(Network(), 8, include=["stem", "classifier"]) == ["stem", "classifier"]


def test_a_layer_that_stands_in_two_places_stays_one_layer() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(16, 16)
            self.b = self.a
            self.inner = nn.Sequential(self.a, nn.ReLU())
            self.classifier = nn.Linear(16, 8)

    model = Shared()
    assert _swapped(model, 8) == ["a"]
    assert model.a is model.b is model.inner[0]
    swap_back(model)
    assert type(model.a) is nn.Linear and model.a is model.b is model.inner[0]


def test_hooks_move_along_and_their_handles_still_remove_them() -> None:
    model = Network()
    seen: list[str] = []
    handles = [
        model.hidden.register_forward_hook(lambda *_: seen.append("after")),
        model.hidden.register_forward_pre_hook(lambda *_: seen.append("before")),
        model.hidden.register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    x = torch.randn(2, 3, 4, 4)
    swap_layers(model, 8)
    model(x).sum().backward()
    assert seen == ["before", "after", "backward"]
    swap_back(model)
    model(x).sum().backward()
    assert seen == 2 * ["before", "after", "backward"]
    for handle in handles:
        handle.remove()
    model(x).sum().backward()
    assert len(seen) == 6


def test_conv1d_layers_are_swapped_too() -> None:
    model = nn.Sequential(nn.Conv1d(8, 16, 3), nn.Conv1d(16, 16, 3), nn.Conv1d(16, 16, 3))
    assert _swapped(model, 8) == ["1", "2"]
    assert type(model[1]) is BlockSparseConv1d


def test_many_layers_of_one_reason_are_told_by_their_number() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(40)), nn.Linear(64, 4))
    model[:40].requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"40 layers \(0, ..., 39\): it is frozen; 40: the classifier"
    ) as told:
        swap_layers(model, 8)
    assert len(str(told.value)) < 300


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (Network, {"block_size": 4}, ValueError, r"from 8 to 128, got \(4, 4\)"),
        (Network, {"block_size": 8.0}, TypeError, "block_size as an int or a pair"),
        (Network, {"types": [nn.Embedding]}, TypeError, r"types among \['Linear', 'Conv2d', 'Conv1d'\]"),
        (Network, {"include": ["hiden"]}, ValueError, "matches a module of the model, got 'hiden'"),
        (Network, {"exclude": ["re:nothing"]}, ValueError, "matches a module of the model, got 're:nothing'"),
        (Network, {"block_size": 128}, ValueError, "at least one prunable layer, got none: stem: the first"),
        (nn.ReLU, {}, ValueError, "at least one prunable layer, got none: no layer of type Linear, Conv2d"),
        (lambda: nn.Linear(16, 16), {}, ValueError, "at least one prunable layer, got none"),
        (lambda: nn.Linear(16, 16), {"include": [""]}, ValueError, "it is the model itself: wrap it"),
    ],
)
def test_wrong_input_is_refused(
    model: Callable[[], nn.Module], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    made = model()
    with pytest.raises(error, match=message):
        swap_layers(made, **{"block_size": 8, **options})
    assert not any(isinstance(module, BlockSparseLayer) for module in made.modules())
