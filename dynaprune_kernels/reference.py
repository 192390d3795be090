"""Every op in plain PyTorch: the truth for tests, the fallback, and the ``dense`` backend.

Works by materialising the live blocks as a dense weight and calling the vendor's library, which is also the
right thing to do at high density. No function here syncs with the host. Shapes: ``values [capacity, bi,
bo]``, ``x [tokens, in]`` or ``[N, C, H, W]``, ``index`` as in :mod:`dynaprune_kernels.index`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dynaprune_kernels import index_check
from dynaprune_kernels.backends.memory import with_memory
from dynaprune_kernels.geometry import Block, ConvGeometry, ceil_div
from dynaprune_kernels.index import (
    N_LIVE,
    N_SLOTS,
    OVERFLOW,
    column_list_of_block,
    column_lists,
    sections,
)
from dynaprune_kernels.memory_format import in_format


def _entries(
    index: Tensor, rows: int, columns: int, capacity: int, lists: int | None
) -> tuple[Tensor, Tensor]:
    """Block number and slot of each of ``capacity`` entries (int64); dead entries point one past the end.

    An index with another number of column lists than ``lists``, where that is known, raises ValueError.

    On a CPU a corrupted index raises ValueError. On a GPU, and in compiled code, torch's own indexing stops
    at numbers outside the tensors, and an index that is wrong within them is taken at its word.
    """
    s = sections(index, rows, capacity)
    if lists is not None and s.col_order.numel() != lists:
        raise ValueError(
            f"expected an index with {lists} column lists, got {s.col_order.numel()} by its length "
            f"{index.numel()}"
        )
    if index_check.readable(index):
        index_check.check_index(index, rows, columns, capacity)
    live = torch.arange(capacity, device=index.device) < s.header[N_LIVE]
    slot = torch.where(live, s.row_slots, capacity).long()
    block = torch.cat([s.block_of_slot, s.block_of_slot.new_full((1,), rows * columns)])[slot]
    return block.long(), slot


def _blocks_by_position(
    values: Tensor, index: Tensor, rows: int, columns: int, lists: int | None = None
) -> Tensor:
    """Live blocks at their places, zeros elsewhere: ``[rows * columns, bi, bo]``."""
    block, slot = _entries(index, rows, columns, values.shape[0], lists)
    placed = values.new_zeros(rows * columns + 1, *values.shape[1:])
    placed[block] = values[slot.clamp(max=values.shape[0] - 1)]
    return placed[:-1]


def _blocks_by_slot(
    blocks: Tensor, index: Tensor, rows: int, columns: int, capacity: int, lists: int
) -> Tensor:
    """The inverse: blocks ``[rows * columns, bi, bo]`` gathered into slots, zeros in unlisted ones."""
    block, slot = _entries(index, rows, columns, capacity, lists)
    by_slot = blocks.new_zeros(capacity + 1, *blocks.shape[1:])
    by_slot[slot] = blocks[block.clamp(max=rows * columns - 1)]
    return by_slot[:-1]


def _live(index: Tensor, rows: int, columns: int, capacity: int, lists: int) -> Tensor:
    """Live mask, bool ``[rows * columns]``."""
    block, _ = _entries(index, rows, columns, capacity, lists)
    return index.new_zeros(rows * columns + 1, dtype=torch.bool).index_fill_(0, block, True)[:-1]


def dense_to_blocks(weight: Tensor, block: tuple[int, int], conv: ConvGeometry | None = None) -> Tensor:
    """Cut a dense weight into blocks ``[rows * columns, bi, bo]``; ragged edges are padded with zeros.

    Args:
        weight: ``[out, in]``, or ``[out, in / groups, kh, kw]`` with ``conv``.
    """
    bo, bi = block
    blocks = _cut(weight, block, conv)
    return blocks.permute(0, 2, 3, 4, 1).reshape(-1, bi, bo).contiguous()


def chosen_blocks(
    weight: Tensor, block: tuple[int, int], conv: ConvGeometry | None, numbers: Tensor
) -> Tensor:
    """Those of :func:`dense_to_blocks` with the ``numbers`` (int64 ``[count]``): ``[count, bi, bo]``.

    No other block is copied where no edge is ragged and a convolution's memory is channels-last.
    """
    blocks = _cut(weight, block, conv)
    taps, channel_blocks = blocks.shape[2:4]
    row, rest = numbers // (taps * channel_blocks), numbers % (taps * channel_blocks)
    found = blocks[row, :, rest // channel_blocks, rest % channel_blocks]
    return found.transpose(1, 2).contiguous()


def _cut(weight: Tensor, block: tuple[int, int], conv: ConvGeometry | None) -> Tensor:
    """A dense weight as ``[rows, bo, taps, channel blocks, bi]``, ragged edges padded with zeros.

    A view where nothing is padded and a convolution's memory is channels-last.
    """
    bo, bi = block
    if conv is not None:
        weight = weight.permute(0, 2, 3, 1).reshape(weight.shape[0], conv.taps, -1)
    else:
        weight = weight.unsqueeze(1)
    out, taps, inputs = weight.shape
    if inputs % bi or out % bo:
        weight = F.pad(weight, (0, -inputs % bi, 0, 0, 0, -out % bo))
    return weight.reshape(weight.shape[0] // bo, bo, taps, weight.shape[2] // bi, bi)


def blocks_to_dense(
    blocks: Tensor, out_features: int, in_features: int, conv: ConvGeometry | None = None
) -> Tensor:
    """Inverse of :func:`dense_to_blocks`; ``in_features`` is ``in / groups`` for a convolution."""
    bi, bo = blocks.shape[1:]
    taps = 1 if conv is None else conv.taps
    rows, channel_blocks = ceil_div(out_features, bo), ceil_div(in_features, bi)
    weight = blocks.reshape(rows, taps, channel_blocks, bi, bo).permute(0, 4, 1, 2, 3)
    weight = weight.reshape(rows * bo, taps, channel_blocks * bi)[:out_features, :, :in_features]
    if conv is None:
        return weight.reshape(out_features, in_features)
    return (
        weight.reshape(out_features, conv.kernel_h, conv.kernel_w, in_features)
        .permute(0, 3, 1, 2)
        .contiguous()
    )


def dense_weight(
    values: Tensor, index: Tensor, out_features: int, in_features: int, conv: ConvGeometry | None = None
) -> Tensor:
    """The dense weight of the live blocks: ``[out, in]`` or ``[out, in / groups, kh, kw]``."""
    rows, columns = _grid(Block.of(values), out_features, in_features, conv)
    blocks = _blocks_by_position(values, index, rows, columns, column_lists(columns, conv))
    return blocks_to_dense(blocks, out_features, in_features, conv)


def _grid(block: Block, out_features: int, in_features: int, conv: ConvGeometry | None) -> tuple[int, int]:
    bo, bi = block
    taps = 1 if conv is None else conv.taps
    return ceil_div(out_features, bo), taps * ceil_div(in_features, bi)


@with_memory
def linear_forward(
    x: Tensor, values: Tensor, bias: Tensor | None, index: Tensor, out_features: int
) -> Tensor:
    """``y = x W^T + b`` over live blocks, ``[tokens, out]``."""
    return F.linear(x, dense_weight(values, index, out_features, x.shape[1]), bias)


@with_memory
def linear_dgrad(dy: Tensor, values: Tensor, index: Tensor, in_features: int) -> Tensor:
    """``dx = dy W`` over live blocks, ``[tokens, in]``."""
    return dy @ dense_weight(values, index, dy.shape[1], in_features)


@with_memory
def linear_wgrad(dy: Tensor, x: Tensor, index: Tensor, capacity: int, block: Block) -> Tensor:
    """``dW = dy^T x`` at live blocks, ``[capacity, bi, bo]``, zeros in unlisted slots and in padding."""
    return _wgrad_from_dense(dy.t() @ x, index, capacity, block, None)


@with_memory
def linear_wgrad_saliency(dy: Tensor, x: Tensor, values: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """wgrad and, per block, the signed sum of weight x gradient (float32, or float64 of float64 input)."""
    return _wgrad_saliency_from_dense(dy.t() @ x, values, index, None)


@with_memory
def linear_probe(dy: Tensor, x: Tensor, index: Tensor, capacity: int, block: Block, probe: Tensor) -> Tensor:
    """Squared norm of the dense gradient at each block that is not live, ``[rows * columns]``; else zeros.

    All zeros while the bool ``probe`` is false.
    """
    if _is_off(probe):
        return _no_probe(dy.shape[1], x.shape[1], block, None, x)
    return _probe_from_dense(dy.t() @ x, index, capacity, block, None, probe)


@with_memory
def conv2d_forward(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: Tensor,
    out_channels: int,
    conv: ConvGeometry,
    channels_last: bool = True,
) -> Tensor:
    """Convolution over live (tap, channel block) entries, ``[N, out_channels, OH, OW]``.

    In channels-last or in contiguous memory, as ``channels_last`` says.
    """
    weight = dense_weight(values, index, out_channels, x.shape[1] // conv.groups, conv)
    x = in_format(x, channels_last)
    x, padding = _padded(x, conv)
    y = F.conv2d(x, weight, bias, conv[2:4], padding, conv[6:8], conv.groups)
    return in_format(y, channels_last)


def _padded(x: Tensor, conv: ConvGeometry) -> tuple[Tensor, list[int]]:
    """Input and padding of the vendor's convolution: where that is oneDNN and a tap meets only padding, the
    input with its padding written down. oneDNN reads outside its memory there."""
    if x.device.type != "cpu" or not _a_tap_meets_only_padding(x.shape, conv):
        return x, [conv.padding_h, conv.padding_w]
    return F.pad(x, (conv.padding_w, conv.padding_w, conv.padding_h, conv.padding_h)), [0, 0]


def _a_tap_meets_only_padding(size: torch.Size, conv: ConvGeometry) -> bool:
    """Whether a position of the kernel lies outside ``[N, C, H, W]`` for every output."""
    for dim, outputs in enumerate(conv.output_size(size[2], size[3])):
        kernel, stride, padding, dilation = conv[dim:8:2]
        length = size[dim + 2]
        if (outputs - 1) * stride < padding or (kernel - 1) * dilation - padding >= length:
            return True
        # A longer stride may step over the input. Residues repeat, and at most `length` of them meet it.
        taps = range(min(kernel, length + 1) if stride > length else 0)
        if any((tap * dilation - padding) % stride >= length for tap in taps):
            return True
    return False


@with_memory
def conv2d_dgrad(
    dy: Tensor,
    values: Tensor,
    index: Tensor,
    input_size: list[int],
    conv: ConvGeometry,
    channels_last: bool = True,
) -> Tensor:
    """Gradient of the input, ``input_size``, in channels-last or in contiguous memory."""
    weight = dense_weight(values, index, dy.shape[1], input_size[1] // conv.groups, conv)
    dx = _convolution_backward(dy, dy.new_empty(input_size), weight, conv, wgrad=False)
    return in_format(dx, channels_last)


@with_memory
def conv2d_wgrad(
    dy: Tensor, x: Tensor, index: Tensor, capacity: int, block: Block, conv: ConvGeometry
) -> Tensor:
    """Gradient of the values at live blocks, ``[capacity, bi, bo]``, zeros in unlisted slots and padding."""
    return _wgrad_from_dense(_dense_conv_wgrad(dy, x, conv), index, capacity, block, conv)


@with_memory
def conv2d_wgrad_saliency(
    dy: Tensor, x: Tensor, values: Tensor, index: Tensor, conv: ConvGeometry
) -> tuple[Tensor, Tensor]:
    """wgrad and, per block, the signed sum of weight x gradient."""
    return _wgrad_saliency_from_dense(_dense_conv_wgrad(dy, x, conv), values, index, conv)


@with_memory
def conv2d_probe(
    dy: Tensor,
    x: Tensor,
    index: Tensor,
    capacity: int,
    block: Block,
    conv: ConvGeometry,
    probe: Tensor,
) -> Tensor:
    """Squared norms of the dense gradient's blocks that are not live; all zeros while ``probe`` is false."""
    if _is_off(probe):
        return _no_probe(dy.shape[1], x.shape[1] // conv.groups, block, conv, x)
    return _probe_from_dense(_dense_conv_wgrad(dy, x, conv), index, capacity, block, conv, probe)


def _dense_conv_wgrad(dy: Tensor, x: Tensor, conv: ConvGeometry) -> Tensor:
    shape = (dy.shape[1], x.shape[1] // conv.groups, conv.kernel_h, conv.kernel_w)
    return _convolution_backward(dy, x, x.new_empty(shape), conv, wgrad=True)


def _convolution_backward(
    dy: Tensor, x: Tensor, weight: Tensor, conv: ConvGeometry, *, wgrad: bool
) -> Tensor:
    if dy.numel() == 0:  # the vendor's backward rejects an empty batch
        return torch.zeros_like(weight if wgrad else x)
    height, width = x.shape[2:]
    x, padding = _padded(x, conv)
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy,
        x,
        weight,
        None,
        conv[2:4],
        padding,
        conv[6:8],
        False,
        [0, 0],
        conv.groups,
        [not wgrad, wgrad, False],
    )
    if wgrad:
        return dw
    top, left = conv.padding_h - padding[0], conv.padding_w - padding[1]
    return dx[:, :, top : top + height, left : left + width]


def _wgrad_from_dense(
    grad: Tensor, index: Tensor, capacity: int, block: Block, conv: ConvGeometry | None
) -> Tensor:
    rows, columns = _grid(block, grad.shape[0], grad.shape[1], conv)
    blocks = dense_to_blocks(grad, block, conv)
    return _blocks_by_slot(blocks, index, rows, columns, capacity, column_lists(columns, conv))


def _wgrad_saliency_from_dense(
    grad: Tensor, values: Tensor, index: Tensor, conv: ConvGeometry | None
) -> tuple[Tensor, Tensor]:
    block = Block.of(values)
    accumulate = _accumulator(values.dtype)
    weight = dense_weight(values, index, grad.shape[0], grad.shape[1], conv)
    signed = dense_to_blocks(weight.to(accumulate) * grad.to(accumulate), block, conv).sum((1, 2))
    return _wgrad_from_dense(grad, index, values.shape[0], block, conv), signed


def _is_off(probe: Tensor) -> bool:
    """Whether the host knows, without waiting for a device, that the probe is off."""
    return probe.device.type == "cpu" and not probe


def _no_probe(
    out_features: int, in_features: int, block: Block, conv: ConvGeometry | None, x: Tensor
) -> Tensor:
    rows, columns = _grid(block, out_features, in_features, conv)
    return x.new_zeros(rows * columns, dtype=_accumulator(x.dtype))


def _probe_from_dense(
    grad: Tensor,
    index: Tensor,
    capacity: int,
    block: Block,
    conv: ConvGeometry | None,
    probe: Tensor,
) -> Tensor:
    rows, columns = _grid(block, grad.shape[0], grad.shape[1], conv)
    norms = dense_to_blocks(grad, block, conv).to(_accumulator(grad.dtype)).square().sum((1, 2))
    live = _live(index, rows, columns, capacity, column_lists(columns, conv))
    return norms.masked_fill(live | ~probe, 0)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@with_memory
def block_saliency(
    values: Tensor, grad: Tensor, index: Tensor, rows: int, columns: int
) -> tuple[Tensor, Tensor]:
    """Sums over each live block and over each output.

    Returns:
        stats ``[4, rows * columns]``: sum w^2, sum g^2, sum |w g|, sum w g (zeros where not live), and
        neuron ``[rows * bo]``: sum of w g over all inputs of an output, which equals the sum over the batch
        of pre-activation x its gradient. float32, or float64 of float64 values.
    """
    accumulate = _accumulator(values.dtype)
    w = _blocks_by_position(values, index, rows, columns).to(accumulate)
    g = _blocks_by_position(grad, index, rows, columns).to(accumulate)
    wg = w * g
    stats = torch.stack(
        [w.square().sum((1, 2)), g.square().sum((1, 2)), wg.abs().sum((1, 2)), wg.sum((1, 2))]
    )
    neuron = wg.reshape(rows, columns, *wg.shape[1:]).sum((1, 2)).reshape(-1)
    return stats, neuron


@with_memory
def layout_update(
    mask: Tensor,
    slot_of_block: Tensor,
    index: Tensor,
    capacity: int,
    conv: ConvGeometry | None,
    release: bool,
) -> None:
    """Rebuild slots and indices from ``mask`` in place (see :meth:`BlockLayout.update_` for the rules).

    A byte of ``mask`` that is not 0 is true, whatever it is. On a GPU a slot outside the capacity counts as
    none, and a slot of two blocks stays one of both: to refuse them would wait for the device.

    Raises:
        ValueError: on a CPU, slots outside -1 .. capacity - 1, or a slot of two blocks.
    """
    rows, columns = mask.shape
    blocks, device = rows * columns, mask.device
    lists = column_lists(columns, conv)
    s = sections(index, rows, capacity)
    number = torch.arange(blocks, device=device)
    live = mask.reshape(-1).view(torch.uint8) != 0
    slot = slot_of_block.reshape(-1).long()
    below = slot < -1
    if release:
        slot = torch.where(live, slot, -1)
    outside = below | (slot >= capacity)
    if index_check.readable(slot):
        held = slot[slot >= 0]
        if bool(outside.any()) or held.unique().numel() != held.numel():
            raise ValueError(
                f"layout_update: expected slots of slot_of_block from -1 on and below capacity {capacity}, "
                "each at most once"
            )
    slot = torch.where(outside, -1, slot)

    has_slot = slot >= 0
    taken = torch.zeros(capacity + 1, dtype=torch.bool, device=device)
    taken[torch.where(has_slot, slot, capacity)] = True
    free_slots = torch.argsort(taken[:-1].to(torch.uint8), stable=True)
    wants = live & ~has_slot
    rank = torch.cumsum(wants, 0) - 1
    served = wants & (rank < capacity - has_slot.sum())
    slot = torch.where(served, free_slots[rank.clamp(0, capacity - 1)], slot)
    dropped = wants & ~served
    live &= ~dropped

    mask.copy_(live.view_as(mask))
    slot_of_block.copy_(slot.view_as(slot_of_block))
    block_of_slot = torch.full((capacity + 1,), -1, dtype=torch.int64, device=device)
    block_of_slot[torch.where(slot >= 0, slot, capacity)] = number
    s.block_of_slot.copy_(block_of_slot[:-1])

    n_live = live.sum()
    s.header.zero_()
    s.header[N_LIVE], s.header[OVERFLOW], s.header[N_SLOTS] = n_live, dropped.sum(), (slot >= 0).sum()
    valid = torch.arange(capacity, device=device) < n_live

    by_row = torch.argsort((~live).to(torch.uint8), stable=True)[:capacity]
    s.row_cols.copy_(torch.where(valid, by_row % columns, -1))
    s.row_slots.copy_(torch.where(valid, slot[by_row], -1))
    row_count = live.view(rows, columns).sum(1)
    _write_pointers(s.row_ptr, s.row_order, row_count)

    list_of_block = column_list_of_block(rows, columns, conv, device).reshape(-1)
    channel_blocks = columns if conv is None else columns // conv.taps
    tap, row = number % columns // channel_blocks, number // columns
    order = torch.argsort((list_of_block * (columns // channel_blocks) + tap) * rows + row)
    by_list = order[torch.argsort((~live[order]).to(torch.uint8), stable=True)[:capacity]]
    s.col_rows.copy_(torch.where(valid, by_list // columns, -1))
    s.col_cols.copy_(torch.where(valid, by_list % columns, -1))
    s.col_slots.copy_(torch.where(valid, slot[by_list], -1))
    list_count = torch.zeros(lists, dtype=torch.int64, device=device).index_add_(
        0, list_of_block, live.long()
    )
    _write_pointers(s.col_ptr, s.col_order, list_count)


def _write_pointers(pointers: Tensor, order: Tensor, count: Tensor) -> None:
    pointers[0] = 0
    pointers[1:] = torch.cumsum(count, 0)
    order.copy_(torch.argsort(count, descending=True, stable=True))
