"""Launchers of the convolution kernels, which read and write channels-last memory.

An output that is wanted in contiguous memory is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynaprune_kernels.backends.alignment import aligned_channels
from dynaprune_kernels.backends.problem import Problem
from dynaprune_kernels.backends.triton import config, linear
from dynaprune_kernels.backends.triton.arguments import (
    check_convolution,
    check_flag,
    check_floats,
    check_geometry,
    check_index,
    check_int32,
    check_shape,
)
from dynaprune_kernels.backends.triton.kernels.conv2d_product import conv2d_product_kernel
from dynaprune_kernels.backends.triton.kernels.conv2d_wgrad import conv2d_probe_kernel, conv2d_wgrad_kernel
from dynaprune_kernels.backends.triton.launch import device_of, launch, precision
from dynaprune_kernels.geometry import Block, ConvGeometry, ceil_div
from dynaprune_kernels.memory_format import in_format


def conv2d_forward(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: Tensor,
    out_channels: int,
    conv: ConvGeometry,
    channels_last: bool = True,
) -> Tensor:
    check_floats("conv2d_forward", x=(x, 4), values=(values, 3), bias=(bias, 1))
    check_geometry("conv2d_forward", conv)
    images, _, height, width = x.shape
    size = (images, out_channels, *conv.output_size(height, width))
    return in_format(_product(x, values, bias, index, size, conv, dgrad=False), channels_last)


def conv2d_dgrad(
    dy: Tensor,
    values: Tensor,
    index: Tensor,
    input_size: list[int],
    conv: ConvGeometry,
    channels_last: bool = True,
) -> Tensor:
    check_floats("conv2d_dgrad", dy=(dy, 4), values=(values, 3))
    return in_format(_product(dy, values, None, index, tuple(input_size), conv, dgrad=True), channels_last)


def conv2d_wgrad(
    dy: Tensor, x: Tensor, index: Tensor, capacity: int, block: Block, conv: ConvGeometry
) -> Tensor:
    check_floats("conv2d_wgrad", x=(x, 4), dy=(dy, 4))
    _check_gradient("conv2d_wgrad", dy, x, index, capacity, block, conv)
    bo, bi = block
    return _wgrad(dy, x, x.new_zeros(capacity, bi, bo), None, index, conv)[0]


def conv2d_wgrad_saliency(
    dy: Tensor, x: Tensor, values: Tensor, index: Tensor, conv: ConvGeometry
) -> tuple[Tensor, Tensor]:
    check_floats("conv2d_wgrad_saliency", x=(x, 4), dy=(dy, 4), values=(values, 3))
    block = Block.of(values)
    _check_gradient("conv2d_wgrad_saliency", dy, x, index, values.shape[0], block, conv)
    values = values.contiguous()
    dvalues, signed = _wgrad(dy, x, torch.zeros_like(values), values, index, conv)
    assert signed is not None
    return dvalues, signed


def conv2d_probe(
    dy: Tensor,
    x: Tensor,
    index: Tensor,
    capacity: int,
    block: Block,
    conv: ConvGeometry,
    probe: Tensor,
) -> Tensor:
    check_floats("conv2d_probe", x=(x, 4), dy=(dy, 4))
    bo, bi = block
    rows, columns = _check_gradient("conv2d_probe", dy, x, index, capacity, block, conv)
    check_flag("conv2d_probe", probe, x)
    images, channels, height, width = x.shape
    out_channels, out_h, out_w = dy.shape[1:]
    group_channels, channel_blocks = channels // conv.groups, columns // conv.taps
    positions = images * out_h * out_w
    problem = Problem(
        "conv2d_probe", x.dtype, block, images * height * width, out_channels, conv.taps * group_channels,
        capacity,
    )  # fmt: skip
    tile = config.tile(problem, device_of(x))
    gi, go = max(tile.depth // bi, 1), max(64 // bo, 1)
    rows_per_group = rows // conv.groups
    norms = x.new_empty(rows * columns, dtype=torch.float32)
    x, dy = aligned_channels(x, conv.groups), aligned_channels(dy)
    launch(
        conv2d_probe_kernel,
        (ceil_div(rows_per_group, go) * conv.groups * ceil_div(channel_blocks, gi) * conv.taps,),
        x, dy, norms, probe.view(torch.uint8), index, positions, height, width, x.shape[3], out_h, out_w,
        x.shape[3] // conv.groups, dy.shape[3], rows, columns, capacity, channel_blocks, rows_per_group,
        columns.bit_length() + 1, conv.kernel_w, *conv[2:8],
        BI=bi, BO=bo, GI=gi, GO=go, STEP=tile.tokens, PRECISION=precision(x.dtype, conv=True),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return norms


def _check_gradient(
    op: str,
    dy: Tensor,
    x: Tensor,
    index: Tensor,
    capacity: int,
    block: Block,
    conv: ConvGeometry,
) -> tuple[int, int]:
    """Block rows and block columns; ValueError where the arguments are not those of one layer."""
    rows, columns = check_convolution(op, conv, x.shape, dy.shape, dy.shape[1], capacity, block)
    lists = conv.groups * (columns // conv.taps) * conv.phases
    check_index(op, index, x, rows, columns, lists, capacity)
    return rows, columns


def _product(
    a: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: Tensor,
    size: tuple[int, ...],
    conv: ConvGeometry,
    *,
    dgrad: bool,
) -> Tensor:
    op = "conv2d_dgrad" if dgrad else "conv2d_forward"
    capacity, bi, bo = values.shape
    out_channels = a.shape[1] if dgrad else size[1]
    x_shape, y_shape = (size, a.shape) if dgrad else (a.shape, None)
    rows, columns = check_convolution(op, conv, x_shape, y_shape, out_channels, capacity, Block(bo, bi))
    check_shape(op, "bias", bias, (out_channels,))
    group_channels, channel_blocks = x_shape[1] // conv.groups, columns // conv.taps
    lists = conv.groups * channel_blocks * conv.phases
    check_index(op, index, a, rows, columns, lists, capacity)
    values, bias = values.contiguous(), bias if bias is None else bias.contiguous()
    images, y_channels, y_h, y_w = size
    a_channels, a_h, a_w = a.shape[1:]
    positions = images * y_h * y_w
    problem = Problem(
        op, a.dtype, Block(bo, bi), images * a_h * a_w, out_channels, conv.taps * group_channels, capacity
    )
    tile = config.tile(problem, device_of(a))
    if dgrad:  # the largest phase
        positions = images * ceil_div(y_h, conv.stride_h) * ceil_div(y_w, conv.stride_w)
    row_tiles = ceil_div(positions, tile.tokens)
    inner_size = a_channels if dgrad else group_channels
    ragged = inner_size % (bo if dgrad else bi) != 0
    a = aligned_channels(a, 1 if dgrad else conv.groups)
    a_size = a.shape[3] // (1 if dgrad else conv.groups)
    y_groups = conv.groups if dgrad else 1
    y_real = y_channels // y_groups
    y_size = y_real + -y_real % 16
    y = a.new_empty(images, y_h, y_w, y_groups * y_size)
    launch(
        conv2d_product_kernel,
        (row_tiles * (lists if dgrad else rows),),
        a, values, bias, y, index, rows, columns, lists, capacity, row_tiles, images,
        a_h, a_w, a.shape[3], a_size, inner_size, y_h, y_w, y.shape[3], y_size, y_real, channel_blocks,
        rows // conv.groups, conv.kernel_w, *conv[2:8],
        BI=bi, BO=bo, DGRAD=dgrad, RAGGED=ragged, TILE=tile.tokens, DEPTH=tile.depth, GROUP=linear.GROUP,
        PRECISION=precision(a.dtype, conv=True), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if y_size != y_real:
        y = y.unflatten(3, (y_groups, y_size))[..., :y_real].flatten(3)
    return y.contiguous().permute(0, 3, 1, 2)


def _wgrad(
    dy: Tensor, x: Tensor, dvalues: Tensor, values: Tensor | None, index: Tensor, conv: ConvGeometry
) -> tuple[Tensor, Tensor | None]:
    capacity, bi, bo = dvalues.shape
    images, channels, height, width = x.shape
    out_channels, out_h, out_w = dy.shape[1:]
    group_channels = channels // conv.groups
    channel_blocks = ceil_div(group_channels, bi)
    rows, columns = ceil_div(out_channels, bo), conv.taps * channel_blocks
    positions = images * out_h * out_w
    device = device_of(x)
    problem = Problem(
        "conv2d_wgrad", x.dtype, Block(bo, bi), images * height * width, out_channels,
        conv.taps * group_channels, capacity,
    )  # fmt: skip
    tile = config.tile(problem, device)
    merge = max(tile.depth // bi, 1)
    programs = linear.chunks(rows, capacity, merge)
    check_int32("blocks of whole chunks", programs * merge)
    split = linear.split_of(positions, programs, tile, device)
    per_split = linear.split_size(positions, split, tile.tokens)
    partial = x.new_empty(split, capacity, bi, bo, dtype=torch.float32) if split > 1 else None
    signed = None if values is None else x.new_zeros(rows * columns, dtype=torch.float32)
    ragged = group_channels % bi != 0 or out_channels % bo != 0
    x, dy = aligned_channels(x, conv.groups), aligned_channels(dy)
    launch(
        conv2d_wgrad_kernel,
        (programs, split),
        x, dy, dvalues, partial, values, signed, index, positions, per_split, height, width, x.shape[3],
        out_h, out_w, x.shape[3] // conv.groups, group_channels, dy.shape[3], out_channels, rows, columns,
        capacity, channel_blocks, rows // conv.groups, conv.kernel_w, *conv[2:8],
        BI=bi, BO=bo, MERGE=merge, RAGGED=ragged, SALIENCY=values is not None, SPLITS=split, STEP=tile.tokens,
        PRECISION=precision(x.dtype, conv=True), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if partial is not None:
        linear.sum_splits(
            partial, dvalues, values, signed, index, group_channels, out_channels, rows, columns,
            channel_blocks, ragged,
        )  # fmt: skip
    return dvalues, signed
