"""What a GPU's memories deliver: ``python -m benchmarks.gpu_bandwidth --out bandwidth.csv``.

Every program reads tiles of 64 x 128 bfloat16 and adds them up, by tensor descriptors (the copy engine, from
Hopper on) or by pointers. A buffer that the L2 cache holds gives what flows from L2 to the multiprocessors,
which is what limits the sparse products by the model; a large one gives the device memory's. Every sum is
checked: what was not read shows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynaprune.experiment.write import write_csv

ROWS, COLUMNS = 64, 128
TILE_BYTES = 2 * ROWS * COLUMNS
SIZES = {"L2": 24 * 2**20, "device memory": 2 * 2**30}


@triton.jit
def read_kernel(
    source,
    sums,
    tiles,
    repeat,
    TMA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``sums[p]``: of all elements of the ``repeat`` tiles ``[ROWS, COLUMNS]`` that program p reads."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    offsets = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    for step in tl.range(0, repeat, num_stages=STAGES):
        # Neighbours read neighbouring tiles, as the products do.
        tile = (program + step * programs) % tiles
        if TMA:
            part = source.load([tile * ROWS, 0])
        else:
            part = tl.load(source + tile.to(tl.int64) * ROWS * COLUMNS + offsets)
        total += part.to(tl.float32)
    tl.store(sums + program, tl.sum(total))


def reader(source: Tensor, programs: int, repeat: int, *, tma: bool, stages: int = 4) -> Callable[[], Tensor]:
    """A call that reads ``programs * repeat`` tiles of ``source`` (bfloat16 ``[n, 128]``) and returns the sum
    of each program, float32 ``[programs]``."""
    from dynaprune_kernels.backends.triton.linear import descriptor

    sums = torch.empty(programs, device=source.device)
    tiles = source.shape[0] // ROWS
    given: Any = descriptor(source, [ROWS, COLUMNS]) if tma else source

    def run() -> Tensor:
        read_kernel[(programs,)](
            given, sums, tiles, repeat, TMA=tma, ROWS=ROWS, COLUMNS=COLUMNS, STAGES=stages, num_warps=8
        )
        return sums

    return run


def expected_sums(source: Tensor, programs: int, repeat: int) -> Tensor:
    """What `reader` must return, float64 on the device."""
    by_tile = source.view(-1, ROWS * COLUMNS).double().sum(1)
    tile = torch.arange(programs, device=source.device)[:, None]
    tile = (tile + torch.arange(repeat, device=source.device) * programs) % len(by_tile)
    return by_tile[tile].sum(1)


def check(name: str, sums: Tensor, source: Tensor, programs: int, repeat: int) -> None:
    """RuntimeError where an error is not that of float32 sums, as where a tile was not read, or not once."""
    expected = expected_sums(source, programs, repeat)
    allowed = 4 * 2.0**-23 * expected_sums(source.abs(), programs, repeat)
    if not ((sums.double() - expected).abs() <= allowed).all():
        raise RuntimeError(
            f"{name}: the sums are wrong: {sums[:4].tolist()}, expected {expected[:4].tolist()}"
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("this needs an NVIDIA GPU, and torch sees none", file=sys.stderr)
        return 2
    from triton.testing import do_bench

    device = torch.cuda.get_device_properties(0)
    processors, clock = device.multi_processor_count, getattr(device, "clock_rate", 0) * 1e3
    rows = []

    def add(name: str, moved: int, call: Callable[[], Any]) -> None:
        low, middle, high = do_bench(call, warmup=10, rep=100, quantiles=[0.2, 0.5, 0.8])
        rate = moved / middle * 1e3
        rows.append(
            {
                "what": name,
                "bytes": moved,
                "ms_20": f"{low:.5g}",
                "ms_50": f"{middle:.5g}",
                "ms_80": f"{high:.5g}",
                "gbytes_per_s": f"{rate / 1e9:.4g}",
                "bytes_per_clock_per_processor": f"{rate / clock / processors:.3g}" if clock else "",
                "device": torch.cuda.get_device_name(),
            }
        )
        print(rows[-1], flush=True)

    for place, size in SIZES.items():
        source = torch.randn(size // 2 // COLUMNS, COLUMNS, device="cuda", dtype=torch.bfloat16)
        programs = 2 * processors
        repeat = max(size // TILE_BYTES // programs, 1) * (8 if place == "L2" else 1)
        for tma in (True, False) if torch.cuda.get_device_capability()[0] >= 9 else (False,):
            name = f"{place}, {'descriptors' if tma else 'pointers'}"
            run = reader(source, programs, repeat, tma=tma)
            check(name, run(), source, programs, repeat)
            add(name, programs * repeat * TILE_BYTES, run)
        if place == "device memory":
            target = torch.empty_like(source)
            add("copy by torch", 2 * size, lambda target=target, source=source: target.copy_(source))
        write_csv(options.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
