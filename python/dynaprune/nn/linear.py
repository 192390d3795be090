"""``BlockSparseLinear``: an ``nn.Linear`` that computes, stores and trains its live blocks only."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from dynaprune.nn.block_sparse import BlockSparseLayer, as_one_node, take_over_weight
from dynaprune_kernels import BlockLayout, block_sparse_linear


class BlockSparseLinear(BlockSparseLayer):
    """``y = x W^T + b`` over live blocks."""

    _dense_type = nn.Linear

    @classmethod
    def from_dense(
        cls, linear: nn.Linear, block_size: int | tuple[int, int], *, mask: Tensor | None = None
    ) -> BlockSparseLinear:
        """Turn an ``nn.Linear`` into this class, in place: its ``weight`` Parameter becomes ``values``.

        Returns:
            ``linear`` itself.

        Args:
            block_size: outputs and inputs per block, 8 to 128.
            mask: live blocks, bool ``[rows, columns]``; all by default.

        Raises:
            TypeError, ValueError: not a Linear, or a block size or mask that does not fit.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"expected nn.Linear, got {type(linear).__name__}")
        weight = cast(nn.Parameter, linear.weight)
        layout = cls.layout_for(linear, block_size, mask, weight.device)
        take_over_weight(weight, layout)
        return cls.in_place_of(linear, layout)

    @classmethod
    def layout_for(
        cls, linear: Any, block_size: int | tuple[int, int], mask: Tensor | None, device: torch.device
    ) -> BlockLayout:
        """The layout that the dense layer gets on ``device``."""
        return BlockLayout(linear.out_features, linear.in_features, block_size, mask=mask, device=device)

    @property
    def in_features(self) -> int:
        return self.layout.in_features

    @property
    def out_features(self) -> int:
        return self.layout.out_features

    def dense_shape(self) -> torch.Size:
        return torch.Size((self.layout.out_features, self.layout.in_features))

    def _dense_view(self, dense: Tensor) -> Tensor:
        return dense.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return as_one_node(self, x)
        return block_sparse_linear(x, self.values, self.bias, self.layout, tap=self.tap, probe=self.probe)

    def _plain_layer(self) -> nn.Module:
        return nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, "
            f"block={self.layout.block}, density={self.density():.3f}"
        )
