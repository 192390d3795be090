"""Block-sparse layers against the dense layers that they stand in for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from dynaprune.nn import BlockSparseConv1d, BlockSparseConv2d, BlockSparseLayer, BlockSparseLinear
from dynaprune.nn.parameter import replace_parameter_data_
from dynaprune_kernels import (
    BlockLayout,
    block_saliency,
    block_sparse_conv2d,
    block_sparse_linear,
)
from tests.rounding import agree

SPARSE: dict[type[nn.Module], Any] = {
    nn.Linear: BlockSparseLinear,
    nn.Conv2d: BlockSparseConv2d,
    nn.Conv1d: BlockSparseConv1d,
}
LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(24, 16), (5, 24)),
    "linear, ragged, three dims": (lambda: nn.Linear(21, 19), (2, 3, 21)),
    "linear, no bias, one dim": (lambda: nn.Linear(16, 16, bias=False), (16,)),
    "conv2d": (lambda: nn.Conv2d(16, 24, 3, padding=1), (2, 16, 6, 5)),
    "conv2d, stride, dilation": (
        lambda: nn.Conv2d(9, 17, (3, 2), stride=(2, 1), padding=(2, 1), dilation=2, bias=False),
        (2, 9, 8, 7),
    ),
    "conv2d, groups": (lambda: nn.Conv2d(20, 32, 3, groups=2), (2, 20, 6, 6)),
    "conv2d, same": (lambda: nn.Conv2d(8, 8, (4, 3), padding="same", dilation=(1, 2)), (1, 8, 7, 6)),
    "conv2d, valid": (lambda: nn.Conv2d(8, 8, 3, padding="valid"), (1, 8, 7, 6)),
    "conv2d, reflect": (lambda: nn.Conv2d(8, 8, 3, padding=(1, 2), padding_mode="reflect"), (2, 8, 6, 6)),
    "conv2d, circular": (lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), (2, 8, 6, 6)),
    "conv2d, unbatched": (lambda: nn.Conv2d(8, 8, 3), (8, 6, 6)),
    "conv1d": (lambda: nn.Conv1d(16, 24, 5, stride=2, padding=2), (3, 16, 11)),
    "conv1d, same, groups": (lambda: nn.Conv1d(16, 16, 4, padding="same", groups=2), (3, 16, 11)),
    "conv1d, replicate": (lambda: nn.Conv1d(8, 8, 3, padding=1, padding_mode="replicate"), (8, 9)),
}


def _pair(name: str) -> tuple[Any, Any, Tensor]:
    """A dense layer in float64, its block-sparse twin, and an input."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    dense = make().double()
    sparse = SPARSE[type(dense)].from_dense(copy.deepcopy(dense), 8)
    return dense, sparse, torch.randn(shape, dtype=torch.float64)


def _masked(dense: Any, sparse: Any, mask: Tensor) -> None:
    """Let only ``mask`` live in both."""
    sparse.layout.update_(mask)
    with torch.no_grad():
        dense.weight.copy_(sparse.weight)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("density", [1.0, 0.5, 0.0])
def test_output_and_gradients_are_those_of_the_dense_layer(name: str, density: float) -> None:
    dense, sparse, x = _pair(name)
    mask = torch.rand(sparse.layout.rows, sparse.layout.columns) < density
    _masked(dense, sparse, mask)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(leaf) for layer, leaf in zip((dense, sparse), inputs, strict=True)]
    torch.testing.assert_close(outputs[1], outputs[0])
    dy = torch.randn_like(outputs[0])
    for y in outputs:
        y.backward(dy)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    live = sparse.to_dense_shape(torch.ones_like(sparse.values))
    torch.testing.assert_close(sparse.to_dense_shape(sparse.values.grad), dense.weight.grad * live)
    if dense.bias is not None:
        torch.testing.assert_close(sparse.bias.grad, dense.bias.grad)
    assert sparse.live_values() == int(live.sum())
    assert sparse.density() == pytest.approx(float(mask.double().mean()))


@pytest.mark.parametrize("name", LAYERS)
def test_to_blocks_and_back_loses_nothing_and_keeps_the_parameters(name: str) -> None:
    make, shape = LAYERS[name]
    dense = make().eval()
    x = torch.randn(shape)
    expected = dense(x).detach()
    dense(x).square().sum().backward()
    weight, bias = dense.weight, dense.bias
    before = weight.detach().clone(), weight.grad.clone(), dense.extra_repr()
    sparse = SPARSE[type(dense)].from_dense(dense, (8, 16) if "groups" not in name else 8)
    assert sparse.values is weight and sparse.bias is bias and not sparse.training
    assert weight.dim() == 3 and weight.grad.shape == weight.shape
    back = sparse.to_dense()
    assert type(back) is type(dense) and back.weight is weight and back.bias is bias and not back.training
    assert torch.equal(back.weight, before[0]) and torch.equal(back.weight.grad, before[1])
    assert back.extra_repr() == before[2]
    assert agree(back(x), expected)


def test_a_mask_given_at_the_swap_leaves_the_dead_blocks_out() -> None:
    mask = torch.rand(3, 4) < 0.5
    dense = nn.Linear(32, 24)
    sparse = BlockSparseLinear.from_dense(copy.deepcopy(dense), 8, mask=mask)
    assert sparse.layout.capacity == int(mask.sum())
    spread = mask.repeat_interleave(8, 0).repeat_interleave(8, 1)
    assert torch.equal(sparse.weight, dense.weight * spread)


def test_optimizers_and_held_graphs_survive_a_swap_and_a_change_of_capacity() -> None:
    layer = nn.Linear(32, 32)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    held = layer(torch.randn(4, 32)).sum()
    held.backward()
    sparse = BlockSparseLinear.from_dense(layer, 8)
    for capacity in (16, 9):
        if capacity < 16:
            sparse.layout.update_(torch.arange(16).view(4, 4) < 9)
            slots = sparse.layout.compact_(capacity)
            replace_parameter_data_(sparse.values, sparse.values.detach()[slots])
        optimizer.zero_grad()
        before = sparse.weight.detach().clone()
        held = sparse(torch.randn(4, 32)).square().sum()
        held.backward()
        assert sparse.values.grad.shape == (capacity, 8, 8)
        optimizer.step()
        assert not torch.equal(sparse.weight, before)
    assert optimizer.param_groups[0]["params"][0] is sparse.values


def test_a_layer_used_twice_sums_gradients_and_taps() -> None:
    dense, sparse, _ = _pair("linear, no bias, one dim")
    x = torch.randn(3, 16, dtype=torch.float64)
    tap = sparse.enable_tap_()
    for layer in (dense, sparse):
        layer(layer(x).tanh()).square().sum().backward()
    product = dense.weight * dense.weight.grad
    torch.testing.assert_close(sparse.to_dense_shape(sparse.values.grad), dense.weight.grad)
    expected = torch.stack([product[:8, :8], product[:8, 8:], product[8:, :8], product[8:, 8:]]).sum((1, 2))
    torch.testing.assert_close(tap.grad[0], expected)
    assert not tap.grad[1].any()
    sparse.disable_tap_()
    assert sparse.tap is None


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv1d"])
def test_the_probe_measures_the_dense_gradient_of_dead_blocks_only(name: str) -> None:
    dense, sparse, x = _pair(name)
    mask = torch.rand(sparse.layout.rows, sparse.layout.columns) < 0.5
    _masked(dense, sparse, mask)
    tap = sparse.enable_tap_()
    sparse.probe.fill_(True)
    for layer in (dense, sparse):
        layer(x).square().sum().backward()
    norms = sparse.to_blocks(dense.weight.grad).square().sum((1, 2))
    torch.testing.assert_close(tap.grad[1], norms.masked_fill(mask.flatten(), 0))
    sparse.probe.fill_(False)
    tap.grad = None
    sparse(x).square().sum().backward()
    assert not tap.grad[1].any()


def test_saliency_of_a_neuron_is_its_activation_times_gradient() -> None:
    layer = BlockSparseLinear.from_dense(nn.Linear(20, 12, dtype=torch.float64), 8)
    z = layer(torch.randn(6, 20, dtype=torch.float64))
    z.retain_grad()
    z.square().sum().sqrt().backward()
    saliency = block_saliency(layer.values, layer.values.grad, layer.layout)
    expected = ((z - layer.bias) * z.grad).sum(0).detach()
    torch.testing.assert_close(saliency.neuron_weight_grad, expected)


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv1d"])
def test_autocast_computes_in_bfloat16_and_gradients_reach_float32_values(name: str) -> None:
    _, sparse, x = _pair(name)
    sparse, x = sparse.float(), x.float().requires_grad_()
    tap = sparse.enable_tap_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sparse(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert sparse.values.grad.dtype == sparse.bias.grad.dtype == x.grad.dtype == torch.float32
    assert tap.grad.dtype == torch.float32
    expected = sparse.bfloat16()(x.bfloat16())
    assert torch.equal(y, expected)
    with torch.autocast("cpu", enabled=False):
        assert sparse.float()(x).dtype == torch.float32


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv1d"])
def test_a_copy_is_independent(name: str) -> None:
    _, sparse, x = _pair(name)
    sparse.enable_tap_()
    sparse(x).sum().backward()
    before = sparse(x).detach()
    twin = copy.deepcopy(sparse)
    assert agree(twin(x), before)
    twin.layout.update_(torch.zeros_like(twin.layout.mask))
    with torch.no_grad():
        twin.values.add_(1)
    assert agree(sparse(x), before) and not agree(twin(x), before)
    assert twin.tap is not sparse.tap


@pytest.mark.parametrize("name", ["linear", "conv2d, groups", "conv1d"])
@pytest.mark.parametrize("grows", [False, True], ids=["smaller", "larger"])
def test_a_state_dict_of_another_structure_resizes_the_layer(name: str, grows: bool) -> None:
    _, sparse, x = _pair(name)
    full = copy.deepcopy(sparse)
    layout = sparse.layout
    mask = torch.rand(layout.rows, layout.columns) < 0.5
    layout.update_(mask)
    slots = layout.compact_(max(int(mask.sum()), 1))
    replace_parameter_data_(sparse.values, sparse.values.detach()[slots.clamp(min=0)])
    source, target = (full, sparse) if grows else (sparse, full)
    parameter = target.values
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    assert target.values is parameter
    assert agree(target(x), source(x))
    assert target.layout.capacity == source.layout.capacity
    assert torch.equal(target.layout.index, source.layout.index)
    target(x).sum().backward()
    assert target.values.grad.shape == target.values.shape


def test_a_state_dict_of_another_block_size_is_refused() -> None:
    small, large = (BlockSparseLinear.from_dense(nn.Linear(32, 32), size) for size in (8, 16))
    with pytest.raises(ValueError, match=r"\(slots, 8, 8\), got \(4, 16, 16\).*another block size"):
        small.load_state_dict(large.state_dict())


def test_repr_says_what_lives() -> None:
    layer = BlockSparseLinear.from_dense(nn.Linear(32, 16, bias=False), (8, 16))
    layer.layout.update_(torch.tensor([[True, False], [True, True]]))
    assert repr(layer).startswith(
        "BlockSparseLinear(\n  in_features=32, out_features=16, bias=False, block=(8, 16), density=0.750"
    )
    conv = BlockSparseConv2d.from_dense(nn.Conv2d(8, 16, 3, stride=2, groups=2), 8)
    assert (
        "8, 16, kernel_size=(3, 3), stride=(2, 2), padding=(0, 0), dilation=(1, 1), groups=2, "
        "block=(8, 8), density=1.000" in repr(conv)
    )


def _linear_layer() -> BlockSparseLinear:
    return BlockSparseLinear.from_dense(nn.Linear(24, 16), 8)


LAYOUT = BlockLayout(16, 24, (8, 8))
CONV = BlockSparseConv2d.from_dense(nn.Conv2d(8, 8, 3), 8)
VALUES = torch.zeros(6, 8, 8)
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "inputs": (lambda: _linear_layer()(torch.randn(2, 23)), ValueError, r"24 input features.*\(2, 23\)"),
    "no dims": (lambda: _linear_layer()(torch.tensor(1.0)), ValueError, r"24 input features.*\(\)"),
    "dtype": (
        lambda: _linear_layer()(torch.randn(2, 24).double()),
        TypeError,
        "one floating dtype, got torch.float64 and torch.float32",
    ),
    "ints": (lambda: _linear_layer()(torch.ones(2, 24).long()), TypeError, "got torch.int64 and"),
    "device": (
        lambda: _linear_layer()(torch.randn(2, 24, device="meta")),
        ValueError,
        "on one device, got meta, cpu, cpu",
    ),
    "values": (
        lambda: block_sparse_linear(torch.randn(2, 24), VALUES[:5], None, LAYOUT),
        ValueError,
        r"values of shape \(6, 8, 8\), got \(5, 8, 8\)",
    ),
    "bias": (
        lambda: block_sparse_linear(torch.randn(2, 24), VALUES, torch.zeros(15), LAYOUT),
        ValueError,
        r"bias of shape \(16,\), got torch.float32 \(15,\)",
    ),
    "no layout": (
        lambda: block_sparse_linear(torch.randn(2, 24), VALUES, None, None),  # type: ignore[arg-type]
        TypeError,
        "a BlockLayout, got NoneType",
    ),
    "channels": (lambda: CONV(torch.randn(1, 7, 5, 5)), ValueError, r"8 input features.*\(1, 7, 5, 5\)"),
    "small image": (lambda: CONV(torch.randn(1, 8, 2, 5)), ValueError, "at least the kernel's reach 3x3"),
    "conv of a linear layout": (
        lambda: block_sparse_conv2d(torch.randn(24, 5, 5), VALUES, None, LAYOUT),
        ValueError,
        "a convolution's layout",
    ),
    "linear of a conv layout": (
        lambda: block_sparse_linear(torch.randn(5, 8), CONV.values, None, CONV.layout),
        ValueError,
        "a linear layer's layout",
    ),
    "gradient": (
        lambda: block_saliency(VALUES, VALUES.double(), LAYOUT),
        ValueError,
        r"like the values \(6, 8, 8\) torch.float32 cpu, got \(6, 8, 8\) torch.float64",
    ),
    "gradient's layout": (
        lambda: block_saliency(VALUES[:5], VALUES[:5], LAYOUT),
        ValueError,
        r"values of shape \(6, 8, 8\), got \(5, 8, 8\)",
    ),
    "not linear": (
        lambda: BlockSparseLinear.from_dense(nn.Conv2d(8, 8, 3), 8),  # type: ignore[arg-type]
        TypeError,
        "expected nn.Linear, got Conv2d",
    ),
    "not conv": (
        lambda: BlockSparseConv1d.from_dense(nn.Linear(8, 8), 8),
        TypeError,
        "nn.Conv1d, got Linear",
    ),
    "block size": (
        lambda: BlockSparseLinear.from_dense(nn.Linear(24, 16), 4),
        ValueError,
        r"from 8 to 128, got \(4, 4\)",
    ),
    "mask": (
        lambda: BlockSparseLinear.from_dense(nn.Linear(24, 16), 8, mask=torch.ones(2, 3)),
        TypeError,
        "bool mask, got torch.float32",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_refused_before_any_kernel_runs(name: str) -> None:
    call, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        call()


def test_a_refused_layer_is_left_as_it_was() -> None:
    conv = nn.Conv1d(8, 8, 3)
    for size, mask in ((4, None), (8, torch.ones(2, 2))):
        with pytest.raises((TypeError, ValueError)):
            BlockSparseConv1d.from_dense(conv, size, mask=mask)
        assert conv.weight.shape == (8, 8, 3)
        conv(torch.randn(1, 8, 5))


def _compact(layer: BlockSparseLayer, capacity: int) -> None:
    keep = torch.zeros(layer.layout.blocks, dtype=torch.bool)
    keep[:capacity] = True
    layer.layout.update_(keep.view_as(layer.layout.mask))
    slots = layer.layout.compact_(capacity)
    replace_parameter_data_(layer.values, layer.values.detach()[slots])


def test_fourteen_compactions_in_a_row_compile_once_more_at_most() -> None:
    torch._dynamo.reset()
    layer = BlockSparseLinear.from_dense(nn.Linear(128, 128), 8)
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(128, 4))
    counter = CompileCounterWithBackend("aot_eager")
    with torch._dynamo.config.patch(force_parameter_static_shapes=False):
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        capacity = layer.layout.capacity
        for _ in range(14):
            x = torch.randn(8, 128)
            y = compiled(x)
            torch.testing.assert_close(y, model(x))
            y.sum().backward()
            assert layer.values.grad.shape == layer.values.shape
            capacity = max(1, int(capacity * 0.75))
            _compact(layer, capacity)
    assert counter.frame_count <= 2
