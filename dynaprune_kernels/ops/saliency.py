"""``block_saliency``: per block and per neuron sums over values and gradient, in one pass."""

from __future__ import annotations

from torch import Tensor

from dynaprune_kernels.backends.dispatch import select
from dynaprune_kernels.backends.problem import Problem
from dynaprune_kernels.geometry import Block
from dynaprune_kernels.ops.registration import accumulator, define, fake, implement, no_autograd

define("block_saliency(Tensor values, Tensor grad, Tensor index, int rows, int columns) -> (Tensor, Tensor)")


@implement("block_saliency")
def _block_saliency(
    values: Tensor, grad: Tensor, index: Tensor, rows: int, columns: int
) -> tuple[Tensor, Tensor]:
    backend = select(Problem("block_saliency", values.dtype, Block.of(values)), values.device)
    return backend.block_saliency(values, grad, index, rows, columns)


@fake("block_saliency")
def _(values, grad, index, rows, columns):  # type: ignore[no-untyped-def]
    dtype = accumulator(values.dtype)
    return (
        values.new_empty(4, rows * columns, dtype=dtype),
        values.new_empty(rows * values.shape[2], dtype=dtype),
    )


no_autograd("block_saliency")
