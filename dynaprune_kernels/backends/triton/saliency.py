"""Launcher of the saliency kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from dynaprune_kernels.backends.triton.kernels.saliency import block_saliency_kernel, neuron_saliency_kernel
from dynaprune_kernels.backends.triton.launch import launch


def block_saliency(
    values: Tensor, grad: Tensor, index: Tensor, rows: int, columns: int
) -> tuple[Tensor, Tensor]:
    values, grad = values.contiguous(), grad.contiguous()
    capacity, bi, bo = values.shape
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
