"""The CUDA kernels of ``csrc/core``, through their raw ops ``torch.ops.dynaprune_cuda``.

The same functions as :mod:`dynaprune_kernels.backends.cpu`. The library is loaded at the first call.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from dynaprune_kernels import _extension
from dynaprune_kernels.backends.alignment import aligned_blocks, aligned_channels, aligned_rows
from dynaprune_kernels.backends.precision import tf32_allowed
from dynaprune_kernels.geometry import Block, ConvGeometry
from dynaprune_kernels.memory_format import in_format

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BLOCKS = (16, 32, 64, 128)


def why_not(
    op: str,
    device_type: str,
    capability: int | None,
    dtype: torch.dtype,
    block: Block | None = None,
) -> str | None:
    """The reason why the CUDA kernels cannot run ``op``; None if they can.

    Args:
        capability: of the device, 10 x major + minor; None where it is not known.
        block: None for ops that do not depend on them.
    """
    if device_type != "cuda":
        return f"the cuda kernels run on CUDA tensors, got {device_type}"
    status = _extension.load_cuda()
    if not status.loaded:
        return status.reason
    toolkit, driver = toolkit_and_driver()
    if driver < toolkit:
        return (
            f"the cuda kernels were compiled with CUDA {toolkit}, the driver is for CUDA {driver}: update "
            "the driver, or build them with an older toolkit (CUDA_HOME)"
        )
    if capability is not None and not runs_on(capability, architectures()):
        return (
            f"the cuda kernels were compiled for {' '.join(architectures())}, this GPU has compute "
            f"capability {capability // 10}.{capability % 10}; TORCH_CUDA_ARCH_LIST names others for a build"
        )
    if op == "layout_update":
        return None
    if dtype not in DTYPES:
        return f"the cuda kernels take float16, bfloat16 and float32, got {dtype}"
    if block is not None and not all(size in BLOCKS for size in block):
        return f"the cuda kernels take blocks of 16, 32, 64 and 128, got {tuple(block)}"
    return None


def architectures() -> tuple[str, ...]:
    """What the loaded library was compiled for, as TORCH_CUDA_ARCH_LIST has it: ``("8.0", "9.0a")``."""
    return tuple(_raw().architectures().split())


@functools.cache
def toolkit_and_driver() -> tuple[int, int]:
    """CUDA's major version of the compiler, and the newest that the driver runs (0: no driver)."""
    toolkit, driver = (int(version) // 1000 for version in _raw().toolkit_and_driver().split())
    return toolkit, driver


def runs_on(capability: int, architectures: tuple[str, ...]) -> bool:
    """Whether a device of ``capability`` (10 x major + minor) runs what was compiled for ``architectures``.

    Machine code runs on later minor versions, with an ``a`` on its own only; PTX on everything later.
    """
    for architecture in architectures:
        number, ptx = architecture.removesuffix("+PTX"), architecture.endswith("+PTX")
        major, minor = (int(part) for part in number.removesuffix("a").split("."))
        same = capability == 10 * major + minor
        later = capability // 10 == major and capability % 10 >= minor and not number.endswith("a")
        if same or later or (ptx and capability >= 10 * major + minor):
            return True
    return False


@functools.cache
def _raw() -> Any:
    """The raw ops.

    Raises:
        RuntimeError: the library is not there, with the reason.
    """
    status = _extension.load_cuda()
    if not status.loaded:
        raise RuntimeError(status.reason)
    return torch.ops.dynaprune_cuda


def linear_forward(
    x: Tensor, values: Tensor, bias: Tensor | None, index: Tensor, out_features: int
) -> Tensor:
    return _raw().linear_forward(
        aligned_rows(x),
        aligned_blocks(values),
        bias,
        index,
        x.shape[1],
        out_features,
        tf32_allowed(conv=False),
    )


def linear_dgrad(dy: Tensor, values: Tensor, index: Tensor, in_features: int) -> Tensor:
    return _raw().linear_dgrad(
        aligned_rows(dy), aligned_blocks(values), index, in_features, dy.shape[1], tf32_allowed(conv=False)
    )


def linear_wgrad(dy: Tensor, x: Tensor, index: Tensor, capacity: int, block: Block) -> Tensor:
    bo, bi = block
    return _raw().linear_wgrad(
        aligned_rows(dy), aligned_rows(x), index, capacity, bi, bo, x.shape[1], dy.shape[1],
        tf32_allowed(conv=False),
    )  # fmt: skip


def linear_wgrad_saliency(dy: Tensor, x: Tensor, values: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    return _raw().linear_wgrad_saliency(
        aligned_rows(dy), aligned_rows(x), aligned_blocks(values), index, x.shape[1], dy.shape[1],
        tf32_allowed(conv=False),
    )  # fmt: skip


def linear_probe(dy: Tensor, x: Tensor, index: Tensor, capacity: int, block: Block, probe: Tensor) -> Tensor:
    bo, bi = block
    return _raw().linear_probe(
        aligned_rows(dy), aligned_rows(x), index, capacity, bi, bo, x.shape[1], dy.shape[1], probe,
        tf32_allowed(conv=False),
    )  # fmt: skip


def conv2d_forward(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: Tensor,
    out_channels: int,
    conv: ConvGeometry,
    channels_last: bool = True,
) -> Tensor:
    y = _raw().conv2d_forward(
        aligned_channels(x, conv.groups), aligned_blocks(values), bias, index, x.shape[1], out_channels, conv,
        tf32_allowed(conv=True),
    )  # fmt: skip
    return in_format(y.permute(0, 3, 1, 2), channels_last)


def conv2d_dgrad(
    dy: Tensor,
    values: Tensor,
    index: Tensor,
    input_size: list[int],
    conv: ConvGeometry,
    channels_last: bool = True,
) -> Tensor:
    dx = _raw().conv2d_dgrad(
        aligned_channels(dy), aligned_blocks(values), index, dy.shape[1], input_size, conv,
        tf32_allowed(conv=True),
    )  # fmt: skip
    return in_format(dx.permute(0, 3, 1, 2), channels_last)


def conv2d_wgrad(
    dy: Tensor, x: Tensor, index: Tensor, capacity: int, block: Block, conv: ConvGeometry
) -> Tensor:
    bo, bi = block
    return _raw().conv2d_wgrad(
        aligned_channels(dy), aligned_channels(x, conv.groups), index, capacity, bi, bo, x.shape[1],
        dy.shape[1], conv, tf32_allowed(conv=True),
    )  # fmt: skip


def conv2d_wgrad_saliency(
    dy: Tensor, x: Tensor, values: Tensor, index: Tensor, conv: ConvGeometry
) -> tuple[Tensor, Tensor]:
    return _raw().conv2d_wgrad_saliency(
        aligned_channels(dy), aligned_channels(x, conv.groups), aligned_blocks(values), index, x.shape[1],
        dy.shape[1], conv, tf32_allowed(conv=True),
    )  # fmt: skip


def conv2d_probe(
    dy: Tensor,
    x: Tensor,
    index: Tensor,
    capacity: int,
    block: Block,
    conv: ConvGeometry,
    probe: Tensor,
) -> Tensor:
    bo, bi = block
    return _raw().conv2d_probe(
        aligned_channels(dy), aligned_channels(x, conv.groups), index, capacity, bi, bo, x.shape[1],
        dy.shape[1], conv, probe, tf32_allowed(conv=True),
    )  # fmt: skip


def block_saliency(
    values: Tensor, grad: Tensor, index: Tensor, rows: int, columns: int
) -> tuple[Tensor, Tensor]:
    return _raw().block_saliency(aligned_blocks(values), aligned_blocks(grad), index, rows, columns)


def layout_update(
    mask: Tensor,
    slot_of_block: Tensor,
    index: Tensor,
    capacity: int,
    conv: ConvGeometry | None,
    release: bool,
) -> None:
    conv = conv or ConvGeometry(1, 1)
    _raw().layout_update(
        mask, slot_of_block, index, capacity, conv.groups, conv[0:2], conv[2:4], conv[6:8], release
    )
