"""Block-sparse matmul and convolution under live masks: kernels, ops, and the layout of live blocks."""

import torch  # noqa: F401  the extension needs libtorch in the process before it loads

from dynaprune_kernels import _extension

_extension.load()

from dynaprune_kernels import ops  # noqa: E402, F401  registers the ops
from dynaprune_kernels.functional import (  # noqa: E402
    BlockSaliency,
    block_saliency,
    block_sparse_conv2d,
    block_sparse_linear,
)
from dynaprune_kernels.geometry import ConvGeometry  # noqa: E402
from dynaprune_kernels.layout import BlockLayout  # noqa: E402

__all__ = [
    "BlockLayout",
    "BlockSaliency",
    "ConvGeometry",
    "block_saliency",
    "block_sparse_conv2d",
    "block_sparse_linear",
]
