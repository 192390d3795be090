"""The weight's side of a product over live blocks: what forward and dgrad of linear and conv2d share."""

import triton
import triton.language as tl


@triton.jit
def load_part(
    w,
    slot,
    exists,
    k0,
    inner,
    inner_size,
    BI: tl.constexpr,
    BO: tl.constexpr,
    DEPTH: tl.constexpr,
    DGRAD: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Elements ``k0 .. k0 + DEPTH`` of the summed side of one block of ``w [capacity, BI, BO]``.

    Args:
        exists: whether there is such a slot.
        inner: [DEPTH], where they stand among the ``inner_size`` that are real; zeros come beyond.

    Returns:
        ``[DEPTH, BO]``, for dgrad ``[DEPTH, BI]``.
    """
    OUTER: tl.constexpr = BI if DGRAD else BO
    block = w + slot.to(tl.int64) * (BI * BO)
    k = k0 + tl.arange(0, DEPTH)
    n = tl.arange(0, OUTER)
    if DGRAD:
        tile = tl.load(block + k[:, None] + n[None, :] * BO, mask=exists, other=0.0)
    else:
        tile = tl.load(block + k[:, None] * BO + n[None, :], mask=exists, other=0.0)
    if RAGGED:  # not a mask of the load, which would make it one of single elements
        tile = tl.where((inner < inner_size)[:, None], tile, 0.0)
    return tile


@triton.jit
def load_merged(
    w,
    slot,
    valid,
    inner,
    inner_size,
    BI: tl.constexpr,
    BO: tl.constexpr,
    DEPTH: tl.constexpr,
    DGRAD: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Whole blocks of ``w [capacity, BI, BO]``, one after the other along the summed side.

    Args:
        slot, valid, inner: [DEPTH]: the block that element k belongs to, whether there is one, and where the
            element stands among the ``inner_size`` that are real; zeros come elsewhere.

    Returns:
        ``[DEPTH, BO]``, for dgrad ``[DEPTH, BI]``.
    """
    INNER: tl.constexpr = BO if DGRAD else BI
    OUTER: tl.constexpr = BI if DGRAD else BO
    block = slot.to(tl.int64) * (BI * BO)  # [DEPTH]
    within = tl.arange(0, DEPTH) % INNER
    n = tl.arange(0, OUTER)
    if DGRAD:
        k = tl.max_contiguous(tl.multiple_of(block + within, BO), BO)
        at = w + k[:, None] + n[None, :] * BO
    else:
        at = w + (block + within * BO)[:, None] + n[None, :]
    tile = tl.load(at, mask=valid[:, None], other=0.0)
    if RAGGED:
        tile = tl.where((inner < inner_size)[:, None], tile, 0.0)
    return tile
