"""The work of finding groups, and what is refused: by name, and nothing beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaprune.neurons.cut import cut_dead_neurons
from dynaprune.neurons.example_inputs import ExampleInputs
from dynaprune.neurons.groups import NeuronMap, find_groups
from dynaprune.nn import swap_layers
from tests.neurons.group_checks import cut_like_twin, silenced, unread
from tests.neurons.test_neuron_patterns import Grown, RotaryAttention

BLOCK = 8


def found(model: nn.Module, example: Any, **settings: Any) -> NeuronMap:
    swap_layers(model, BLOCK, **settings)
    return find_groups(model, ExampleInputs.of(example))


class Decoder(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Reused() for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Reused(nn.Module):
    """Attention under rotary embeddings and a feed-forward layer, on vectors."""

    def __init__(self) -> None:
        super().__init__()
        inner = RotaryAttention()
        self.q, self.k, self.v, self.o, self.up, self.down = (
            getattr(inner, name) for name in ("q", "k", "v", "o", "up", "down")
        )
        self.inner = [inner]

    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner[0]
        q, k, v = (m(x).view(*x.shape[:2], -1, 8).transpose(1, 2) for m in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(2, 1) for t in (inner.turned(k), v))
        mixed = F.scaled_dot_product_attention(inner.turned(q), k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


def test_work_grows_with_the_layers_and_not_with_the_batch() -> None:
    work = {
        (layers, batch): found(Decoder(layers), torch.randn(batch, 6, 32)).work
        for layers, batch in ((2, 2), (4, 2), (8, 2), (8, 64))
    }
    assert work[8, 64] == work[8, 2]
    assert work[8, 2] - work[4, 2] == 2 * (work[4, 2] - work[2, 2])
    activations = 8 * (2 * 6 * (2 * 64 + 4 * 32) + 2 * 8 * 36)
    assert work[8, 2] < 100 * activations


def test_slices_and_concatenations_in_a_circle_end() -> None:
    neuron_map = found(Grown(), torch.randn(3, 16))
    assert neuron_map.groups and neuron_map.work < 20_000


class Wrapped(nn.Module):
    """Two pairs of layers; ``between`` acts on what the first of the first pair makes."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = (
            nn.Linear(n, m) for n, m in ((16, 32), (32, 16), (16, 32), (32, 4))
        )
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.c(torch.relu(self.b(self.between(self.a(x)))))))


@torch.library.custom_op("dynaprune_tests::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    """An operation that nobody has a rule for."""
    return x.clone()


@pytest.mark.parametrize(
    ("name", "between", "reason"),
    [
        ("unknown", lambda x: opaque(x), "opaque cannot be followed"),
        ("sorted", lambda x: x.sort(-1).values, "sort mixes its channels"),
        ("summed", lambda x: x - x.mean(-1, keepdim=True), "mean mixes its channels"),
        ("softmax", lambda x: x.softmax(-1), "_softmax mixes its channels"),
        ("cumulative", lambda x: x.cumsum(-1), "cumsum mixes its channels"),
        ("scaled", lambda x: x * torch.arange(32.0), "a constant"),
        ("normalised", lambda x: F.layer_norm(x, (32,)), "it normalises over its channels"),
        ("matrix", lambda x: x @ torch.eye(32), "mm mixes its channels"),
        ("counted", lambda x: x * x.sum().item(), "sum mixes its channels"),
        ("fourier", lambda x: torch.fft.rfft(x).real.repeat(1, 2)[:, :32], "fft"),
        ("gathered", lambda x: x.gather(1, x.argsort(1)), ""),
    ],
)
def test_what_cannot_be_followed_costs_the_groups_that_touch_it(
    name: str, between: Callable[[Tensor], Tensor], reason: str
) -> None:
    x = torch.randn(5, 16)
    model = Wrapped(between)
    neuron_map = found(model, x, include=["a", "b", "c"])
    assert {group.name for group in neuron_map.groups} == {"b", "c"}
    assert reason in neuron_map.refused["a"]
    unread(model, neuron_map.of("b")[0])
    assert cut_like_twin(model, x, torch.randn(5, 16)).neurons == {"b": BLOCK}


def test_an_outer_product_ties_a_whole_layer_together() -> None:
    neuron_map = found(
        Wrapped(lambda x: (x.T @ x)[: x.shape[0]]), torch.randn(5, 16), include=["a", "b", "c"]
    )
    assert [len(group.neurons) for group in neuron_map.of("a")] == [32]


def test_refusals_name_the_module_and_the_operation() -> None:
    class Strange(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return opaque(x)

    neuron_map = found(Wrapped(Strange()), torch.randn(5, 16), include=["a", "b", "c"])
    assert "'between' (Strange) is in the way" in neuron_map.refused["a"]
    assert neuron_map.unknown == {"dynaprune_tests::opaque": "between"}


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x.reshape(x.shape[0], 4, -1).transpose(1, 2).flip(2).flip(2).transpose(1, 2).flatten(1),
        lambda x: torch.cat([part * 2 for part in x.split(x.shape[1] // 2, 1)], 1),
        lambda x: torch.stack([x, -x], 1).amax(1),
        lambda x: x.new_zeros(x.shape).copy_(x),
        lambda x: x.clone().add_(1).relu_(),
        lambda x: F.pad(x[:, None, None], (0, 0, 1, 1)).sum((1, 2)),
        lambda x: torch.einsum("bc,bc->bc", x, x),
        lambda x: torch.view_as_real(torch.complex(x, x)).sum(-1),
        lambda x: x[torch.arange(x.shape[0]).flip(0)],
        lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
        lambda x: x.unfold(0, 1, 1).squeeze(-1).contiguous(),
        lambda x: F.dropout(x, 0.5, training=False).type(torch.float64).float(),
        lambda x: torch.utils.checkpoint.checkpoint(torch.tanh, x, use_reentrant=False),
    ],
)
def test_detours_that_keep_channels_apart_are_followed(between: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(5, 16)
    model = Wrapped(between)
    neuron_map = found(model, x, include=["a", "b", "c"])
    assert "a" in {group.name for group in neuron_map.groups}, neuron_map.refused
    assert not neuron_map.unknown
    group = neuron_map.of("a")[0]
    unread(model, group)
    report = cut_like_twin(model, x, torch.randn(5, 16))
    assert report.neurons.get("a") == group.neurons.numel() or "does not run" in report.refused["a"]


def test_writes_into_views_are_seen() -> None:
    """The first half of the channels is overwritten by another layer's: its columns belong to that one."""

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.head = (
                nn.Linear(n, m) for n, m in ((16, 64), (16, 32), (64, 32), (32, 4))
            )

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).clone()
            other = self.b(x)
            y[:, : other.shape[1]] = other
            return self.head(torch.relu(self.c(torch.relu(y))))

    neuron_map = found(Written(), torch.randn(5, 16))
    columns = {g.name: {i for m in g.readers for i in m.index.tolist()} for g in neuron_map.of("b")}
    assert columns == {"b": set(range(24, 32))} or len(neuron_map.of("b")) == 4
    for group in neuron_map.of("b"):
        assert group.readers[0].index.tolist() == group.neurons.tolist()
    for group in neuron_map.of("a"):
        assert int(group.neurons.min()) >= 32


def test_a_head_of_training_mode_only_is_seen() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.middle, self.auxiliary = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(32, 16)
            self.after, self.head = nn.Linear(16, 4), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Any:
            x = F.relu(self.trunk(x))
            y = self.head(F.relu(self.middle(x)))
            if not self.training:
                return y
            return y, self.after(F.relu(self.auxiliary(F.dropout(x, 0.5))))

    model, x = Auxiliary().train(), torch.randn(5, 16)
    neuron_map = found(model, x, include=["trunk", "middle", "auxiliary"])
    group = neuron_map.of("trunk")[0]
    assert {m.name for m in group.readers} == {"middle", "auxiliary"}
    unread(model, group)
    example = ExampleInputs.of(x)
    assert cut_dead_neurons(model, neuron_map, example).neurons == {"trunk": BLOCK}
    assert [t.shape for t in model(x)] == [(5, 4), (5, 4)]


def test_a_width_that_training_mode_knows_by_heart_is_not_cut() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(16, 32), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(x))
            return self.head(x.view(-1, 32) if self.training else x)

    model, x = Counts().train(), torch.randn(5, 16)
    silenced(model, found(model, x).of("a")[0])
    report = cut_like_twin(model, x, torch.randn(5, 16))
    assert report.neurons == {} and "does not run" in report.refused["a"]


def test_a_constant_that_data_masks_is_none() -> None:
    """In the example every position counts; in the next batch some do not, and the constant is 0 there."""

    class Masks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.head(F.relu(self.b(torch.sigmoid(self.a(x)) * mask[..., None])).sum(1))

    model = Masks()
    example, fresh = (torch.randn(2, 3, 16), torch.ones(2, 3)), (torch.randn(2, 3, 16), torch.eye(3)[:2])
    neuron_map = found(model, example, include=["a", "b"])
    group = neuron_map.of("a")[0]
    assert group.scaled
    silenced(model, group)
    report = cut_like_twin(model, example, fresh)
    assert report.neurons == {} and "data scales or masks" in report.refused["a"]
    unread(model, group)
    assert cut_like_twin(model, example, fresh).neurons == {"a": BLOCK}


def test_a_mistake_behind_a_tiny_scale_is_noticed() -> None:
    """A width read by heart shifts channels inside a branch that barely reaches the outputs."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            hidden = F.relu(self.a(x))
            return self.head(x + 1e-9 * self.b(hidden * (hidden.shape[1] / 32)))

    model, x = Branch(), torch.randn(5, 16)
    unread(model, found(model, x, include=["a", "b"]).of("a")[0])
    report = cut_like_twin(model, x, torch.randn(5, 16))
    assert report.neurons == {} and "outputs of 'b' move" in report.refused["a"]


def test_weights_that_others_read_keep_their_layer() -> None:
    class Peeks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.a(x.to(self.a.weight.dtype)))
            return self.head(F.relu(F.linear(y, self.b.weight, self.b.bias)) + self.b(y))

    neuron_map = found(Peeks(), torch.randn(5, 16), include=["a", "b"])
    assert not neuron_map.groups
    assert "the weights of 'b' are read outside its forward pass" in neuron_map.refused["b"]


def test_a_forward_that_was_replaced_on_the_instance_is_left_alone() -> None:
    model, x = Wrapped(torch.relu), torch.randn(5, 16)
    swap_layers(model, BLOCK, include=["a", "b", "c"])
    plain = model.a.forward
    model.a.forward = lambda x: plain(x) * 2  # type: ignore[method-assign]
    neuron_map = find_groups(model, ExampleInputs.of(x))
    assert {group.name for group in neuron_map.groups} == {"b", "c"}
    assert "replaced on the instance" in neuron_map.refused["a"]
    assert model.a.forward is not plain


def test_experts_in_a_list_lose_their_own_neurons() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.head = nn.Linear(16, 4), nn.Linear(16, 4)
            self.up = nn.ModuleList(nn.Linear(16, 32) for _ in range(4))
            self.down = nn.ModuleList(nn.Linear(32, 16) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            weight, chosen = self.router(x).softmax(-1).topk(2)
            out = torch.zeros_like(x)
            for number, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
                row, place = (chosen == number).nonzero(as_tuple=True)
                out.index_add_(0, row, down(F.silu(up(x[row]))) * weight[row, place, None])
            return self.head(out)

    model, x = Experts(), torch.randn(40, 16)
    neuron_map = found(model, x, include=["up", "down"])
    assert {group.name for group in neuron_map.groups} == {f"up.{i}" for i in range(4)}
    for i in range(4):
        unread(model, neuron_map.of(f"up.{i}")[i])
    report = cut_like_twin(model, x, torch.randn(40, 16))
    assert report.neurons == {f"up.{i}": BLOCK for i in range(4)}


def test_outputs_in_dictionaries_and_keywords_and_dataclasses() -> None:
    from dataclasses import dataclass

    @dataclass
    class Output:
        logits: Tensor
        hidden: Tensor | None = None

    class Named(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 4)
            self.kind = kind

        def forward(self, *, x: Tensor, keep: bool = False) -> Any:
            hidden = self.b(F.relu(self.a(x)))
            logits = self.head(F.relu(hidden))
            return (
                Output(logits, hidden) if self.kind == "dataclass" else {"logits": logits, "list": [hidden]}
            )

    for kind in ("dataclass", "dictionary"):
        neuron_map = found(Named(kind), {"x": torch.randn(5, 16), "keep": True}, include=["a", "b"])
        assert {g.name for g in neuron_map.groups} == {"a"}
        assert neuron_map.refused["b"] == "its outputs are outputs of the model"


def test_readers_name_their_columns_dense_ones_too() -> None:
    neuron_map = found(Wrapped(torch.relu), torch.randn(5, 16), include=["a", "b"])
    group = neuron_map.of("b")[1]
    assert [(m.name, m.index.tolist()) for m in group.readers] == [("c", list(range(8, 16)))]
