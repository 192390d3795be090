"""Launcher of the saliency kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from dynaprune_kernels.backends.triton.arguments import (
    check_block,
    check_floats,
    check_index,
    check_shape,
)
from dynaprune_kernels.backends.triton.kernels.saliency import block_saliency_kernel, neuron_saliency_kernel
from dynaprune_kernels.backends.triton.launch import launch
from dynaprune_kernels.geometry import Block
from dynaprune_kernels.index import index_size


def block_saliency(
    values: Tensor, grad: Tensor, index: Tensor, rows: int, columns: int
) -> tuple[Tensor, Tensor]:
    op = "block_saliency"
    check_floats(op, values=(values, 3), grad=(grad, 3))
    check_shape(op, "grad", grad, values.shape)
    capacity, bi, bo = values.shape
    check_block(op, capacity, Block(bo, bi))
    if rows < 1 or columns < 1:
        raise ValueError(f"{op}: expected at least one block, got {rows} x {columns}")
    lists = max(index.numel() - index_size(rows, 0, capacity), 0) // 2  # what the length leaves
    check_index(op, index, values, rows, columns, lists, capacity)
    values, grad = values.contiguous(), grad.contiguous()
    stats = values.new_zeros(4, rows * columns, dtype=torch.float32)
    outputs = values.new_empty(capacity, bo, dtype=torch.float32)
    neuron = values.new_empty(rows * bo, dtype=torch.float32)
    launch(
        block_saliency_kernel,
        (capacity,),
        values, grad, stats, outputs, index, rows, columns, capacity,
        BI=bi, BO=bo, ROWS=min(bi, 2048 // bo), num_warps=4,
    )  # fmt: skip
    launch(
        neuron_saliency_kernel,
        (rows,),
        outputs,
        neuron,
        index,
        rows,
        capacity,
        BO=bo,
        ENTRIES=32,
        num_warps=4,
    )
    return stats, neuron
