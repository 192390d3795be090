"""Launchers of the linear kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dynaprune_kernels.backends.alignment import aligned_blocks, aligned_rows
from dynaprune_kernels.backends.problem import Problem
from dynaprune_kernels.backends.triton import config
from dynaprune_kernels.backends.triton.arguments import (
    check_flag,
    check_floats,
    check_grid,
    check_index,
    check_int32,
    check_shape,
)
from dynaprune_kernels.backends.triton.kernels.linear_product import linear_product_kernel
from dynaprune_kernels.backends.triton.kernels.linear_wgrad import linear_probe_kernel, linear_wgrad_kernel
from dynaprune_kernels.backends.triton.kernels.weight_gradient import sum_splits_kernel
from dynaprune_kernels.backends.triton.launch import Device, device_of, launch, precision
from dynaprune_kernels.geometry import Block, ceil_div

GROUP = 8  # row tiles that share a list's blocks in L2


def linear_forward(
    x: Tensor, values: Tensor, bias: Tensor | None, index: Tensor, out_features: int
) -> Tensor:
    return _product(x, values, bias, index, out_features, dgrad=False)


def linear_dgrad(dy: Tensor, values: Tensor, index: Tensor, in_features: int) -> Tensor:
    return _product(dy, values, None, index, in_features, dgrad=True)


def linear_wgrad(dy: Tensor, x: Tensor, index: Tensor, capacity: int, block: Block) -> Tensor:
    _check_gradient("linear_wgrad", dy, x, None, index, capacity, block)
    bo, bi = block
    return _wgrad(dy, x, x.new_zeros(capacity, bi, bo), None, index)[0]


def linear_wgrad_saliency(dy: Tensor, x: Tensor, values: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    check_floats("linear_wgrad_saliency", values=(values, 3))
    _check_gradient("linear_wgrad_saliency", dy, x, values, index, values.shape[0], Block.of(values))
    values = values.contiguous()
    dvalues, signed = _wgrad(dy, x, torch.zeros_like(values), values, index)
    assert signed is not None
    return dvalues, signed


def linear_probe(dy: Tensor, x: Tensor, index: Tensor, capacity: int, block: Block, probe: Tensor) -> Tensor:
    bo, bi = block
    rows, columns = _check_gradient("linear_probe", dy, x, None, index, capacity, block)
    check_flag("linear_probe", probe, x)
    problem = Problem("linear_probe", x.dtype, block, x.shape[0], dy.shape[1], x.shape[1], capacity)
    tile = config.tile(problem, device_of(x))
    x, dy = aligned_rows(x), aligned_rows(dy)
    check_int32("elements per step over tokens", tile.tokens * max(x.stride(0), dy.stride(0)))
    gi, go = max(tile.depth // bi, 1), max(64 // bo, 1)
    norms = x.new_empty(rows * columns, dtype=torch.float32)
    launch(
        linear_probe_kernel,
        (ceil_div(rows, go) * ceil_div(columns, gi),),
        x, dy, norms, probe.view(torch.uint8), index,
        x.shape[0], x.shape[1], dy.shape[1], rows, columns, capacity, columns.bit_length() + 1,
        x.stride(0), dy.stride(0),
        BI=bi, BO=bo, GI=gi, GO=go, STEP=tile.tokens, PRECISION=precision(x.dtype, conv=False),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return norms


def descriptor(x: Tensor, box: list[int]) -> Any:
    """A host tensor descriptor of a matrix, read in tiles of ``box``."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), box)


def _product(
    a: Tensor, values: Tensor, bias: Tensor | None, index: Tensor, outer_size: int, *, dgrad: bool
) -> Tensor:
    op = "linear_dgrad" if dgrad else "linear_forward"
    check_floats(op, **{"dy" if dgrad else "x": (a, 2), "values": (values, 3), "bias": (bias, 1)})
    check_shape(op, "bias", bias, (outer_size,))
    capacity, bi, bo = values.shape
    tokens, inner_size = a.shape
    inner, _outer = (bo, bi) if dgrad else (bi, bo)
    out_features, in_features = (inner_size, outer_size) if dgrad else (outer_size, inner_size)
    rows, lists = check_grid(op, out_features, in_features, capacity, Block(bo, bi))
    check_int32("tokens", tokens)
    check_index(op, index, a, rows, lists, lists, capacity)
    a, values = aligned_rows(a), aligned_blocks(values)
    bias = bias if bias is None else bias.contiguous()
    tile = config.tile(
        Problem(op, a.dtype, Block(bo, bi), tokens, out_features, in_features, capacity), device_of(a)
    )
    y = a.new_empty(tokens, outer_size)
    ragged = inner_size % inner != 0
    blocks = values.view(capacity * bi, bo)
    tma = tile.tma and tile.depth <= inner and not ragged and a.numel() > 0 and capacity * bi < 2**30
    box = [bi, tile.depth] if dgrad else [tile.depth, bo]
    launch(
        linear_product_kernel,
        (ceil_div(tokens, tile.tokens) * (lists if dgrad else rows),),
        descriptor(a, [tile.tokens, tile.depth]) if tma else a,
        descriptor(blocks, box) if tma else values,
        bias, y, index, tokens, a.shape[1], inner_size, outer_size, rows, lists, capacity, a.stride(0),
        BI=bi, BO=bo, DGRAD=dgrad, TMA=tma, RAGGED=ragged, TILE=tile.tokens, DEPTH=tile.depth, GROUP=GROUP,
        PRECISION=precision(a.dtype, conv=False), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


def _check_gradient(
    op: str,
    dy: Tensor,
    x: Tensor,
    values: Tensor | None,
    index: Tensor,
    capacity: int,
    block: Block,
) -> tuple[int, int]:
    """Block rows and block columns; ValueError where the arguments are not those of one layer."""
    check_floats(op, x=(x, 2), dy=(dy, 2), values=(values, 3))
    check_shape(op, "dy", dy, (x.shape[0], dy.shape[1]))
    rows, columns = check_grid(op, dy.shape[1], x.shape[1], capacity, block)
    check_int32("tokens", x.shape[0])
    check_index(op, index, x, rows, columns, columns, capacity)
    return rows, columns


def _wgrad(
    dy: Tensor, x: Tensor, dvalues: Tensor, values: Tensor | None, index: Tensor
) -> tuple[Tensor, Tensor | None]:
    capacity, bi, bo = dvalues.shape
    tokens, in_features = x.shape
    out_features = dy.shape[1]
    x, dy = aligned_rows(x), aligned_rows(dy)
    rows, columns = ceil_div(out_features, bo), ceil_div(in_features, bi)
    device = device_of(x)
    tile = config.tile(
        Problem("linear_wgrad", x.dtype, Block(bo, bi), tokens, out_features, in_features, capacity), device
    )
    check_int32("elements per step over tokens", tile.tokens * max(x.stride(0), dy.stride(0)))
    merge = max(tile.depth // bi, 1)
    programs = chunks(rows, capacity, merge)
    check_int32("blocks of whole chunks", programs * merge)
    split = split_of(tokens, programs, tile, device)
    per_split = split_size(tokens, split, tile.tokens)
    partial = x.new_empty(split, capacity, bi, bo, dtype=torch.float32) if split > 1 else None
    signed = None if values is None else x.new_zeros(rows * columns, dtype=torch.float32)
    ragged = in_features % bi != 0 or out_features % bo != 0
    tma = tile.tma and merge == 1 and tokens > 0
    launch(
        linear_wgrad_kernel,
        (programs, split),
        descriptor(x, [tile.tokens, bi]) if tma else x,
        descriptor(dy, [tile.tokens, bo]) if tma else dy,
        dvalues, partial, values, signed, index,
        tokens, x.shape[1], dy.shape[1], in_features, out_features, rows, columns, capacity, per_split,
        x.stride(0), dy.stride(0),
        BI=bi, BO=bo, MERGE=merge, TMA=tma, RAGGED=ragged, SALIENCY=values is not None, SPLITS=split,
        STEP=tile.tokens, PRECISION=precision(x.dtype, conv=False),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if partial is not None:
        sum_splits(
            partial, dvalues, values, signed, index, in_features, out_features, rows, columns, columns, ragged
        )
    return dvalues, signed


def chunks(rows: int, capacity: int, merge: int) -> int:
    """Programs that cover every chunk of ``merge`` live blocks of a row, whatever the mask."""
    return capacity if merge == 1 else capacity // merge + rows


def split_of(positions: int, programs: int, tile: config.Tile, device: Device) -> int:
    """Number of parts of the sum over tokens or pixels."""
    return config.splits(programs, ceil_div(positions, tile.tokens), device)


def split_size(positions: int, split: int, step: int) -> int:
    """Tokens or pixels per part, whole steps."""
    return ceil_div(ceil_div(positions, step), split) * step


def sum_splits(
    partial: Tensor,
    dvalues: Tensor,
    values: Tensor | None,
    signed: Tensor | None,
    index: Tensor,
    inner_size: int,
    outer_size: int,
    rows: int,
    columns: int,
    channel_blocks: int,
    ragged: bool,
) -> None:
    """The second pass over ``partial [splits, capacity, bi, bo]``."""
    split, capacity, bi, bo = partial.shape
    launch(
        sum_splits_kernel,
        (capacity,),
        partial, dvalues, values, signed, index, inner_size, outer_size, rows, columns, channel_blocks,
        capacity, split,
        BI=bi, BO=bo, RAGGED=ragged, SALIENCY=values is not None, ROWS=min(bi, 4096 // bo), num_warps=4,
    )  # fmt: skip
