"""Measures Triton configurations and writes this GPU's table: ``python -m benchmarks.tune_triton [--quick]``.

All kernels are compiled first, in as many processes as there are cores. For every problem each candidate is
checked against the dense result, then timed; so are the cuda backend,
where it can run, and the dense one, so that ``auto`` can choose between them. The table
(``dynaprune_kernels/backends/triton/configs/<device>.json``) keeps what it had and replaces the buckets that
are measured anew. It is written after every problem: an interrupted run loses one.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import kernel_cases
from benchmarks.kernel_cases import Call, Case
from dynaprune_kernels import ConvGeometry, reference
from dynaprune_kernels.backends import dispatch
from dynaprune_kernels.backends import triton as kernels
from dynaprune_kernels.backends.problem import Problem
from dynaprune_kernels.backends.triton import config
from dynaprune_kernels.backends.triton.config import Tile
from dynaprune_kernels.backends.triton.launch import Device, device_of

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LINEAR_SIZES = [
    (8192, 4096, 4096),
    (8192, 1024, 1024),
    (512, 4096, 4096),
    (4096, 3072, 768),
    (4096, 768, 3072),
]
CONV_SIZES = [(64, 64, 56), (128, 128, 28), (256, 256, 14), (512, 512, 7)]  # channels out, in, height = width
CONV = ConvGeometry(3, 3, 1, 1, 1, 1)


def cases(quick: bool, dtypes: list[str], blocks: list[int], densities: list[float]) -> Iterator[Case]:
    """What is tuned."""
    linear = LINEAR_SIZES[:1] if quick else LINEAR_SIZES
    conv = CONV_SIZES[2:3] if quick else CONV_SIZES
    for dtype, block, density in itertools.product(dtypes, blocks, densities):
        for (tokens, out, inputs), op in itertools.product(linear, ("forward", "dgrad", "wgrad")):
            yield Case(f"linear_{op}", tokens, out, inputs, block, density, DTYPES[dtype])
        for (out, inputs, size), op in itertools.product(conv, ("forward", "dgrad", "wgrad")):
            if block <= inputs:
                yield Case(f"conv2d_{op}", 64, out, inputs, block, density, DTYPES[dtype], CONV, (size, size))


def candidates(problem: Problem, device: Device, quick: bool = False) -> list[Tile]:
    """Configurations worth a try, the default first; all fit the device's shared memory."""
    default = config.default_tile(problem, device)
    bo, bi = config.block_of(problem)
    hopper = device.capability >= 90
    if config.is_wgrad(problem.op):
        tokens, stages = (32, 64, 128), (3, 4)
        depths = sorted({bi, max(bi, 64), max(bi, 128)})
        outer, inner = bo, 0
    else:
        tokens, stages = (64, 128, 256), (3, 5, 7)
        inner, outer = (bo, bi) if problem.op.endswith("dgrad") else (bi, bo)
        depths = [32, 64] if inner == 32 or problem.dtype.itemsize == 4 else [64, 128]
    if quick:
        stages = (default.stages,)
    found = [default]
    for size, depth, stage, warps in itertools.product(tokens, depths, stages, (4, 8)):
        elements = (depth if config.is_wgrad(problem.op) else size) * outer
        if not 16 <= elements // (32 * warps) <= 128:  # accumulator registers per thread
            continue
        if size > max(config.next_power_of_two(problem.tokens), 16):
            continue
        aligned = depth == bi if config.is_wgrad(problem.op) else depth <= inner
        for tma in {False, hopper and aligned}:
            tile = Tile(size, depth, warps, stage, tma)
            if tile not in found and config.shared_bytes(problem, tile, device) <= device.shared_bytes:
                found.append(tile)
    return found


def tune(case: Case, device: str, milliseconds: Callable[[Call], float], quick: bool) -> dict[str, Any]:
    """The best configuration of a case and its time, with the dense backend's.

    Args:
        milliseconds: times a call.

    Raises:
        RuntimeError: no candidate gives the right result.
    """
    operands = kernel_cases.build(case, device)
    problem = kernel_cases.problem_of(case, operands)
    dense = kernel_cases.call(case, operands, reference)
    expected = dense()
    ours = kernel_cases.call(case, operands, kernels)
    times: dict[Tile, float] = {}
    for tile in candidates(problem, device_of(operands.x), quick):
        with config.forced(tile):
            try:
                fault = kernel_cases.wrong(ours(), expected, case.dtype)
            except Exception as error:  # what Triton raises for too much shared memory differs by version
                fault = f"{type(error).__name__}: {error}"
            if fault is None:
                times[tile] = milliseconds(ours)
            else:
                print(f"  {tile}: {fault}", file=sys.stderr)
    if not times:
        raise RuntimeError(f"no configuration gives the right result for {case}")
    best = min(times, key=times.__getitem__)
    cuda = cuda_milliseconds(case, operands, expected, milliseconds)
    return {
        "key": config.key(problem),
        "tile": best._asdict(),
        "milliseconds": round(times[best], 5),
        **({} if cuda is None else {"cuda_milliseconds": round(cuda, 5)}),
        "dense_milliseconds": round(milliseconds(dense), 5),
        "density": case.density,
        "shape": case.shape,
        "tried": len(times),
    }


def cuda_milliseconds(
    case: Case, operands: kernel_cases.Operands, expected: Tensor, milliseconds: Callable[[Call], float]
) -> float | None:
    """The time of the cuda backend; None where it cannot run or is wrong, and then stderr says so."""
    device = operands.x.device
    _, capability = dispatch.device_facts(device)
    problem = kernel_cases.problem_of(case, operands)
    if dispatch.why_not("cuda", problem, device.type, capability) is not None:
        return None
    run = kernel_cases.call(case, operands, dispatch.BACKENDS["cuda"])
    fault = kernel_cases.wrong(run(), expected, case.dtype)
    if fault is not None:
        print(f"  the cuda backend is wrong: {fault}", file=sys.stderr)
        return None
    return milliseconds(run)


def write(path: Path, device: str, entry: dict[str, Any]) -> None:
    """Put ``entry`` into the table at ``path``."""
    import triton

    table = json.loads(path.read_text()) if path.is_file() else {"entries": {}}
    table |= {"device": device, "triton": triton.__version__, "torch": torch.__version__}
    table["entries"][entry.pop("key")] = entry
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    os.replace(temporary, path)


def compile_ahead(cases: Sequence[Case], quick: bool, processes: int) -> None:
    """Fill Triton's cache with every candidate of ``cases``; what fails fails again when it is tried."""
    kinds = {(case.op, case.tokens, case.out, case.inputs, case.block, case.dtype): case for case in cases}
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        list(pool.map(_run_candidates, kinds.values(), itertools.repeat(quick)))


def _run_candidates(case: Case, quick: bool) -> None:
    operands = kernel_cases.build(case, "cuda")
    run = kernel_cases.call(case, operands, kernels)
    for tile in candidates(kernel_cases.problem_of(case, operands), device_of(operands.x), quick):
        with config.forced(tile), contextlib.suppress(Exception):
            run()


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one linear and one convolution, few candidates")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--block", nargs="+", type=int, default=[32, 64, 128])
    parser.add_argument("--density", nargs="+", type=float, default=[0.1, 0.25, 0.5])
    parser.add_argument("--out", type=Path, help="another file than the package's own table")
    parser.add_argument("--seconds", type=float, help="start no case after so many seconds")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tuning needs an NVIDIA GPU, and torch sees none", file=sys.stderr)
        return 2
    from triton.testing import do_bench

    name = torch.cuda.get_device_name()
    path = options.out or config.file_of(name)

    def median(call: Call) -> float:
        return do_bench(call, warmup=5, rep=30, return_mode="median")

    started = time.monotonic()
    wanted = list(cases(options.quick, options.dtype, options.block, options.density))
    compile_ahead(wanted, options.quick, min(os.cpu_count() or 1, 16))
    for case in wanted:
        if options.seconds is not None and time.monotonic() - started > options.seconds:
            print(f"no case is started after {options.seconds:g} s", file=sys.stderr)
            break
        entry = tune(case, "cuda", median, options.quick)
        print(
            f"{case.op} {case.shape} {case.block} {case.density}: {entry['milliseconds']} ms with "
            f"{entry['tile']}, dense {entry['dense_milliseconds']} ms",
            flush=True,
        )
        write(path, name, entry)
    return 0


if __name__ == "__main__":
    sys.exit(main())
