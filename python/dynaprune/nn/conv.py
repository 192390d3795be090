"""``BlockSparseConv2d`` and ``BlockSparseConv1d``: convolutions over live blocks, one mask per kernel tap."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from dynaprune.nn.block_sparse import BlockSparseLayer, as_one_node, take_over_weight
from dynaprune_kernels import BlockLayout, ConvGeometry, block_sparse_conv2d
from dynaprune_kernels.memory_format import in_format, new_image, suggests_channels_last


class BlockSparseConv2d(BlockSparseLayer):
    """2-D convolution over live blocks; ``padding_mode`` and ``padding="same"`` as in ``nn.Conv2d``.

    Attributes:
        pad_before: left, right, top, bottom padding that ``F.pad`` adds before the op, or None: what the
            op's own symmetric zero padding cannot express.
        weight_channels_last: whether the dense weight is channels-last. Outputs and input gradients then are,
            too, as those of ``nn.Conv2d``. ``to(memory_format=...)`` changes it.
    """

    _dense_type: Any = nn.Conv2d
    _conv_forward = nn.Conv2d._conv_forward  # for code that holds nn.Conv2d.forward of the layer

    def __init__(
        self,
        layout: BlockLayout,
        values: nn.Parameter,
        bias: nn.Parameter | None,
        plain: dict[str, Any],
        weight_channels_last: bool = False,
    ) -> None:
        super().__init__(layout, values, bias)
        self._keep_settings(plain, weight_channels_last)

    def _keep_settings(self, plain: dict[str, Any], weight_channels_last: bool) -> None:
        self._plain = plain
        self.padding_mode: str = plain["padding_mode"]
        self.pad_before: tuple[int, ...] | None = plain["pad_before"]
        self.weight_channels_last = weight_channels_last

    @classmethod
    def in_place_of(cls, layer: nn.Module, layout: BlockLayout) -> Any:
        """As for every layer. The memory format of the dense weight is kept, so blocks come afterwards.

        Raises:
            ValueError: a weight that has not the shape of the dense layer's.
        """
        _, plain = cls.settings_of(layer)
        weight = cast(nn.Parameter, layer.weight)
        shape = (plain["out_channels"], plain["in_channels"] // plain["groups"], *plain["kernel_size"])
        if weight.shape != shape:
            raise ValueError(
                f"expected the dense weight of shape {shape}, whose memory format the layer keeps, got shape "
                f"{tuple(weight.shape)}; bring it into blocks after in_place_of"
            )
        channels_last = _is_channels_last(weight)
        sparse = super().in_place_of(layer, layout)
        sparse._keep_settings(plain, channels_last)
        return sparse

    @classmethod
    def from_dense(
        cls, conv: Any, block_size: int | tuple[int, int], *, mask: Tensor | None = None
    ) -> BlockSparseConv2d:
        """Turn a convolution into this class, in place: its ``weight`` Parameter becomes ``values``.

        Args:
            block_size: outputs and inputs per block, 8 to 128.
            mask: live blocks, bool ``[rows, columns]`` with ``columns = taps * channel blocks``; all by
            default.

        Returns:
            ``conv`` itself.

        Raises:
            TypeError, ValueError: another kind of layer, a block that groups cannot hold, a mask that does
            not fit.
        """
        if not isinstance(conv, cls._dense_type):
            raise TypeError(f"expected nn.{cls._dense_type.__name__}, got {type(conv).__name__}")
        weight = cast(nn.Parameter, conv.weight)
        layout = cls.layout_for(conv, block_size, mask, weight.device)
        sparse = cls.in_place_of(conv, layout)
        take_over_weight(weight, layout)
        return sparse

    @classmethod
    def layout_for(
        cls, conv: Any, block_size: int | tuple[int, int], mask: Tensor | None, device: torch.device
    ) -> BlockLayout:
        """The layout that the dense layer gets on ``device``."""
        geometry, _ = cls.settings_of(conv)
        sizes = conv.out_channels, conv.in_channels, block_size
        return BlockLayout(*sizes, conv=geometry, mask=mask, device=device)

    @classmethod
    def settings_of(cls, conv: Any) -> tuple[ConvGeometry, dict[str, Any]]:
        """What a dense convolution computes: the op's geometry, and the settings that the layer keeps."""
        plain = {
            "in_channels": conv.in_channels,
            "out_channels": conv.out_channels,
            "kernel_size": conv.kernel_size,
            "stride": conv.stride,
            "padding": conv.padding,
            "dilation": conv.dilation,
            "groups": conv.groups,
            "padding_mode": conv.padding_mode,
        }
        outside = conv.padding_mode != "zeros" or isinstance(conv.padding, str)
        own_padding = (0,) * len(conv.kernel_size) if outside else conv.padding
        one_d = len(conv.kernel_size) == 1
        sizes = [
            *((1, *conv.kernel_size) if one_d else conv.kernel_size),
            *((1, *conv.stride) if one_d else conv.stride),
            *((0, *own_padding) if one_d else own_padding),
            *((1, *conv.dilation) if one_d else conv.dilation),
        ]
        plain["pad_before"] = tuple(conv._reversed_padding_repeated_twice) if outside else None
        return ConvGeometry._make([*sizes, conv.groups]), plain

    def _padded(self, x: Tensor) -> Tensor:
        if self.pad_before is None:
            return x
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, self.pad_before, mode=mode)

    @property
    def in_channels(self) -> int:
        return self.layout.in_features

    @property
    def out_channels(self) -> int:
        return self.layout.out_features

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return self._plain["kernel_size"]

    @property
    def stride(self) -> tuple[int, ...]:
        return self._plain["stride"]

    @property
    def groups(self) -> int:
        return self._plain["groups"]

    def dense_shape(self) -> torch.Size:
        shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        return torch.Size(shape)

    def dense_stride(self) -> tuple[int, ...]:
        """Strides of the dense weight: those of its memory format."""
        if not self.weight_channels_last:
            return super().dense_stride()
        _, inputs, *taps = self.dense_shape()
        of_taps = (inputs * taps[1], inputs) if len(taps) == 2 else (inputs,)
        return (inputs * math.prod(taps), 1, *of_taps)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return as_one_node(self, x)
        return block_sparse_conv2d(
            self._padded(x),
            self.values,
            self.bias,
            self.layout,
            tap=self.tap,
            probe=self.probe,
            channels_last=True if self.weight_channels_last else None,
        )

    def _dense_view(self, dense: Tensor) -> Tensor:
        return in_format(dense, self.weight_channels_last)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As for any module. What ``fn`` does to a dense weight's memory format is seen from a small one."""
        small = self._dense_view(new_image(self.values, (2, 2, 1, 2), self.weight_channels_last))
        super()._apply(fn, recurse)
        small = fn(small)
        self.weight_channels_last = _is_channels_last(small)
        return self

    def _plain_layer(self) -> nn.Module:
        sizes = {key: value for key, value in self._plain.items() if key != "pad_before"}
        return self._dense_type(**sizes, bias=self.bias is not None, device="meta")

    def extra_repr(self) -> str:
        plain = self._plain
        return (
            f"{plain['in_channels']}, {plain['out_channels']}, kernel_size={plain['kernel_size']}, "
            f"stride={plain['stride']}, padding={plain['padding']}, dilation={plain['dilation']}, "
            f"groups={plain['groups']}, block={self.layout.block}, density={self.density():.3f}"
        )


class BlockSparseConv1d(BlockSparseConv2d):
    """1-D convolution: the 2-D one with a kernel of height 1.

    As for ``nn.Conv1d`` the input's format does not count. ``to(memory_format=...)`` leaves the weight alone.
    """

    _dense_type = nn.Conv1d
    _conv_forward = nn.Conv1d._conv_forward

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return as_one_node(self, x)
        image = self._padded(x).unsqueeze(-2)
        return block_sparse_conv2d(
            image,
            self.values,
            self.bias,
            self.layout,
            tap=self.tap,
            probe=self.probe,
            channels_last=self.weight_channels_last,
        ).squeeze(-2)

    def to_blocks(self, weight: Tensor) -> Tensor:
        return super().to_blocks(weight.unsqueeze(2))

    def _dense_view(self, dense: Tensor) -> Tensor:
        return super()._dense_view(dense).squeeze(2)


def _is_channels_last(weight: Tensor) -> bool:
    """Whether a dense weight ``[out, in, kh, kw]``, or ``[out, in, k]``, lies in channels-last memory."""
    return suggests_channels_last(weight if weight.dim() == 4 else weight.unsqueeze(2))
