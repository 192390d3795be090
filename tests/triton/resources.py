"""What every kernel takes: ``python -m tests.triton.resources`` writes the table ``resources.csv`` anew."""

from __future__ import annotations

import csv
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from dynaprune_kernels import BlockLayout, ConvGeometry
from dynaprune_kernels.backends import triton as kernels
from tests.triton.compile_only import DEVICES, Launch, Resources, compile_for, launches_of

TABLE = Path(__file__).parent / "resources.csv"
CAPABILITIES = (80, 90, 100)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CONV = ConvGeometry(3, 3, 1, 1, 1, 1)


class Variant(NamedTuple):
    """One op at one size; ``block`` is (outputs, inputs)."""

    op: str
    capability: int
    dtype: str
    block: tuple[int, int]
    ragged: bool = False


def linear_ops(
    dtype: torch.dtype, block: tuple[int, int], ragged: bool = False
) -> dict[str, Callable[[], object]]:
    """Calls of the linear ops on a layer of 1024 or 1000 squared with 4096 tokens; memory is not touched."""
    bo, bi = block
    size = 1000 if ragged else 1024
    layout = BlockLayout(size, size, block)
    values = torch.empty(layout.capacity, bi, bo, dtype=dtype)
    x, dy = torch.empty(4096, size, dtype=dtype), torch.empty(4096, size, dtype=dtype)
    bias, flag = torch.empty(size, dtype=dtype), torch.tensor(True)
    index, capacity = layout.index, layout.capacity
    return {
        "linear_forward": lambda: kernels.linear_forward(x, values, bias, index, size),
        "linear_dgrad": lambda: kernels.linear_dgrad(dy, values, index, size),
        "linear_wgrad": lambda: kernels.linear_wgrad(dy, x, index, capacity, block),
        "linear_wgrad_saliency": lambda: kernels.linear_wgrad_saliency(dy, x, values, index),
        "linear_probe": lambda: kernels.linear_probe(dy, x, index, capacity, block, flag),
    }


def conv2d_ops(
    dtype: torch.dtype, block: tuple[int, int], ragged: bool = False
) -> dict[str, Callable[[], object]]:
    """Calls of the convolution ops, 3x3 with 256 channels, or 250, on 4 images of 16 x 16."""
    bo, bi = block
    size = 250 if ragged else 256
    layout = BlockLayout(size, size, block, conv=CONV)
    values = torch.empty(layout.capacity, bi, bo, dtype=dtype)
    x = torch.empty(4, size, 16, 16, dtype=dtype).contiguous(memory_format=torch.channels_last)
    bias, flag = torch.empty(size, dtype=dtype), torch.tensor(True)
    index, capacity = layout.index, layout.capacity
    return {
        "conv2d_forward": lambda: kernels.conv2d_forward(x, values, bias, index, size, CONV),
        "conv2d_dgrad": lambda: kernels.conv2d_dgrad(x, values, index, list(x.shape), CONV),
        "conv2d_wgrad": lambda: kernels.conv2d_wgrad(x, x, index, capacity, block, CONV),
        "conv2d_wgrad_saliency": lambda: kernels.conv2d_wgrad_saliency(x, x, values, index, CONV),
        "conv2d_probe": lambda: kernels.conv2d_probe(x, x, index, capacity, block, CONV, flag),
    }


def other_ops(
    dtype: torch.dtype, block: tuple[int, int], ragged: bool = False
) -> dict[str, Callable[[], object]]:
    """Calls of the ops without a matrix product."""
    bo, bi = block
    layout = BlockLayout(256, 256, block, conv=CONV)
    values = torch.empty(layout.capacity, bi, bo, dtype=dtype)
    update = (layout.mask, layout.slot_of_block, layout.index, layout.capacity, CONV, True)
    return {
        "block_saliency": lambda: kernels.block_saliency(
            values, values, layout.index, layout.rows, layout.columns
        ),
        "layout_update": lambda: kernels.layout_update(*update),
    }


def variants() -> Iterator[Variant]:
    """Every op for every capability and dtype at 64 x 64; the other blocks where they differ most."""
    matrix = [*linear_ops(torch.float32, (64, 64)), *conv2d_ops(torch.float32, (64, 64))]
    for capability, dtype in itertools.product(CAPABILITIES, DTYPES):
        for op in [*matrix, "block_saliency"]:
            yield Variant(op, capability, dtype, (64, 64))
    for capability in CAPABILITIES:
        yield Variant("layout_update", capability, "fp32", (64, 64))
    others = [((16, 16), 90, "bf16"), ((128, 32), 90, "bf16"), ((128, 128), 90, "bf16")]
    for block, capability, dtype in [*others, ((128, 128), 80, "bf16"), ((128, 128), 80, "fp32")]:
        for op in matrix:
            if not op.endswith("saliency"):
                yield Variant(op, capability, dtype, block)
    for capability, op in itertools.product((80, 90), matrix):
        if not op.endswith("probe"):
            yield Variant(op, capability, "bf16", (64, 64), ragged=True)


def launches(variant: Variant) -> list[Launch]:
    """The launches of a variant, specialised for its device."""
    dtype = DTYPES[variant.dtype]
    ops = linear_ops if variant.op.startswith("linear") else other_ops
    ops = conv2d_ops if variant.op.startswith("conv2d") else ops
    return launches_of(variant.capability, ops(dtype, variant.block, variant.ragged)[variant.op])


def shared_limit(variant: Variant) -> int:
    """Bytes of shared memory that one program may use."""
    return DEVICES[variant.capability].shared_bytes


def resources(variant: Variant) -> dict[str, Resources]:
    """What each kernel of a variant takes, by the kernel's name."""
    return {
        launched.kernel.__name__: compile_for(variant.capability, launched) for launched in launches(variant)
    }


def row(variant: Variant, kernel: str, taken: Resources) -> dict[str, str]:
    """One line of the table."""
    block = f"{variant.block[0]}x{variant.block[1]}" + (" ragged" if variant.ragged else "")
    fields = {"op": variant.op, "kernel": kernel, "capability": variant.capability, "dtype": variant.dtype}
    return {key: str(value) for key, value in {**fields, "block": block, **taken._asdict()}.items()}


def read_table() -> tuple[str, list[dict[str, str]]]:
    """Triton's version when the table was written, and its rows."""
    first, *rest = TABLE.read_text().splitlines()
    return first.removeprefix("# triton "), list(csv.DictReader(rest))


def main() -> None:
    """Compile every variant, print and write the table."""
    rows = []
    for variant in variants():
        for kernel, taken in resources(variant).items():
            rows.append(row(variant, kernel, taken))
            print(*rows[-1].values(), flush=True)
    temporary = TABLE.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        file.write(f"# triton {triton.__version__}\n")
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(TABLE)


if __name__ == "__main__":
    sys.exit(main())
