"""Kernels in Triton's interpreter, in which each tensor of a launch has an address space of its own.

The interpreter keeps an address in 64 bits. Inside :func:`guarded` those of a launch's tensors lie 2^48 bytes
apart, so that an address tells the tensor it was computed from, however far outside of it. Every load and
store is looked up there before the interpreter dereferences the real address: bytes between the rows of a
strided tensor are outside of it, too. Addresses under a mask that is false are free, as on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter

SPACE = 48  # bits of an address within a tensor's space, which the tensor starts in the middle of
MOST_ACCESSES = 100_000  # of one program: what takes more is taken for a loop without end


class Region(NamedTuple):
    """A tensor of the current launch."""

    name: str
    address: int
    size: int  # of an element, in bytes
    owned: Any  # bool per element from the first address on


class GuardedMemory:
    """The tensors of the current launch, and what was counted since :func:`guarded` was entered."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self.accesses = 0  # loads and stores
        self.masked = 0  # addresses outside of their tensor, under a mask that is false
        self.in_program = 0
        self.written: set[str] = set()

    def enter(self, tensor: Tensor) -> int:
        """A guarded address for ``tensor``."""
        last = sum(
            (length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        owned = torch.zeros(last + 1 if tensor.numel() else 0, dtype=torch.bool)
        owned.as_strided(tensor.shape, tensor.stride()).fill_(True)
        name = f"tensor {len(self.regions)} {list(tensor.shape)}"
        region = Region(name, tensor.data_ptr(), tensor.element_size(), owned.numpy())
        self.regions.append(region)
        return (len(self.regions) << SPACE) + (1 << (SPACE - 1)) + tensor.data_ptr() % 16

    def real(self, addresses: Any, mask: Any, size: int, kind: str) -> Any:
        """The real addresses behind guarded ones.

        Raises:
            IndexError: an address where ``mask`` is true lies outside of its tensor; more than
                MOST_ACCESSES accesses of one program.
        """
        self.accesses += 1
        self.in_program += 1
        if self.in_program > MOST_ACCESSES:
            raise IndexError(f"a program with more than {MOST_ACCESSES} accesses")
        number = int(addresses.flat[0]) >> SPACE
        if not 1 <= number <= len(self.regions):
            raise IndexError(f"a {kind} {2 ** (SPACE - 1)} bytes or more away from its tensor")
        region = self.regions[number - 1]
        offset = addresses.astype(np.int64) - ((number << SPACE) + (1 << (SPACE - 1)) + region.address % 16)
        element = offset // region.size
        inside = (element >= 0) & (element < region.owned.size) & (offset % region.size == 0)
        inside[inside] = region.owned[element[inside]] & (size == region.size)
        wrong = np.broadcast_to(mask, inside.shape) & ~inside
        if wrong.any():
            raise IndexError(f"a {kind} outside of {region.name}: element {element[wrong].flat[0]}")
        self.masked += int((~inside).sum())
        if kind == "store":
            self.written.add(region.name)
        return (np.where(inside, offset, 0) + region.address).astype(np.uint64)


@contextlib.contextmanager
def guarded() -> Iterator[GuardedMemory]:
    """Check every access of the kernels that are launched inside; what is wrong raises InterpreterError."""
    memory = GuardedMemory()
    builder = interpreter.interpreter_builder
    convert, load, store = interpreter._implicit_cvt, builder.create_masked_load, builder.create_masked_store
    move, call = builder.set_grid_idx, interpreter.GridExecutor.__call__

    def guarded_convert(argument: Any) -> Any:
        converted = convert(argument)
        if hasattr(argument, "data_ptr"):
            converted.handle.data[:] = memory.enter(argument)
        return converted

    def guarded_load(pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        return load(_moved(memory, pointers, mask, "load"), mask, *rest, **options)

    def guarded_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(_moved(memory, pointers, mask, "store"), value, mask, *rest)

    def next_program(*index: Any) -> None:
        memory.in_program = 0
        move(*index)

    def launched(executor: Any, *arguments: Any, **options: Any) -> None:
        memory.regions.clear()
        call(executor, *arguments, **options)

    replaced: list[tuple[Any, str, Callable[..., Any]]] = [
        (interpreter, "_implicit_cvt", guarded_convert),
        (builder, "create_masked_load", guarded_load),
        (builder, "create_masked_store", guarded_store),
        (builder, "set_grid_idx", next_program),
        (interpreter.GridExecutor, "__call__", launched),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, function in replaced:
            stack.enter_context(mock.patch.object(owner, name, function))
        yield memory


def _moved(memory: GuardedMemory, pointers: Any, mask: Any, kind: str) -> Any:
    size = pointers.get_element_ty().primitive_bitwidth // 8
    real = memory.real(pointers.data, mask.data, max(size, 1), kind)
    return interpreter.TensorHandle(real, pointers.dtype)
