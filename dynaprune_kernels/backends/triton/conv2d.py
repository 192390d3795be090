"""Launchers of the convolution kernels, which read and write channels-last memory.

An output that is wanted in contiguous memory is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynaprune_kernels.backends.alignment import aligned_channels
from dynaprune_kernels.backends.problem import Problem
from dynaprune_kernels.backends.triton import config, linear
from dynaprune_kernels.backends.triton.kernels.conv2d_product import conv2d_product_kernel
from dynaprune_kernels.backends.triton.kernels.conv2d_wgrad import conv2d_probe_kernel, conv2d_wgrad_kernel
from dynaprune_kernels.backends.triton.launch import check_int32, device_of, launch, precision
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
    images, channels, height, width = input_size
    size = (images, channels, height, width)
    return in_format(_product(dy, values, None, index, size, conv, dgrad=True), channels_last)


def conv2d_wgrad(
    dy: Tensor, x: Tensor, index: Tensor, capacity: int, block: Block, conv: ConvGeometry
) -> Tensor:
    bo, bi = block
    return _wgrad(dy, x, x.new_zeros(capacity, bi, bo), None, index, conv)[0]


def conv2d_wgrad_saliency(
    dy: Tensor, x: Tensor, values: Tensor, index: Tensor, conv: ConvGeometry
) -> tuple[Tensor, Tensor]:
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
    bo, bi = block
    images, channels, height, width = x.shape
    out_channels, out_h, out_w = dy.shape[1:]
    group_channels = channels // conv.groups
    channel_blocks = ceil_div(group_channels, bi)
    rows, columns = ceil_div(out_channels, bo), conv.taps * channel_blocks
    positions = images * out_h * out_w
    _check_sizes(x, dy)
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
        BI=bi, BO=bo, GI=gi, GO=go, STEP=tile.rows, PRECISION=precision(x.dtype, conv=True),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return norms


def _check_sizes(x: Tensor, dy: Tensor) -> None:
    check_int32("output positions", dy.shape[0] * dy.shape[2] * dy.shape[3])
    check_int32("elements per image", x.shape[1] * x.shape[2] * x.shape[3])


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
    values = values.contiguous()
    capacity, bi, bo = values.shape
    images, y_channels, y_h, y_w = size
    a_channels, a_h, a_w = a.shape[1:]
    out_channels, in_channels = (a_channels, y_channels) if dgrad else (y_channels, a_channels)
    group_channels = in_channels // conv.groups
    channel_blocks = ceil_div(group_channels, bi)
    rows, lists = ceil_div(out_channels, bo), conv.groups * channel_blocks * conv.phases
    positions = images * y_h * y_w
    check_int32("positions", max(positions, images * a_h * a_w))
    check_int32("elements per image", a_channels * a_h * a_w)
    problem = Problem(
        "conv2d_dgrad" if dgrad else "conv2d_forward",
        a.dtype, Block(bo, bi), images * a_h * a_w, out_channels, conv.taps * group_channels, capacity,
    )  # fmt: skip
    tile = config.tile(problem, device_of(a))
    if dgrad:  # the largest phase
        positions = images * ceil_div(y_h, conv.stride_h) * ceil_div(y_w, conv.stride_w)
    row_tiles = ceil_div(positions, tile.rows)
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
        a, values, bias, y, index, rows, lists, capacity, row_tiles, images, a_h, a_w, a.shape[3],
        a_size, inner_size, y_h, y_w, y.shape[3], y_size, y_real, channel_blocks, rows // conv.groups,
        conv.kernel_w, *conv[2:8],
        BI=bi, BO=bo, DGRAD=dgrad, RAGGED=ragged, TILE=tile.rows, DEPTH=tile.depth, GROUP=linear.GROUP,
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
    _check_sizes(x, dy)
    device = device_of(x)
    problem = Problem(
        "conv2d_wgrad", x.dtype, Block(bo, bi), images * height * width, out_channels,
        conv.taps * group_channels, capacity,
    )  # fmt: skip
    tile = config.tile(problem, device)
    merge = max(tile.depth // bi, 1)
    programs = linear.chunks(rows, capacity, merge)
    split = linear.split_of(positions, programs, tile, device)
    per_split = linear.split_size(positions, split, tile.rows)
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
        BI=bi, BO=bo, MERGE=merge, RAGGED=ragged, SALIENCY=values is not None, SPLITS=split, STEP=tile.rows,
        PRECISION=precision(x.dtype, conv=True), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if partial is not None:
        linear.sum_splits(
            partial, dvalues, values, signed, index, group_channels, out_channels, rows, columns,
            channel_blocks, ragged,
        )  # fmt: skip
    return dvalues, signed
