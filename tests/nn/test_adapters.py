"""Which layers are adapters, by class and by shape, and which look like some and are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynaprune
from dynaprune.nn import BlockSparseLinear, swap_layers
from dynaprune.nn.adapters import find_adapters
from tests.pruning.attached import settings

WIDTH, RANK = 64, 8


def frozen(module: nn.Module) -> Any:
    return module.requires_grad_(False)


def bias_trains(layer: nn.Linear) -> nn.Linear:
    layer.weight.requires_grad_(False)
    return layer


class Wrapped(nn.Module):
    """A linear layer and a low-rank pair beside it, by names of its own."""

    def __init__(self, base: nn.Linear, first: str = "left", second: str = "right") -> None:
        super().__init__()
        self.inner = base
        self.add_module(first, nn.Linear(base.in_features, RANK, bias=False))
        self.add_module(second, nn.Linear(RANK, base.out_features, bias=False))
        self.names = first, second

    def forward(self, x: Tensor) -> Tensor:
        low = self.get_submodule(self.names[0])(x)
        return self.inner(x) + self.get_submodule(self.names[1])(low)

    @torch.no_grad()
    def merge(self) -> None:
        first, second = (self.get_submodule(name).weight for name in self.names)
        self.inner.weight.data += second @ first


class InASequential(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = frozen(nn.Linear(WIDTH, 2 * WIDTH))
        self.extra = nn.Sequential(nn.Linear(WIDTH, RANK), nn.Dropout(0.1), nn.Linear(RANK, 2 * WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.extra(x)


class UpFirst(nn.Module):
    """Registered in the other order, in a ModuleDict, over a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = frozen(nn.Conv2d(32, 64, 3, padding=1))
        self.pair = nn.ModuleDict({"b": nn.Conv2d(8, 64, 1), "a": nn.Conv2d(32, 8, 3, padding=1)})

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.pair["b"](self.pair["a"](x))


class Attention(nn.Module):
    """Frozen projections, a pair for two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (frozen(nn.Linear(WIDTH, WIDTH)) for _ in range(3))
        self.q_in, self.q_out = nn.Linear(WIDTH, RANK), nn.Linear(RANK, WIDTH)
        self.v_in, self.v_out = nn.Linear(WIDTH, RANK), nn.Linear(RANK, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, v = self.q(x) + self.q_out(self.q_in(x)), self.v(x) + self.v_out(self.v_in(x))
        return torch.softmax(q * self.k(x), -1) * v


class Bottleneck(nn.Module):
    """Houlsby's: down, up, skip."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.down, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, RANK), nn.Linear(RANK, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(torch.relu(self.down(self.norm(x))))


class Block(nn.Module):
    def __init__(self, *, freeze: bool = True) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.requires_grad_(not freeze)
        self.adapter = Bottleneck()

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter(x + self.narrow(torch.relu(self.wide(x))))


def stack(*layers: nn.Module, width: int = WIDTH) -> nn.Sequential:
    """The layers, a hidden layer that trains, and a classifier."""
    return nn.Sequential(*layers, nn.Linear(width, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4))


def image_net() -> nn.Sequential:
    return nn.Sequential(UpFirst(), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, 64), nn.Linear(64, 4))


ADAPTERS: dict[str, tuple[Callable[[], nn.Sequential], set[str]]] = {
    "a wrapped linear layer": (
        lambda: stack(Wrapped(frozen(nn.Linear(WIDTH, WIDTH)))),
        {"0.left", "0.right"},
    ),
    "a pair in a Sequential": (lambda: stack(InASequential(), width=2 * WIDTH), {"0.extra.0", "0.extra.2"}),
    "convolutions, up first": (image_net, {"0.pair.a", "0.pair.b"}),
    "pairs beside projections": (
        lambda: stack(Attention()),
        {f"0.{a}_{b}" for a in "qv" for b in ("in", "out")},
    ),
    "bottlenecks in frozen blocks": (
        lambda: stack(Block(), Block()),
        {f"{n}.adapter.{p}" for n in (0, 1) for p in ("down", "up")},
    ),
    "a bottleneck between frozen layers": (
        lambda: stack(frozen(nn.Linear(WIDTH, WIDTH)), Bottleneck(), frozen(nn.Linear(WIDTH, WIDTH))),
        {"1.down", "1.up"},
    ),
    "over a layer whose bias trains": (
        lambda: stack(Wrapped(bias_trains(nn.Linear(WIDTH, WIDTH)))),
        {"0.left", "0.right"},
    ),
    "by name, over a layer that trains": (
        lambda: stack(Wrapped(nn.Linear(WIDTH, WIDTH), "lora_A", "lora_B")),
        {"0.lora_A", "0.lora_B"},
    ),
    "by other names": (
        lambda: stack(Wrapped(nn.Linear(WIDTH, WIDTH), "lora_down", "lora_up")),
        {"0.lora_down", "0.lora_up"},
    ),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_found_and_never_pruned(name: str) -> None:
    build, expected = ADAPTERS[name]
    torch.manual_seed(0)
    model = build()
    assert set(find_adapters(model).layers) == expected
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    pruner = dynaprune.attach(model, optimizer, settings(total_steps=12, interval=1, neurons=True))
    assert pruner.layers and not expected & set(pruner.layers)
    shapes = {path: model.get_submodule(path).weight.shape for path in expected}
    x, y = torch.randn(16, *((32, 4, 4) if "conv" in name else (WIDTH,))), torch.arange(16) % 4
    for _ in range(12):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    report = pruner.report()
    assert report["target_reached"]
    for path in expected:
        layer = model.get_submodule(path)
        assert type(layer) in (nn.Linear, nn.Conv2d) and layer.weight.shape == shapes[path]
        assert "looks like an adapter" in report["layers"][path]["exempt"]


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(64, 64, 3, padding=1)
        self.fc1, self.fc2 = nn.Conv2d(64, 8, 1), nn.Conv2d(8, 64, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y * self.fc2(torch.relu(self.fc1(y.mean((2, 3), keepdim=True)))).sigmoid()


class LongRange(nn.Module):
    """A radio's, not an adapter: a whole network under the name ``lora``."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_a = nn.Linear(WIDTH, 2 * WIDTH)
        self.lora_b = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.lora_b(torch.relu(self.lora_a(x)))


def autoencoder() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH))


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "an autoencoder": autoencoder,
    "bottlenecks in blocks that train": lambda: stack(Block(freeze=False), Block(freeze=False)),
    "a low-rank pair beside a layer that trains": lambda: stack(Wrapped(nn.Linear(WIDTH, WIDTH))),
    "a head with a bottleneck on a frozen trunk": lambda: nn.ModuleDict(
        {"trunk": frozen(Block()), "head": nn.Sequential(nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH))}
    ),
    "the same in one Sequential": lambda: nn.Sequential(
        frozen(nn.Linear(WIDTH, WIDTH)), nn.ReLU(), nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, WIDTH)
    ),
    "a squeeze-excite block": lambda: nn.Sequential(
        frozen(nn.Conv2d(3, 64, 1)), SqueezeExcite(), SqueezeExcite()
    ),
    "a network called lora": lambda: stack(frozen(nn.Linear(WIDTH, WIDTH)), LongRange()),
    "a pair of full rank": lambda: stack(Pair()),
}


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = frozen(nn.Linear(WIDTH, WIDTH))
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)


@pytest.mark.parametrize("name", OTHERS)
def test_a_network_that_trains_is_no_adapter(name: str) -> None:
    found = find_adapters(OTHERS[name]())
    assert not found.layers and not found


NOTHING_ELSE: dict[str, Callable[[], nn.Module]] = {
    "a wrapped layer": lambda: nn.Sequential(Wrapped(frozen(nn.Linear(WIDTH, WIDTH))), nn.Linear(WIDTH, 4)),
    "bottlenecks": lambda: nn.Sequential(Block(), Block(), nn.Linear(WIDTH, 4)),
}


@pytest.mark.parametrize("name", NOTHING_ELSE)
def test_where_the_rest_is_frozen_attach_refuses_and_says_what_to_do(name: str) -> None:
    model = NOTHING_ELSE[name]()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(
        ValueError, match=r"adapters .* are never pruned.* are frozen .*requires_grad_"
    ) as told:
        dynaprune.attach(model, optimizer, settings())
    frozen_names = ("inner", "wide", "narrow")
    weights = sum(
        p.numel() for n, p in model.named_parameters() if n.split(".")[-2] in frozen_names and "weight" in n
    )
    assert f"({weights:,} weights)" in str(told.value)
    assert [type(m) for m in model.modules()] == kinds


def test_a_guess_yields_to_the_name_in_include() -> None:
    model = stack(Wrapped(frozen(nn.Linear(WIDTH, WIDTH))))
    entries = {e.name: e.reason for e in swap_layers(model, 8, include=["0.left", "1"])}
    assert not entries["0.left"] and "not among" in entries["0.right"]
    assert isinstance(model.get_submodule("0.left"), BlockSparseLinear)


def test_merging_into_a_layer_with_removed_blocks_raises_and_changes_nothing() -> None:
    torch.manual_seed(0)
    wrapped = Wrapped(nn.Linear(WIDTH, WIDTH))
    swap_layers(nn.ModuleList([wrapped, nn.Linear(8, 8)]), 8, include=["0.inner"])
    layer: Any = wrapped.inner
    x = torch.randn(4, WIDTH)
    expected = wrapped(x)
    wrapped.merge()  # every block lives: all of it arrives
    assert torch.allclose(layer(x), expected, atol=1e-5 * float(expected.detach().abs().max()))
    layer.layout.update_(torch.eye(8, dtype=torch.bool))
    before = layer.weight.detach().clone()
    with pytest.raises(
        RuntimeError, match=r"Wrapped writes into removed blocks of layer 0.inner: .* then merge"
    ):
        wrapped.merge()
    assert torch.equal(layer.weight, before)

    def merge_from_outside(module: Any) -> None:
        module.inner.weight.data += module.right.weight.detach() @ module.left.weight.detach()

    with pytest.raises(RuntimeError, match="Wrapped writes into removed blocks"):
        merge_from_outside(wrapped)
    layer.weight.data += 1.0  # no adapter at work: dead blocks stay dead
    assert torch.equal(layer.weight != 0, before != 0)
