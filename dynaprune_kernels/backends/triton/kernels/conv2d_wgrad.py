"""wgrad of a 2-D convolution at live blocks, and the gradient probe at the others."""

import triton
import triton.language as tl

from dynaprune_kernels.backends.triton.kernels.packed_index import below, chunk_of_program, is_live, row_lists
from dynaprune_kernels.backends.triton.kernels.weight_gradient import store_blocks, store_norms


@triton.jit
def gather_pixels(
    x,
    position,
    position_valid,
    t,
    u,
    channel,
    channel_valid,
    x_h,
    x_w,
    channels,
    y_h,
    y_w,
    stride_h,
    stride_w,
):
    """What taps see of ``x [images, x_h, x_w, channels]``, zeros outside: columns of im2col, never stored.

    Args:
        position: output positions [S], numbered over images, rows and columns.
        t, u: the taps' shifts, [K, 1] or scalars; channel, channel_valid: [K, 1].

    Returns:
        ``[K, S]``.
    """
    # image, h, w, first: [S]; shift: [K, 1] or a scalar; inside, mask: [K, S]
    image = position // (y_h * y_w)
    h = position // y_w % y_h * stride_h
    w = position % y_w * stride_w
    first = ((image.to(tl.int64) * x_h + h) * x_w + w) * channels
    shift = (t * x_w + u) * channels + channel
    inside = (h[None, :] + t >= 0) & (h[None, :] + t < x_h) & (w[None, :] + u >= 0) & (w[None, :] + u < x_w)
    mask = position_valid[None, :] & inside & channel_valid
    return tl.load(x + first[None, :] + shift, mask=mask, other=0.0)


@triton.jit(
    do_not_specialize=[
        "positions", "rows", "columns", "capacity", "positions_per_split", "x_h", "x_w", "y_h", "y_w",
        "channel_blocks", "rows_per_group", "pad_h", "pad_w",
    ]
)  # fmt: skip
def conv2d_wgrad_kernel(
    x,  # [images, x_h, x_w, channels], zeros behind each group's channels
    dy,  # [positions, dy_size], positions = images * y_h * y_w, zeros behind outer_size
    dvalues,  # [capacity, BI, BO], zeros before
    partial,  # [SPLITS, capacity, BI, BO] float32, or None
    values,  # [capacity, BI, BO], or None
    signed,  # [rows * columns] float32, zeros before, or None
    index,
    positions,
    positions_per_split,
    x_h,
    x_w,
    channels,
    y_h,
    y_w,
    x_size,  # channels of ``x`` in one group
    group_channels,  # those that are real
    dy_size,
    outer_size,
    rows,
    columns,
    capacity,
    channel_blocks,
    rows_per_group,
    kernel_w,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dil_h,
    dil_w,
    BI: tl.constexpr,
    BO: tl.constexpr,
    MERGE: tl.constexpr,
    RAGGED: tl.constexpr,
    SALIENCY: tl.constexpr,
    SPLITS: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    _, row_cols, row_slots = row_lists(index, rows, capacity)
    row, begin, end = chunk_of_program(tl.program_id(0), index, rows, columns, capacity, MERGE)
    if begin >= end:
        return
    split = tl.program_id(1)
    first = split * positions_per_split
    last = tl.minimum(first + positions_per_split, positions)

    m = tl.arange(0, MERGE * BI)  # [MERGE * BI]
    outer = row * BO + tl.arange(0, BO)  # [BO]
    first_channel = row // rows_per_group * x_size
    if MERGE == 1:
        column = tl.load(row_cols + begin)
        tap = column // channel_blocks
        t = tap // kernel_w * dil_h - pad_h
        u = tap % kernel_w * dil_w - pad_w
        inner = column % channel_blocks * BI + m
        inner_valid = (inner >= 0) & below(column, columns)
    else:
        inner_valid = begin + m // BI < end  # [MERGE * BI], as column, tap, inner
        column = tl.load(row_cols + begin + m // BI, mask=inner_valid, other=0)
        tap = column // channel_blocks
        t = (tap // kernel_w * dil_h - pad_h)[:, None]
        u = (tap % kernel_w * dil_w - pad_w)[:, None]
        inner = tl.max_contiguous(tl.multiple_of(column % channel_blocks * BI + m % BI, BI), BI)
        inner_valid &= below(column, columns)
    outer_valid = outer >= 0
    if RAGGED:
        inner_valid = inner_valid & (inner < x_size)
        outer_valid = outer < dy_size
    acc = tl.zeros([MERGE * BI, BO], tl.float32)
    for start in range(first, last, STEP):
        position = start + tl.arange(0, STEP)  # [STEP]
        valid = position < last
        x_tile = gather_pixels(
            x, position, valid, t, u, (first_channel + inner)[:, None], inner_valid[:, None],
            x_h, x_w, channels, y_h, y_w, stride_h, stride_w,
        )  # [MERGE * BI, STEP]  # fmt: skip
        dy_at = dy + position.to(tl.int64)[:, None] * dy_size + outer[None, :]
        dy_tile = tl.load(dy_at, mask=valid[:, None] & outer_valid[None, :], other=0.0)  # [STEP, BO]
        acc = tl.dot(x_tile, dy_tile, acc, input_precision=PRECISION)
    store_blocks(
        acc, dvalues, partial, values, signed, row_cols, row_slots, row, begin, end, group_channels,
        outer_size, columns, channel_blocks, capacity, split, BI, BO, MERGE, RAGGED, SALIENCY, SPLITS,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "positions", "rows", "columns", "capacity", "x_h", "x_w", "y_h", "y_w", "channel_blocks",
        "rows_per_group", "search_steps", "pad_h", "pad_w",
    ]
)  # fmt: skip
def conv2d_probe_kernel(
    x,  # [images, x_h, x_w, channels], zeros behind each group's channels
    dy,  # [positions, dy_size], zeros behind the outputs
    norms,  # [rows * columns] float32
    probe,  # uint8, one element: zeros are written while it is 0
    index,
    positions,
    x_h,
    x_w,
    channels,
    y_h,
    y_w,
    x_size,  # channels of ``x`` in one group
    dy_size,
    rows,
    columns,
    capacity,
    channel_blocks,
    rows_per_group,
    search_steps,
    kernel_w,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dil_h,
    dil_w,
    BI: tl.constexpr,
    BO: tl.constexpr,
    GI: tl.constexpr,  # channel blocks of one tap per tile
    GO: tl.constexpr,  # rows of one group per tile
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_ptr, row_cols, _ = row_lists(index, rows, capacity)
    row_tiles = tl.cdiv(rows_per_group, GO)
    groups = rows // rows_per_group
    pid = tl.program_id(0)
    group = pid % (row_tiles * groups) // row_tiles
    within_group = pid % row_tiles * GO + tl.arange(0, GO)  # [GO], as row
    row = group * rows_per_group + within_group
    channel_tiles = tl.cdiv(channel_blocks, GI)
    tap = pid // (row_tiles * groups) // channel_tiles
    channel_block = pid // (row_tiles * groups) % channel_tiles * GI + tl.arange(0, GI)
    column = tap * channel_blocks + channel_block  # [GI]
    inside = (within_group < rows_per_group)[None, :] & (channel_block < channel_blocks)[:, None]
    # inside, live: [GI, GO]
    live = is_live(row_ptr, row_cols, row[None, :], column[:, None], inside, capacity, search_steps)
    wanted = tl.sum(tl.sum((inside & (live == 0)).to(tl.int32), axis=1), axis=0)
    acc = tl.zeros([GI * BI, GO * BO], tl.float32)
    if (tl.load(probe) != 0) & (wanted > 0):
        t = tap // kernel_w * dil_h - pad_h
        u = tap % kernel_w * dil_w - pad_w
        inner = pid // (row_tiles * groups) % channel_tiles * (GI * BI) + tl.arange(0, GI * BI)
        outer = (group * rows_per_group + pid % row_tiles * GO) * BO + tl.arange(0, GO * BO)
        channel = group * x_size + inner  # [GI * BI], as inner
        inner_valid = inner < x_size
        outer_valid = outer < dy_size
        for start in range(0, positions, STEP):
            position = start + tl.arange(0, STEP)
            valid = position < positions
            x_tile = gather_pixels(
                x, position, valid, t, u, channel[:, None], inner_valid[:, None],
                x_h, x_w, channels, y_h, y_w, stride_h, stride_w,
            )  # [GI * BI, STEP]  # fmt: skip
            dy_at = dy + position.to(tl.int64)[:, None] * dy_size + outer[None, :]  # [STEP, GO * BO]
            dy_tile = tl.load(dy_at, mask=valid[:, None] & outer_valid[None, :], other=0.0)
            acc = tl.dot(x_tile, dy_tile, acc, input_precision=PRECISION)
    store_norms(acc, norms, live, row[None, :], column[:, None], inside, columns, BI, BO, GI, GO)
