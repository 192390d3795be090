"""Every kernel against the float64 reference on any device: what the interpreter's and the GPU's tests share.
``kernels`` is the backend.

An entry passes with an error of at most one rounding to the result's dtype plus ``ORDER_OF_SUMS * eps *
(|a| |b|)`` with the eps of the accumulation: float32, or TF32 where that is allowed. Slots without a live
block and the padding of ragged blocks hold NaN, so that what must not be read shows.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from dynaprune_kernels import BlockLayout, ConvGeometry, reference
from dynaprune_kernels.backends import triton
from dynaprune_kernels.backends.pointwise import convolutions
from dynaprune_kernels.geometry import ceil_div

# n rounded partial sums of random terms are off by about half an eps * (|a| |b|) whatever n is, and by about
# 3 in the worst of 1e5 results; a bound that holds for certain grows with n and would see nothing.
ORDER_OF_SUMS = 4.0
EPS = {"float32": 2.0**-23, "tf32": 2.0**-10}


class Case(NamedTuple):
    """``block`` is (outputs, inputs); with ``conv`` sizes are channels and ``size`` is that of an image."""

    out: int
    inputs: int
    block: tuple[int, int]
    mask: str = "random"
    rows: int = 1  # tokens or images
    dtype: torch.dtype = torch.float32
    conv: ConvGeometry | None = None
    size: tuple[int, int] = (1, 1)
    spare_slots: int = 1

    def __str__(self) -> str:
        conv = (
            "" if self.conv is None else f"-conv{'.'.join(map(str, self.conv))}-{self.size[0]}x{self.size[1]}"
        )
        blocks = f"{self.block[0]}x{self.block[1]}"
        return f"{self.rows}x{self.out}x{self.inputs}-{blocks}-{self.mask}-{str(self.dtype)[6:]}{conv}"


class Operands(NamedTuple):
    """What a case is made of; ``clean`` are the values with zeros where ``values`` hold NaN."""

    layout: BlockLayout
    x: Tensor
    values: Tensor
    clean: Tensor
    bias: Tensor
    dy: Tensor


def live_mask(kind: str, rows: int, columns: int) -> Tensor:
    """A mask of ``rows x columns`` blocks."""
    mask = torch.rand(rows, columns) < 0.5
    if kind == "dead":
        mask[:] = False
    elif kind == "live":
        mask[:] = True
    elif kind == "one":
        mask[:] = False
        mask[rows // 2, columns // 2] = True
    elif kind == "cross":  # an empty row and an empty column beside full ones
        mask[:] = True
        mask[0] = False
        mask[:, -1] = False
    return mask


def operands(case: Case, device: str) -> Operands:
    """Random tensors of a case, with NaN wherever kernels must not read."""
    bo, bi = case.block
    layout = BlockLayout(case.out, case.inputs, case.block, conv=case.conv)
    mask = live_mask("random" if case.mask == "suspended" else case.mask, layout.rows, layout.columns)
    capacity = min(max(int(mask.sum()), 1) + case.spare_slots, layout.blocks)
    layout = BlockLayout(case.out, case.inputs, case.block, conv=case.conv, mask=mask, capacity=capacity)
    if case.mask == "suspended":
        layout.suspend_(live_mask("random", layout.rows, layout.columns))
    clean = torch.randn(capacity, bi, bo)
    real = reference.dense_to_blocks(torch.ones(layout.dense_shape), case.block, case.conv).bool()
    listed = torch.zeros(capacity, bi, bo, dtype=torch.bool)
    live = layout.lists.row_slots[: layout.live_count()].long()
    listed[live] = real[layout.block_of_slot[live].long()]
    clean = torch.where(listed, clean, 0.0).to(case.dtype)
    values = torch.where(listed, clean, torch.nan)
    assert layout.taps * ceil_div(case.inputs // layout.groups, bi) == layout.columns
    if case.conv is None:
        x, dy = torch.randn(case.rows, case.inputs), torch.randn(case.rows, case.out)
    else:
        x = torch.randn(case.rows, case.inputs, *case.size)
        dy = torch.randn(case.rows, case.out, *case.conv.output_size(*case.size))
    tensors = (x, values, clean, torch.randn(case.out), dy)
    return Operands(layout.to(device), *(t.to(device, case.dtype) for t in tensors))


def assert_close(
    name: str, actual: Tensor, exact: Tensor, magnitude: Tensor, accumulation: str = "float32"
) -> None:
    """Compare with a float64 result; ``magnitude`` is the same sum over absolute values."""
    info = torch.finfo(actual.dtype)
    allowed = (
        ORDER_OF_SUMS * EPS[accumulation] * magnitude
        + info.eps * exact.abs()
        + info.smallest_normal * info.eps
    )
    error = (actual.double() - exact).abs()
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    worst = (error / allowed).flatten().argmax() if error.numel() else None
    assert not torch.isnan(actual).any(), f"{name} has NaN"
    assert worst is None or error.flatten()[worst] <= allowed.flatten()[worst], (
        f"{name}: off by {error.flatten()[worst]:.3g} where {allowed.flatten()[worst]:.3g} is allowed, "
        f"at {worst} of {tuple(actual.shape)}"
    )


def check_products(
    case: Case, device: str, accumulation: str = "float32", kernels: ModuleType = triton
) -> None:
    """Forward with and without bias, and dgrad."""
    layout, x, values, clean, bias, dy = operands(case, device)
    x64, clean64, bias64, dy64 = (t.double() for t in (x, clean, bias, dy))
    for with_bias in (True, False):
        b = bias if with_bias else None
        b64 = bias64 if with_bias else None
        b_size = bias64.abs() if with_bias else None
        if case.conv is None:
            y = kernels.linear_forward(x, values, b, layout.index, case.out)
            exact = reference.linear_forward(x64, clean64, b64, layout.index, case.out)
            size = reference.linear_forward(x64.abs(), clean64.abs(), b_size, layout.index, case.out)
        else:
            y = convolutions(kernels, case.conv).conv2d_forward(
                x, values, b, layout.index, case.out, case.conv
            )
            assert y.is_contiguous(memory_format=torch.channels_last)
            exact = reference.conv2d_forward(x64, clean64, b64, layout.index, case.out, case.conv)
            size = reference.conv2d_forward(
                x64.abs(), clean64.abs(), b_size, layout.index, case.out, case.conv
            )
        assert_close("forward", y, exact, size, accumulation)
    if case.conv is None:
        dx = kernels.linear_dgrad(dy, values, layout.index, case.inputs)
        exact = reference.linear_dgrad(dy64, clean64, layout.index, case.inputs)
        size = reference.linear_dgrad(dy64.abs(), clean64.abs(), layout.index, case.inputs)
    else:
        shape = list(x.shape)
        dx = convolutions(kernels, case.conv).conv2d_dgrad(dy, values, layout.index, shape, case.conv)
        assert dx.is_contiguous(memory_format=torch.channels_last)
        exact = reference.conv2d_dgrad(dy64, clean64, layout.index, shape, case.conv)
        size = reference.conv2d_dgrad(dy64.abs(), clean64.abs(), layout.index, shape, case.conv)
    assert_close("dgrad", dx, exact, size, accumulation)


def check_gradients(
    case: Case, device: str, accumulation: str = "float32", kernels: ModuleType = triton
) -> None:
    """wgrad, wgrad with saliency, and the probe with its flag up and down."""
    layout, x, values, clean, _, dy = operands(case, device)
    x64, clean64, dy64 = (t.double() for t in (x, clean, dy))
    index, capacity, conv = layout.index, layout.capacity, case.conv
    on, off = (torch.tensor(flag, device=device) for flag in (True, False))
    if conv is None:
        dw = kernels.linear_wgrad(dy, x, index, capacity, layout.block)
        both = kernels.linear_wgrad_saliency(dy, x, values, index)
        probes = [kernels.linear_probe(dy, x, index, capacity, layout.block, flag) for flag in (on, off)]
        exact, signed = reference.linear_wgrad_saliency(dy64, x64, clean64, index)
        size, signed_size = reference.linear_wgrad_saliency(dy64.abs(), x64.abs(), clean64.abs(), index)
        probe = reference.linear_probe(dy64, x64, index, capacity, layout.block, on)
        probe_size = reference.linear_probe(dy64.abs(), x64.abs(), index, capacity, layout.block, on)
    else:
        images = convolutions(kernels, conv)
        dw = images.conv2d_wgrad(dy, x, index, capacity, layout.block, conv)
        both = images.conv2d_wgrad_saliency(dy, x, values, index, conv)
        probes = [images.conv2d_probe(dy, x, index, capacity, layout.block, conv, flag) for flag in (on, off)]
        exact, signed = reference.conv2d_wgrad_saliency(dy64, x64, clean64, index, conv)
        size, signed_size = reference.conv2d_wgrad_saliency(dy64.abs(), x64.abs(), clean64.abs(), index, conv)
        probe = reference.conv2d_probe(dy64, x64, index, capacity, layout.block, conv, on)
        probe_size = reference.conv2d_probe(dy64.abs(), x64.abs(), index, capacity, layout.block, conv, on)
    assert_close("wgrad", dw, exact, size, accumulation)
    assert torch.equal(dw, both[0]), "wgrad differs with the saliency epilogue"
    assert_close("signed saliency", both[1], signed, signed_size, accumulation)
    dead = ~layout.mask.flatten()
    assert torch.equal(both[1][dead], torch.zeros_like(both[1][dead])), "saliency of blocks that are not live"
    # |g^2 - (g + d)^2| <= 2 |g| d + d^2, summed over a block by Cauchy-Schwarz.
    assert_close("probe", probes[0], probe, 2 * (probe * probe_size).sqrt() + probe, accumulation)
    assert torch.equal(probes[1], torch.zeros_like(probes[1])), "the probe ran while its flag was down"


def check_saliency(case: Case, device: str, kernels: ModuleType = triton) -> None:
    """The sums over values and gradient of blocks and of neurons."""
    layout, _, values, clean, _, _ = operands(case, device)
    unlisted = values.isnan()
    grad = torch.randn_like(clean).masked_fill(unlisted, 0.0)
    # Padding takes part in the sums of a listed block: there it is zero, elsewhere never read.
    listed = torch.zeros(layout.capacity, dtype=torch.bool, device=device)
    listed[layout.lists.row_slots[: layout.live_count()].long()] = True
    values = torch.where(listed[:, None, None], clean, values)
    grad = torch.where(listed[:, None, None], grad, torch.nan)
    stats, neuron = kernels.block_saliency(values, grad, layout.index, layout.rows, layout.columns)
    zeroed = torch.where(listed[:, None, None], grad, 0.0).double()
    arguments = (layout.index, layout.rows, layout.columns)
    exact = reference.block_saliency(clean.double(), zeroed, *arguments)
    size = reference.block_saliency(clean.double().abs(), zeroed.abs(), *arguments)
    assert_close("block sums", stats, exact[0], size[0])
    assert_close("neuron sums", neuron, exact[1], size[1])


def check_layout(case: Case, device: str, kernels: ModuleType = triton) -> None:
    """A walk over masks, with and without release: bitwise the reference's slots and index lists."""
    layout = operands(case, "cpu").layout
    expected = [layout.mask, layout.slot_of_block, layout.index]
    actual = [t.to(device, copy=True) for t in expected]
    for density, release in ((0.3, False), (0.9, True), (0.5, True), (0.0, False), (1.0, True)):
        mask = torch.rand(layout.rows, layout.columns) < density
        expected[0].copy_(mask)
        actual[0].copy_(mask)
        reference.layout_update(*expected, layout.capacity, case.conv, release)
        kernels.layout_update(*actual, layout.capacity, case.conv, release)
        for name, ours, theirs in zip(("mask", "slots", "index"), actual, expected, strict=True):
            assert torch.equal(ours.cpu(), theirs), f"{name} after density {density}, release={release}"
