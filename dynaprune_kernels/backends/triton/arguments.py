"""What launchers check before kernels compute addresses: kernels trust sizes and strides, and no number that
lies in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynaprune_kernels.backends.memory import check_memory
from dynaprune_kernels.backends.triton.support import BLOCKS, DTYPES
from dynaprune_kernels.geometry import Block, ConvGeometry, conv_grid, linear_grid
from dynaprune_kernels.index import index_size

_LARGEST = 2**30  # leaves room in 32 bits for whole tiles and parts
_MOST_LISTS = 2**27  # times the row tiles that share a list


def check_int32(name: str, size: int) -> None:
    """Raise ValueError where ``size``, rounded up to whole tiles and parts, may not fit 32-bit counters."""
    if size > _LARGEST:
        raise ValueError(f"expected at most 2^30 {name}, got {size}")


def check_floats(op: str, **tensors: tuple[Tensor | None, int]) -> None:
    """Raise ValueError unless the tensors have memory, one device, one dtype of the kernels, and are dense.

    Args:
        tensors: each with its number of dimensions; None is left out.
    """
    first: Tensor | None = None
    for name, (tensor, dim) in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first = tensor
        _check_place(op, name, tensor, first)
        if tensor.dtype not in DTYPES or tensor.dtype != first.dtype:
            expected = "float16, bfloat16 or float32" if tensor is first else first.dtype
            raise ValueError(f"{op}: expected {name} of {expected}, got {tensor.dtype}")
        if tensor.dim() != dim:
            raise ValueError(f"{op}: expected {name} of {dim} dimensions, got shape {list(tensor.shape)}")
        check_memory(op, name, tensor)


def check_shape(op: str, name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise ValueError where a tensor has another shape."""
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{op}: expected {name} {list(shape)}, got shape {list(tensor.shape)}")


def check_grid(op: str, outputs: int, inputs: int, capacity: int, block: Block) -> tuple[int, int]:
    """Block rows and block columns of a linear weight.

    Raises:
        ValueError: no outputs or inputs, a capacity below 0, a block that the kernels do not take.
    """
    check_block(op, capacity, block)
    if outputs < 1 or inputs < 1:
        raise ValueError(f"{op}: expected at least one output and one input, got {outputs} and {inputs}")
    return linear_grid(outputs, inputs, block)


def check_convolution(
    op: str,
    conv: ConvGeometry,
    x: tuple[int, ...],
    y: tuple[int, ...] | None,
    outputs: int,
    capacity: int,
    block: Block,
) -> tuple[int, int]:
    """Block rows and block columns of a convolution's weight.

    Args:
        x: sizes of the input ``[N, C, H, W]``.
        y: those of the output, None where they are not given.

    Raises:
        ValueError: sizes that do not fit together or 32-bit counters, a block that the kernels do not take.
    """
    check_block(op, capacity, block)
    check_geometry(op, conv)
    if len(x) != 4 or min(x) < 0 or x[1] < 1 or outputs < 1:
        raise ValueError(f"{op}: expected an input [N, C, H, W] with channels and outputs, got {list(x)}")
    size = (x[0], outputs, *conv.output_size(x[2], x[3]))
    if y is not None and tuple(y) != size:
        raise ValueError(f"{op}: expected dy {list(size)} for an input {list(x)}, got shape {list(y)}")
    for images, channels, height, width, groups in ((*x, conv.groups), (*size, 1)):
        check_int32("positions", images * height * width)
        if channels % groups == 0:  # conv_grid refuses the others
            check_int32("elements per image", groups * _whole_16(channels // groups) * height * width)
    return conv_grid(outputs, x[1], block, conv)


def check_geometry(op: str, conv: ConvGeometry) -> None:
    """Raise ValueError where kernel, stride, padding, dilation or groups are none."""
    least = (1, 1, 1, 1, 0, 0, 1, 1, 1)
    if not all(low <= number <= _LARGEST for low, number in zip(least, conv, strict=True)):
        raise ValueError(f"{op}: expected numbers of a convolution, got {conv}")


def check_block(op: str, capacity: int, block: Block) -> None:
    """Raise ValueError where the kernels do not take the block, or the capacity is below 0."""
    if len(block) != 2 or not all(size in BLOCKS for size in block):
        raise ValueError(f"{op}: expected a block of 16, 32, 64 and 128, got {list(block)}")
    if capacity < 0:
        raise ValueError(f"{op}: expected a capacity of at least 0, got {capacity}")


def check_index(
    op: str, index: Tensor, beside: Tensor, rows: int, columns: int, lists: int, capacity: int
) -> None:
    """Raise ValueError where ``index`` is not the memory of a packed index of these sizes."""
    size = index_size(rows, lists, capacity)
    check_int32("elements of an index", size)
    check_int32("blocks", rows * columns)
    if max(rows, lists) > _MOST_LISTS:
        raise ValueError(f"{op}: expected at most 2^27 block rows and lists, got {rows} and {lists}")
    _check_place(op, "index", index, beside)
    if index.dtype != torch.int32 or index.shape != (size,) or not index.is_contiguous():
        raise ValueError(
            f"{op}: expected a contiguous int32 index of {size} elements for {rows} block rows, {columns} "
            f"block columns, {lists} column lists and capacity {capacity}, got {index.dtype} of shape "
            f"{list(index.shape)}"
        )
    check_memory(op, "index", index)


def check_flag(op: str, probe: Tensor, beside: Tensor) -> None:
    """Raise ValueError unless ``probe`` is one bool."""
    _check_place(op, "probe", probe, beside)
    if probe.dtype != torch.bool or probe.numel() != 1:
        raise ValueError(f"{op}: expected probe as one bool, got {probe.dtype} {list(probe.shape)}")
    check_memory(op, "probe", probe)


def _check_place(op: str, name: str, tensor: Tensor, beside: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.device != beside.device:
        raise ValueError(
            f"{op}: expected {name} dense and on {beside.device}, got {tensor.layout} on {tensor.device}"
        )


def _whole_16(channels: int) -> int:
    return channels + -channels % 16
