"""Whole neurons of plain layers leave a network that then computes what its silent twin computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynaprune.experiment.tasks.resnet import CifarResNet
from dynaprune.neurons.carry_out import carry_out
from dynaprune.neurons.cut_copy import cut_copy
from dynaprune.neurons.example_inputs import ExampleInputs
from dynaprune.neurons.groups import NeuronGroup, find_groups
from dynaprune.neurons.silence import silenced_outputs, silent_outputs
from dynaprune.neurons.silent_cut import find_silent_cut
from dynaprune.nn import BlockSparseLayer, swap_layers
from tests.neurons.cutting import Residual, mlp, with_norm
from tests.neurons.silent_twin import assert_same_bits, bits, cut_like_silent_twin, silent_twin
from tests.neurons.test_neuron_families import FAMILIES, transformers
from tests.neurons.test_neuron_patterns import CASES, SwiGLU


def lively(model: nn.Module) -> nn.Module:
    """Norms and biases that hide no mistake: nothing is 0 or 1."""
    for module in model.modules():
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensor = getattr(module, name, None)
            if isinstance(tensor, Tensor) and tensor.dim() == 1:
                tensor.data.uniform_(0.2, 1.2)
    return model.train()


def groups_of(model: nn.Module, example: Any) -> list[NeuronGroup]:
    return find_groups(model, ExampleInputs.of(example), plain=True).groups


def some(groups: list[NeuronGroup]) -> list[NeuronGroup]:
    """Of each layer every third group and the first, but never all."""
    found: list[NeuronGroup] = []
    for name in dict.fromkeys(group.name for group in groups):
        mine = [group for group in groups if group.name == name]
        found += mine[: len(mine) - 1 : 3]
    return found


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "relu": (lambda: mlp(16, 24, 17, 5), (9, 16)),
    "sigmoid": (lambda: mlp(16, 24, 17, 5, activation=nn.Sigmoid), (9, 16)),
    "gelu": (lambda: mlp(16, 24, 17, 5, activation=nn.GELU), (9, 16)),
    "batch norm": (lambda: with_norm(nn.BatchNorm1d), (9, 64)),
    "batch norm, not affine": (lambda: with_norm(lambda width: nn.BatchNorm1d(width, affine=False)), (9, 64)),
    "skip": (Residual, (9, 64)),
    "swiglu": (SwiGLU, (3, 5, 32)),
    **{name: CASES[name][:2] for name in ("slice", "squeezed", "shuffled", "grown", "windows")},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_cut_computes_what_the_silent_twin_computes(name: str) -> None:
    make, shape = NETWORKS[name]
    model, x = lively(make()), torch.randn(shape)
    groups = some(groups_of(model, x))
    assert groups
    report = cut_like_silent_twin(model, x, torch.randn(shape), groups)
    assert not report.refused and sum(report.neurons.values()) == sum(g.neurons.numel() for g in groups)


@pytest.mark.parametrize(
    "kind", ["LlamaForCausalLM", "BertForSequenceClassification", "ViTForImageClassification"]
)
def test_heads_and_feed_forward_neurons_of_transformers_go(kind: str) -> None:
    settings, inputs, expected = FAMILIES[kind]
    model = getattr(transformers, kind)
    model = lively(model(model.config_class(**settings)))
    example, fresh = inputs(), inputs()
    groups = groups_of(model, example)
    report = cut_like_silent_twin(model, example, fresh, some(groups))
    assert not report.refused
    assert all(any(name.endswith(end) for name in report.neurons) for end in expected)
    if kind == "LlamaForCausalLM":  # a key and value head goes with both its query heads
        attention = model.model.layers[0].self_attn
        widths = [getattr(attention, f"{each}_proj").out_features for each in "qkv"]
        assert [*widths, attention.o_proj.in_features] == [16, 8, 8, 16]


@pytest.mark.parametrize("channels_last", [False, True])
def test_residual_channels_go_as_coupled_groups(channels_last: bool) -> None:
    model = lively(CifarResNet((8, 12), (2, 2), classes=3)).double()
    model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    x, fresh = (torch.randint(0, 255, (4, 3, 8, 8)).to(torch.uint8) for _ in range(2))
    groups = groups_of(model, x)
    stream = [group for group in groups if len(group.producers) > 1]
    assert {len(group.producers) for group in stream} == {3}  # a shortcut or stem, and two blocks
    report = cut_like_silent_twin(model, x, fresh, some(groups))
    assert not report.refused
    weight = model.stages[0][0].conv1.weight  # type: ignore[index, union-attr]
    assert weight.shape == (5, 5, 3, 3)
    assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_silence_ends_bit_for_bit_also_after_an_error() -> None:
    model = lively(with_norm(nn.BatchNorm1d))
    layer: Any = model[0]
    with torch.no_grad():
        layer.weight[3, :4] = torch.tensor([-0.0, torch.nan, torch.inf, 1e-42])
    groups = groups_of(model, torch.randn(5, 64))[:7]
    before, versions = bits(model), [p._version for p in model.parameters()]
    outputs = silenced_outputs(model, groups)
    with pytest.raises(RuntimeError, match="in the trial"), silent_outputs(model, outputs):
        assert not layer.weight[:7].any() and not layer.bias[:7].any() and layer.weight[7:].all()
        norm: Any = model[1]
        assert not norm.weight[:7].any() and not norm.bias[:7].any() and not norm.running_mean[:7].any()
        raise RuntimeError("in the trial")
    assert_same_bits(model, before)
    assert [p._version for p in model.parameters()] == versions


def test_a_constant_that_cannot_move_keeps_the_neurons() -> None:
    without_bias = nn.Sequential(
        nn.Linear(8, 12), nn.Sigmoid(), nn.Linear(12, 6, bias=False), nn.ReLU(), nn.Linear(6, 3)
    )
    x = torch.randn(5, 8)
    groups = groups_of(without_bias, x)
    first, second = [g for g in groups if g.name == "0"], [g for g in groups if g.name == "2"]
    report = cut_like_silent_twin(without_bias, x, torch.randn(5, 8), [first[0], first[4], second[1]])
    assert report.neurons == {"2": 1}
    assert "has no bias to take up their constant" in report.refused["0"]
    padded = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Sigmoid(), nn.Conv2d(6, 4, 3, padding=1))
    x = torch.randn(2, 3, 9, 9)
    report = find_silent_cut(padded, groups_of(padded, x)[:2], ExampleInputs.of(x))
    assert report.plan is None and "pads its input with zeros" in report.refused["0"]


def test_code_that_knows_a_width_by_heart_keeps_its_neurons() -> None:
    class ByHeart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.free, self.fixed, self.head = nn.Linear(8, 12), nn.Linear(12, 10), nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.fixed(torch.relu(self.free(x))))
            if x.shape[-1] != 10:
                raise ValueError("expected ten")
            return self.head(x)

    model, x = ByHeart(), torch.randn(5, 8)
    groups = groups_of(model, x)
    report = cut_like_silent_twin(model, x, torch.randn(5, 8), some(groups))
    assert report.neurons == {"free": 4}
    assert "expected ten" in report.refused["fixed"]


def test_blocks_of_neurons_of_block_sparse_layers_go_too() -> None:
    model = mlp(16, 24, 32, 5)
    swap_layers(model, 8, include=["0", "2"])
    x = torch.randn(9, 16)
    groups = groups_of(model, x)
    assert {group.neurons.numel() for group in groups} == {8}
    layer: Any = model[2]
    assert isinstance(layer, BlockSparseLayer)
    before = bits(model)
    gone = [groups[0], groups[-1]]
    with silent_outputs(model, silenced_outputs(model, gone)):
        expected = model(x).detach()
        assert not model[0](x)[:, :8].any()  # also the bias
    assert_same_bits(model, before)
    report = find_silent_cut(model, gone, ExampleInputs.of(x))
    assert report.plan is not None and report.neurons == {"0": 8, "2": 8}
    carry_out(model, report.plan)
    torch.testing.assert_close(model(x), expected)
    assert layer.dense_shape() == (24, 16)


def test_copies_take_up_their_own_constants() -> None:
    """A copy's sigmoid of zero is the same, the weights that read it are not."""
    model, copy = (mlp(16, 24, 17, 5, activation=nn.Sigmoid) for _ in range(2))
    x = torch.randn(9, 16)
    groups = some(groups_of(model, x))
    report = find_silent_cut(model, groups, ExampleInputs.of(x))
    twin = silent_twin(copy, groups)
    assert report.plan is not None
    cut_copy(copy, report.plan, ExampleInputs.of(x), like=model)
    torch.testing.assert_close(copy(x), twin(x))
