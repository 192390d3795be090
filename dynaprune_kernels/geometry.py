"""Sizes of a block-sparse weight: how a linear or convolution weight is cut into blocks."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

MIN_BLOCK = 8
MAX_BLOCK = 128
_INT32_MAX = 2**31 - 1


class Block(NamedTuple):
    """Outputs and inputs per block of a weight; ``values [capacity, bi, bo]`` store the inputs first."""

    outputs: int
    inputs: int

    def __str__(self) -> str:
        return str(tuple(self))

    @staticmethod
    def of(values: Tensor) -> Block:
        """The block that ``values [capacity, bi, bo]`` store; ValueError for another number of dimensions."""
        if values.dim() != 3:
            raise ValueError(f"expected values [capacity, bi, bo], got shape {list(values.shape)}")
        return Block(values.shape[2], values.shape[1])


class ConvGeometry(NamedTuple):
    """A convolution's hyper-parameters, in the order in which every conv op takes them (``int[] conv``)."""

    kernel_h: int
    kernel_w: int
    stride_h: int = 1
    stride_w: int = 1
    padding_h: int = 0
    padding_w: int = 0
    dilation_h: int = 1
    dilation_w: int = 1
    groups: int = 1

    @property
    def taps(self) -> int:
        """Number of kernel positions."""
        return self.kernel_h * self.kernel_w

    @property
    def phases(self) -> int:
        """Number of stride phases: the input positions modulo the stride."""
        return self.stride_h * self.stride_w

    @property
    def pointwise(self) -> bool:
        """Whether the convolution is a linear layer over pixels, packed index included."""
        return self == ConvGeometry(1, 1)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Output height and width for an input of ``height`` x ``width``; ValueError when there is none."""
        out_h = (height + 2 * self.padding_h - self.dilation_h * (self.kernel_h - 1) - 1) // self.stride_h + 1
        out_w = (width + 2 * self.padding_w - self.dilation_w * (self.kernel_w - 1) - 1) // self.stride_w + 1
        if out_h < 1 or out_w < 1:
            raise ValueError(
                f"expected an input of at least the kernel's reach "
                f"{self.dilation_h * (self.kernel_h - 1) + 1}x{self.dilation_w * (self.kernel_w - 1) + 1} "
                f"after padding, got {height}x{width} with padding {self.padding_h}x{self.padding_w}"
            )
        return out_h, out_w


def ceil_div(a: int, b: int) -> int:
    """Smallest integer >= a / b, for positive b."""
    return -(-a // b)


def check_block(block: int | tuple[int, int]) -> Block:
    """``(outputs, inputs)`` per block, or one number for both, as a :class:`Block`.

    Raises:
        TypeError: not a pair of ints. ValueError: a size outside 8..128.
    """
    if isinstance(block, int) and not isinstance(block, bool):
        block = (block, block)
    if not isinstance(block, tuple) or len(block) != 2 or not all(type(b) is int for b in block):
        raise TypeError(f"expected block_size as an int or a pair (outputs, inputs), got {block!r}")
    if not all(MIN_BLOCK <= b <= MAX_BLOCK for b in block):
        raise ValueError(f"expected block sizes from {MIN_BLOCK} to {MAX_BLOCK}, got {block}")
    return Block(*block)


def linear_grid(out_features: int, in_features: int, block: tuple[int, int]) -> tuple[int, int]:
    """Block rows and block columns of a ``[out_features, in_features]`` weight."""
    bo, bi = block
    return ceil_div(out_features, bo), ceil_div(in_features, bi)


def conv_grid(
    out_channels: int, in_channels: int, block: tuple[int, int], conv: ConvGeometry
) -> tuple[int, int]:
    """Block rows and block columns of a conv weight; a column is one tap of one channel block.

    Raises:
        ValueError: channels that the groups do not divide, or groups whose outputs the block does not divide.
    """
    bo, bi = block
    if out_channels % conv.groups or in_channels % conv.groups:
        raise ValueError(
            f"expected channels divisible by groups={conv.groups}, got {in_channels} in, {out_channels} out"
        )
    if conv.groups > 1 and (out_channels // conv.groups) % bo:
        raise ValueError(
            f"expected out_channels / groups ({out_channels // conv.groups}) to be a multiple of the "
            f"block's outputs ({bo}): a block may not straddle two groups"
        )
    return ceil_div(out_channels, bo), conv.taps * ceil_div(in_channels // conv.groups, bi)


def padding_ratio(out_features: int, in_features: int, block: tuple[int, int]) -> float:
    """Stored elements per real element of a fully live weight: 1.0 when the block divides both sizes."""
    rows, columns = linear_grid(out_features, in_features, block)
    return rows * block[0] * columns * block[1] / (out_features * in_features)


def check_int32(rows: int, columns: int) -> None:
    """Refuse a grid whose block numbers do not fit the int32 indices."""
    if rows * columns > _INT32_MAX:
        raise ValueError(f"expected at most {_INT32_MAX} blocks, got {rows} x {columns}")


def kept_size(keep: Tensor, block: int, size: int) -> int:
    """Elements in the kept blocks of an axis of ``size`` elements, whose last block may be ragged."""
    missing = keep.numel() * block - size
    return int(keep.sum()) * block - (missing if bool(keep[-1]) else 0)
