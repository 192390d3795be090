"""Groups of neurons in what networks are built of: found, cut, and the outputs stay on fresh inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaprune.neurons.example_inputs import ExampleInputs
from dynaprune.neurons.groups import find_groups
from dynaprune.nn import swap_layers
from tests.neurons.group_checks import cut_like_twin, silenced, sparse_readers, unread

BLOCK = 8


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(32)
        self.gate, self.up, self.down = (
            nn.Linear(a, b, bias=False) for a, b in ((32, 48), (32, 48), (48, 32))
        )
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(F.silu(self.gate(self.norm(x))) * self.up(self.norm(x)))
        return self.head(x)


class FusedGate(nn.Module):
    """One projection whose halves are value and gate, taken by ``how``."""

    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fused, self.down, self.head = nn.Linear(32, 96), nn.Linear(48, 32), nn.Linear(32, 4)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.down(self.how(self.fused(x)))))


def chunked(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def viewed(x: Tensor) -> Tensor:
    value, gate = x.view(*x.shape[:-1], 2, -1).unbind(-2)
    return value * torch.sigmoid(gate)


def interleaved(x: Tensor) -> Tensor:
    return x[..., ::2] * torch.tanh(x[..., 1::2])


def half_sliced(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x[..., :half] * F.silu(x[..., half:])


class RotaryAttention(nn.Module):
    """Grouped queries under rotary embeddings, as in Llama; ``-1`` for the number of heads."""

    def __init__(self, heads: int = 4, pairs: int = 2) -> None:
        super().__init__()
        self.size, self.repeats = 8, heads // pairs
        self.embed = nn.Embedding(20, 32)
        self.q, self.o = nn.Linear(32, heads * 8, bias=False), nn.Linear(heads * 8, 32, bias=False)
        self.k, self.v = (nn.Linear(32, pairs * 8, bias=False) for _ in range(2))
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 4)

    def turned(self, x: Tensor) -> Tensor:
        position = torch.arange(x.shape[2]).float()
        angle = position[:, None] / 100 ** (torch.arange(self.size // 2) / self.size)
        angle = torch.cat([angle, angle], -1)
        half = torch.cat([-x[..., self.size // 2 :], x[..., : self.size // 2]], -1)
        return x * angle.cos() + half * angle.sin()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = (m(x).view(*x.shape[:2], -1, self.size).transpose(1, 2) for m in (self.q, self.k, self.v))
        q, k = self.turned(q), self.turned(k)
        k, v = (
            t[:, :, None].expand(-1, -1, self.repeats, -1, -1).reshape(t.shape[0], -1, *t.shape[2:])
            for t in (k, v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(*x.shape[:2], -1))
        return self.head(x + self.down(F.gelu(self.up(x))))


class Windows(nn.Module):
    """Swin's way: roll, partition into windows, a feed-forward inside, back again."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 32, 4, 4), nn.LayerNorm(32)
        self.up, self.down, self.merge, self.head = (
            nn.Linear(a, b) for a, b in ((32, 64), (64, 32), (128, 48), (48, 4))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        y = torch.roll(self.norm(x), (-1, -1), (1, 2)).view(b, h // 2, 2, w // 2, 2, c)
        y = y.permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        y = self.down(F.gelu(self.up(y))).view(b, h // 2, w // 2, 2, 2, c)
        x = x + torch.roll(y.permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c), (1, 1), (1, 2))
        quarters = [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        return self.head(F.relu(self.merge(torch.cat(quarters, -1))).mean((1, 2)))


class Squeezed(nn.Module):
    """An inverted bottleneck: expand, depthwise, squeeze and excite, project."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.expand, self.norm1 = nn.Conv2d(16, 48, 1, bias=False), nn.BatchNorm2d(48)
        self.depth, self.norm2 = nn.Conv2d(48, 48, 3, padding=1, groups=48), nn.BatchNorm2d(48)
        self.squeeze, self.excite = nn.Conv2d(48, 16, 1), nn.Conv2d(16, 48, 1)
        self.project, self.head = nn.Conv2d(48, 16, 1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.hardswish(self.norm2(self.depth(F.relu6(self.norm1(self.expand(x))))))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        return self.head(F.adaptive_max_pool2d(x + self.project(y), 1).flatten(1))


class Shuffled(nn.Module):
    """Sub-pixel upsampling, then max pooling to a grid that is flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.back = (
            nn.Conv2d(3, 16, 3, padding=1),
            nn.Conv2d(16, 64, 3),
            nn.Conv2d(16, 16, 3),
        )
        self.flat, self.head = nn.Linear(16 * 4, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pixel_shuffle(F.relu(self.wide(F.relu(self.stem(x)))), 2)
        x = F.adaptive_avg_pool2d(F.relu(self.back(x)), 2)
        return self.head(F.relu(self.flat(torch.flatten(x, 1))))


class Grown(nn.Module):
    """A dense block: what is concatenated is sliced and concatenated again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(16, 32)
        self.steps = nn.ModuleList(nn.Linear(32 + 16 * i, 16) for i in range(6))
        self.head = nn.Linear(128, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for step in self.steps:
            x = torch.cat([x, F.relu(step(x))], -1)
            half = x.shape[-1] // 2
            x = torch.cat([x[..., half:], x[..., :half]], -1)
            x = torch.cat([x[..., x.shape[-1] - half :], x[..., : x.shape[-1] - half]], -1)
        return self.head(x)


class Auxiliary(nn.Module):
    """A head that only training mode uses reads the trunk as well."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.middle, self.auxiliary = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(32, 16)
        self.after, self.head = nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = F.relu(self.trunk(x))
        y = self.head(F.relu(self.middle(x)))
        return (
            (y, self.after(F.relu(self.auxiliary(F.dropout(x, 0.5, self.training))))) if self.training else y
        )


IMAGE, TEXT, ROWS = (2, 3, 16, 16), (2, 7), (3, 5, 32)

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, set[str]]]] = {
    # the network, the shape of its input, and of each group's layer all layers that the group touches
    "swiglu": (SwiGLU, ROWS, {"gate": {"gate", "up", "down"}}),
    "chunk": (lambda: FusedGate(chunked), ROWS, {"fused": {"fused", "down"}, "down": {"down", "head"}}),
    "view": (lambda: FusedGate(viewed), ROWS, {"fused": {"fused", "down"}, "down": {"down", "head"}}),
    "slice": (lambda: FusedGate(half_sliced), ROWS, {"fused": {"fused", "down"}, "down": {"down", "head"}}),
    "interleaved": (
        lambda: FusedGate(interleaved),
        ROWS,
        {"fused": {"fused", "down"}, "down": {"down", "head"}},
    ),
    "rotary": (RotaryAttention, TEXT, {"v": {"q", "k", "v", "o"}, "up": {"up", "down"}}),
    "windows": (Windows, IMAGE, {"up": {"up", "down"}, "merge": {"merge", "head"}}),
    "squeezed": (
        Squeezed,
        IMAGE,
        {
            "expand": {"expand", "norm1", "depth", "norm2", "squeeze", "excite", "project"},
            "squeeze": {"squeeze", "excite"},
            "stem": {"stem", "expand", "project", "head"},
        },
    ),
    "shuffled": (
        Shuffled,
        IMAGE,
        {
            "stem": {"stem", "wide"},
            "wide": {"wide", "back"},
            "back": {"back", "flat"},
            "flat": {"flat", "head"},
        },
    ),
    "grown": (
        Grown,
        (3, 16),
        {
            "stem": {"stem", "head", *(f"steps.{i}" for i in range(6))},
            **{f"steps.{i}": {"head", *(f"steps.{j}" for j in range(i, 6))} for i in range(6)},
        },
    ),
}


def inputs(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(0, 20, shape) if shape == TEXT else torch.randn(shape)


def sparse(name: str) -> nn.Module:
    """The network of that name, with block-sparse layers wherever a group touches one but a depthwise."""
    torch.manual_seed(0)
    build, _, expected = CASES[name]
    model = build()
    touched = {layer for layers in expected.values() for layer in layers}
    include = [
        each
        for each, module in model.named_modules()
        if each in touched and type(module) in (nn.Linear, nn.Conv2d) and each not in ("depth", "head")
    ]
    swap_layers(model, BLOCK, include=include or None)
    return model


@pytest.mark.parametrize("name", CASES)
def test_groups_are_found_and_cut_and_the_outputs_stay(name: str) -> None:
    _, shape, expected = CASES[name]
    example = inputs(shape)
    found = find_groups(sparse(name), ExampleInputs.of(example))
    assert not found.unknown
    touched = {group.name: {member.name for member in group.members} for group in found.groups}
    assert touched == expected, found.refused
    for layer in expected:
        for how in (unread, silenced):
            model = sparse(name)
            group = find_groups(model, ExampleInputs.of(example)).of(layer)[-1]
            if how is unread and not sparse_readers(model, group):
                continue
            how(model, group)
            report = cut_like_twin(model, example, inputs(shape))
            if how is unread:
                assert report.neurons == {layer: group.neurons.numel()}, report.refused
            model(example).sum().backward()
