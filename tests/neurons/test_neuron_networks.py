"""Cutting neurons out of networks with norms, convolutions, skips, concatenations and attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaprune.neurons.cut import cut_dead_neurons
from dynaprune.neurons.example_inputs import ExampleInputs
from dynaprune.neurons.groups import find_groups
from dynaprune.nn import swap_layers
from tests.neurons.cutting import BLOCK, Residual, batch, cut, kill, outputs, rounding, train, with_norm


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
