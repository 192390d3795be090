"""Block-sparse layers that stand in for ``nn.Linear``, ``nn.Conv2d`` and ``nn.Conv1d``."""

from dynaprune.nn.block_sparse import BlockSparseLayer
from dynaprune.nn.conv import BlockSparseConv1d, BlockSparseConv2d
from dynaprune.nn.linear import BlockSparseLinear
from dynaprune.nn.swap import SwapEntry, swap_back, swap_layers

__all__ = [
    "BlockSparseConv1d",
    "BlockSparseConv2d",
    "BlockSparseLayer",
    "BlockSparseLinear",
    "SwapEntry",
    "swap_back",
    "swap_layers",
]
