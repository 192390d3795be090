"""Compiles the launchers' own kernels for a GPU that is not there, exactly as they would be launched."""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dynaprune_kernels.backends.triton import conv2d, launch, layout, linear, saliency

DEVICES = {
    80: launch.Device("A100 (not present)", 80, 108, 166912),
    90: launch.Device("H100 (not present)", 90, 132, 232448),
    100: launch.Device("B200 (not present)", 100, 148, 232448),
}
_POINTERS = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.uint8: "u8",
}


class Launch(NamedTuple):
    """A recorded launch: what a compilation depends on."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, int]


class Resources(NamedTuple):
    """What the compiled kernel takes, and the matrix instruction it uses."""

    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    instruction: str
    bulk_copy: bool
    wide_copies: int  # asynchronous copies of 16 bytes in the PTX


def specialized(kernel: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Launch:
    """The launch as Triton would specialise it: ones are constants, multiples of 16 are known as such."""
    values = dict(zip((p.name for p in kernel.params), arguments, strict=False)) | keywords
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        name, value = parameter.name, values.pop(parameter.name)
        aligned = False
        if (
            parameter.is_constexpr
            or value is None
            or ((value == 1) is True and not parameter.do_not_specialize)
        ):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = "*" + _POINTERS[value.dtype]
            aligned = value.data_ptr() % 16 == 0
        elif isinstance(value, int):
            signature[name] = "i32"
            aligned = value % 16 == 0 and not parameter.do_not_specialize
        else:
            signature[name] = f"tensordesc<{_POINTERS[value.base.dtype]}{list(value.block_shape)}>"
        if aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return Launch(kernel, signature, constants, attributes, values)


@contextlib.contextmanager
def recording(capability: int) -> Iterator[list[Launch]]:
    """Launches inside are recorded, in place of being run, as on a device of this compute capability."""
    launches: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        launches.append(specialized(kernel, arguments, options))

    with contextlib.ExitStack() as stack:
        for module in (linear, conv2d, saliency, layout):
            stack.enter_context(mock.patch.object(module, "launch", record))
        for module in (linear, conv2d):
            stack.enter_context(mock.patch.object(module, "device_of", lambda tensor: DEVICES[capability]))
        yield launches


def compile_for(capability: int, launched: Launch) -> Resources:
    """Compile, and read off what ptxas made of it."""
    source = ASTSource(launched.kernel, launched.signature, launched.constants, launched.attributes)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=launched.options | launch.OPTIONS)
    usage = resource_usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    instructions = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")
    return Resources(
        usage["REG"],
        usage["STACK"],
        usage["LOCAL"],
        compiled.metadata.shared,
        next((name for name in instructions if name in ptx), "none"),
        "cp.async.bulk.tensor" in ptx,
        len(re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", ptx)),
    )


def resource_usage(cubin: bytes) -> dict[str, int]:
    """``REG``, ``STACK``, ``LOCAL``, ... of the one kernel in a cubin, from triton's own cuobjdump."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump()), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}


@functools.cache
def cuobjdump() -> Path:
    """Where triton keeps cuobjdump."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def launches_of(capability: int, run: Callable[[], Any]) -> list[Launch]:
    """What ``run`` launches."""
    with recording(capability) as launches:
        run()
    return launches
