"""One of Hopper's kernels on one problem: ``python -m tests.gpu.one_kernel linear-products 64 wide``.

A process of its own for each, because a kernel that never ends takes its process along. ``--library`` loads
another build of the CUDA kernels, such as one with the watchdog (``make watchdog``), which says where a
kernel waits and ends it.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from dynaprune_kernels import ConvGeometry, _extension
from dynaprune_kernels.backends import dispatch
from tests.gpu.small_set import against
from tests.triton.parity import Case, check_gradients, check_products

OPS = ("linear-products", "linear-wgrad", "conv2d-products", "conv2d-wgrad")
BLOCKS, TILES = (64, 128), ("wide", "narrow")
CONV = ConvGeometry(3, 3, 1, 1, 1, 1)


def choices() -> Iterator[tuple[str, int, str]]:
    """Every op with every block size and width of tiles."""
    return itertools.product(OPS, BLOCKS, TILES)


def case_of(op: str, block: int, tile: str) -> Case:
    """A problem that the op gives to tiles of that width on a GPU of 64 to 256 multiprocessors.

    Tiles of 256 rows are taken where they fill the device; of a hundred rows they are too few.
    """
    wide = tile == "wide"
    if op.startswith("linear"):
        return Case(512, 520, (block, block), "random", 16_500 if wide else 100, torch.bfloat16)
    size = (24, 23) if wide else (5, 7)
    return Case(256, 256, (block, block), "random", 64 if wide else 2, torch.bfloat16, CONV, size)


def load(library: Path) -> None:
    """Load another build of the CUDA kernels than the one beside the package; SystemExit where that fails."""
    found = _extension.find
    _extension.find = lambda name="_C": library if name == "_C_cuda" else found(name)
    status = _extension.load_cuda()
    if not status.loaded:
        raise SystemExit(f"{library}: {status.reason}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("op", choices=OPS)
    parser.add_argument("block", type=int, choices=BLOCKS)
    parser.add_argument("tile", choices=TILES)
    parser.add_argument("--library", type=Path, help="a build of the CUDA kernels")
    options = parser.parse_args(arguments)
    if options.library is not None:
        load(options.library)
    reason = against("cuda")
    if reason is not None:
        raise SystemExit(f"the cuda backend cannot run here: {reason}")
    torch.manual_seed(0)
    case = case_of(options.op, options.block, options.tile)
    print(f"{options.op} {case}", flush=True)
    check = check_gradients if options.op.endswith("wgrad") else check_products
    check(case, "cuda", kernels=dispatch.BACKENDS["cuda"])
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
