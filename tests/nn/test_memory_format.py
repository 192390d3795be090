"""Outputs and gradients of convolutions have the strides that PyTorch's own layers give them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dynaprune
from dynaprune.experiment.tasks.resnet import CifarResNet
from dynaprune.nn import BlockSparseConv1d, BlockSparseConv2d, swap_layers
from dynaprune.nn.block_sparse import take_over_weight
from dynaprune_kernels import BlockLayout
from tests.kernels.strides import strides_that_count

FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
LAYERS: dict[str, Any] = {
    "3x3": lambda: nn.Conv2d(16, 24, 3, padding=1),
    "1x1": lambda: nn.Conv2d(16, 24, 1),
    "strided": lambda: nn.Conv2d(16, 24, 3, 2, padding=1),
    "groups": lambda: nn.Conv2d(16, 32, 3, padding=1, groups=2),
    "reflected": lambda: nn.Conv2d(16, 24, 3, padding=1, padding_mode="reflect"),
    "one input": lambda: nn.Conv2d(1, 16, 3, padding=1),
}
SIZES = {"image": (3, 5, 7), "one image": (1, 6, 6), "one pixel": (4, 1, 1), "one row": (2, 1, 8)}


def gradient_and_output(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    seen: list[Tensor] = []
    leaf = x.detach().requires_grad_()
    # The gradient as the layer hands it on: a leaf would keep its own strides.
    passed = leaf.view_as(leaf)
    passed.register_hook(seen.append)
    y = layer(passed)
    y.backward(torch.ones_like(y))
    return seen[0], y.detach()


@pytest.mark.parametrize("backend", ["cpu", "dense"])
@pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
@pytest.mark.parametrize("of_weight", FORMATS.values(), ids=list(FORMATS))
@pytest.mark.parametrize("of_input", FORMATS.values(), ids=list(FORMATS))
@pytest.mark.parametrize("make", LAYERS.values(), ids=list(LAYERS))
def test_strides_are_those_of_the_dense_layer(
    make: Any,
    of_input: Any,
    of_weight: Any,
    size: tuple[int, ...],
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DYNAPRUNE_BACKEND", backend)
    dense = make().double().to(memory_format=of_weight)
    if dense.padding_mode == "reflect" and min(size[1:]) < 2:
        pytest.skip("a reflection needs two pixels")
    sparse = BlockSparseConv2d.from_dense(copy.deepcopy(dense), 8)
    images, height, width = size
    x = torch.randn(images, dense.in_channels, height, width).double().to(memory_format=of_input)
    (dx, y), (found_dx, found) = gradient_and_output(dense, x), gradient_and_output(sparse, x)
    assert strides_that_count(found) == strides_that_count(y)
    assert strides_that_count(found_dx) == strides_that_count(dx)
    torch.testing.assert_close(found, y)
    torch.testing.assert_close(found_dx, dx)


@pytest.mark.parametrize("of_model", FORMATS.values(), ids=list(FORMATS))
def test_the_format_of_the_model_can_change_after_the_swap(of_model: Any) -> None:
    dense = nn.Conv2d(16, 24, 3)
    sparse = BlockSparseConv2d.from_dense(copy.deepcopy(dense), 8)
    dense.to(memory_format=of_model)
    sparse.to(memory_format=of_model)
    x = torch.randn(2, 16, 6, 6)
    assert strides_that_count(sparse(x)) == strides_that_count(dense(x))
    plain = sparse.to_dense()
    assert strides_that_count(plain.weight) == strides_that_count(dense.weight)
    assert strides_that_count(plain(x)) == strides_that_count(dense(x))


@pytest.mark.parametrize("of_weight", FORMATS.values(), ids=list(FORMATS))
def test_a_layer_changed_by_hand_keeps_the_format_of_its_weight(of_weight: Any) -> None:
    dense = nn.Conv2d(16, 24, 3).double().to(memory_format=of_weight)
    sparse = copy.deepcopy(dense)
    geometry, _ = BlockSparseConv2d.settings_of(sparse)
    layout = BlockLayout(24, 16, 8, conv=geometry)
    BlockSparseConv2d.in_place_of(sparse, layout)
    take_over_weight(sparse.values, layout)
    x = torch.randn(2, 16, 6, 6).double()
    assert strides_that_count(sparse.weight) == strides_that_count(dense.weight)
    assert strides_that_count(sparse(x)) == strides_that_count(dense(x))
    torch.testing.assert_close(sparse(x), dense(x))


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(16, 24, 3), lambda: nn.Conv1d(16, 24, 3)])
def test_a_weight_that_is_in_blocks_too_early_is_refused(make: Any) -> None:
    conv = make()
    type_: Any = BlockSparseConv2d if isinstance(conv, nn.Conv2d) else BlockSparseConv1d
    geometry, _ = type_.settings_of(conv)
    layout = BlockLayout(24, 16, 8, conv=geometry)
    take_over_weight(conv.weight, layout)
    with pytest.raises(ValueError, match=r"the dense weight of shape \(24, 16, 3.*after in_place_of"):
        type_.in_place_of(conv, layout)
    assert type(conv) in (nn.Conv1d, nn.Conv2d)


def test_unbatched_and_one_dimensional_inputs() -> None:
    dense = nn.Conv2d(16, 24, 3)
    sparse = BlockSparseConv2d.from_dense(copy.deepcopy(dense), 8)
    x = torch.randn(16, 6, 6)
    assert strides_that_count(sparse(x)) == strides_that_count(dense(x))
    line = nn.Conv1d(16, 24, 3)
    sparse_line = BlockSparseConv1d.from_dense(copy.deepcopy(line), 8)
    for x in (torch.randn(3, 16, 9), torch.randn(3, 9, 16).transpose(1, 2)):
        assert strides_that_count(sparse_line(x)) == strides_that_count(line(x))


class LeNet(nn.Module):
    """Flattens by ``view`` after a convolution, in the forward pass and on what a hook sees."""

    def __init__(self, flatten: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.classifier = nn.Linear(32 * 2 * 2, 10)
        self.flatten = flatten

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        x = F.max_pool2d(F.relu(self.second(x)), 2)
        return self.classifier(self.flatten(x))


@pytest.mark.parametrize(
    "flatten",
    [
        lambda x: x.view(x.size(0), -1),
        lambda x: x.view(-1, 32 * 2 * 2),
        lambda x: torch.flatten(x, 1),
        lambda x: x.as_strided((x.size(0), 128), (128, 1)),
        lambda x: x.reshape(x.size(0), -1).view(x.size(0), -1),
    ],
)
def test_a_view_after_a_convolution(flatten: Any) -> None:
    torch.manual_seed(0)
    model = LeNet(flatten).double()
    x = torch.randn(4, 1, 8, 8).double()
    before = model(x)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    config = dynaprune.PruningConfig(target_sparsity=0.5, block_size=8, total_steps=100, include=["second"])
    dynaprune.attach(model, optimizer, config)
    after = model(x)
    torch.testing.assert_close(after, before)
    after.sum().backward()
    optimizer.step()


@pytest.mark.parametrize("of_input", FORMATS.values(), ids=list(FORMATS))
def test_a_residual_network_compiles_in_either_format(of_input: Any) -> None:
    model = CifarResNet((16, 32), (1, 1)).double()
    x = torch.randn(2, 3, 16, 16).double().to(memory_format=of_input)
    swap_layers(model, 8)
    model.eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
