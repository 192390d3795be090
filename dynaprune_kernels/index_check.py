"""Whether a packed index is what ``layout_update`` writes, asked by the reference before it reads one.

Anything may have written to an index: averaging copies, numpy views, ``.data``. Where the compiled
extension is loaded its kernels' check is called, elsewhere the same in torch's ops. Both name one number.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from dynaprune_kernels import _extension
from dynaprune_kernels.index import N_LIVE, index_size, sections

_CORRUPTED = "index is corrupted: "
_Fault = tuple[str, Tensor, Tensor, str]  # section, numbers in it, which of them are wrong, what was expected


def readable(tensor: Tensor) -> bool:
    """Whether the host may look at the numbers: neither does it wait for a device, nor is this a trace."""
    return tensor.device.type == "cpu" and type(tensor) is Tensor and not torch.compiler.is_compiling()


def check_index(index: Tensor, rows: int, columns: int, capacity: int) -> None:
    """Refuse an index whose row lists could not be followed; of the column lists the pointers are checked.

    Args:
        index: int32, of a length that some number of column lists explains; :func:`readable`.

    Raises:
        ValueError: names the first number that is wrong.
    """
    if _extension.load().loaded and torch._C._len_torch_dispatch_stack() == 0:
        _check_compiled(index, rows, columns, capacity)
    else:
        check_with_torch(index, rows, columns, capacity)


def _check_compiled(index: Tensor, rows: int, columns: int, capacity: int) -> None:
    lists = (index.numel() - index_size(rows, 0, capacity)) // 2
    # A kernel over one channel block with a stride phase for each list: row lists are alike in any geometry.
    conv = (1, columns, lists, 1, 0, 0, 1, 1, 1)
    try:
        torch.ops.dynaprune_cpu.check_index(index, rows, columns, capacity, conv, False)
    except RuntimeError as error:
        _, corrupted, what = str(error).partition(_CORRUPTED)
        if not corrupted:
            raise
        raise ValueError(corrupted + what.partition("\n")[0]) from None


def check_with_torch(index: Tensor, rows: int, columns: int, capacity: int) -> None:
    """As :func:`check_index`, without the extension; a part relies on what the parts before it refuse."""
    s = sections(index, rows, capacity)
    live = int(s.header[N_LIVE])
    in_header = torch.tensor([live])
    wrong_count = (in_header < 0) | (in_header > capacity)
    _refuse_first([("header", in_header, wrong_count, "a number of live blocks up to the capacity")])
    for section, pointers in (("row_ptr", s.row_ptr), ("col_ptr", s.col_ptr)):
        place, last = torch.arange(pointers.numel()), pointers.numel() - 1
        descends = (pointers < pointers.roll(1)) & (place > 0)
        miscounts = (pointers != live) & (place == last)
        _refuse_first(
            [
                (section, pointers, (pointers != 0) & (place == 0), "0"),
                (section, pointers, descends, "no less than the element before"),
                (section, pointers, miscounts, "the number of live blocks in the header"),
            ]
        )

    column, slot = s.row_cols[:live].long(), s.row_slots[:live].long()
    entry, ptr = torch.arange(live), s.row_ptr.long()
    row = torch.searchsorted(ptr[1:], entry, right=True)
    descends = (ptr[row] < entry) & (column <= column.roll(1))
    outside = (slot < 0) | (slot >= capacity)
    named = s.block_of_slot[slot.masked_fill(outside, 0)]
    _refuse_first(
        [
            ("row_cols", column, (column < 0) | (column >= columns), "a block column of the weight"),
            ("row_cols", column, descends, "ascending block columns in a row"),
            ("row_slots", slot, outside, "a slot below the capacity"),
            ("block_of_slot", named, named != row * columns + column, "the block that lists the slot"),
        ],
        {"block_of_slot": slot},
    )

    order = s.row_order.long()
    outside = (order < 0) | (order >= rows)
    length = ptr.diff()[order.masked_fill(outside, 0)]
    before, length_before = order.roll(1), length.roll(1)
    misplaced = (length > length_before) | ((length == length_before) & (order <= before))
    misplaced[:1] = False
    _refuse_first(
        [
            ("row_order", order, outside, "a number of a list"),
            ("row_order", order, misplaced, "every list once, the longest first"),
        ]
    )


def _refuse_first(faults: list[_Fault], places: Mapping[str, Tensor] = MappingProxyType({})) -> None:
    """Raise ValueError that names the first number that is wrong; of several faults of it the first one.

    Args:
        places: where the numbers of a section stand in it, if not one behind the other from its first on.
    """
    wrong = torch.stack([fault[2] for fault in faults])
    if bool(wrong.any()):
        at = int(wrong.any(0).to(torch.uint8).argmax())
        section, numbers, _, expected = faults[int(wrong[:, at].to(torch.uint8).argmax())]
        place = int(places[section][at]) if section in places else at
        raise ValueError(
            f"{_CORRUPTED}{section}[{place}] is {int(numbers[at])}, expected {expected} "
            "(something other than layout_update wrote to it)"
        )
