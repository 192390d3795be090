"""Kernel benchmarks: ``python -m benchmarks.run --suite linear --device cuda --out linear.csv [--quick]``.

Every provider's result is checked before it is timed; a wrong one is not reported, and one of ours makes the
exit status 1. Columns: milliseconds at 20, 50 and 80% of the repetitions, TFLOP/s of live blocks, and
efficiency = density x best dense time / time (1.0: the kernel is as good as the best dense one and skips all
dead blocks).
The suite saliency has GB/s instead. On a GPU the short suites are also timed as replays of a captured graph
(provider ``...-graph``), without what Python takes to launch. The file is written after every case.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks import kernel_cases
from benchmarks.kernel_cases import Call, Case
from benchmarks.providers import OURS, PROVIDERS, Unavailable, comparable
from dynaprune_kernels import BlockLayout, ConvGeometry, reference
from dynaprune_kernels.backends import dispatch
from dynaprune_kernels.backends.problem import Problem

COLUMNS = [
    "op", "provider", "shape", "block", "density", "dtype", "ms_20", "ms_50", "ms_80", "tflops",
    "gbytes_per_s", "efficiency", "device", "versions",
]  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Row = dict[str, Any]
Quantiles = tuple[float, float, float]
Timer = Callable[[Call], Quantiles]
CONV = ConvGeometry(3, 3, 1, 1, 1, 1)
OPS = ("forward", "dgrad", "wgrad")
LINEAR_SIZES = {  # tokens, outputs, inputs
    "cuda": [(8192, 4096, 4096), (8192, 1024, 1024), (512, 4096, 4096)],
    "cpu": [(32, 1024, 1024), (1024, 3072, 768)],
}


def timer(device: str, quick: bool) -> Timer:
    """Milliseconds at 20, 50 and 80%: with events and a cold cache on a GPU, with the clock on a CPU."""
    if device == "cuda":
        from triton.testing import do_bench

        def on_gpu(call: Call) -> Quantiles:
            first, middle, last = do_bench(
                call, warmup=10, rep=30 if quick else 100, quantiles=[0.2, 0.5, 0.8]
            )
            return first, middle, last

        return on_gpu

    def on_cpu(call: Call) -> Quantiles:
        call()
        times = []
        end = time.perf_counter() + (0.2 if quick else 1.0)
        while len(times) < 5 or time.perf_counter() < end:
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        times.sort()
        return times[len(times) // 5], times[len(times) // 2], times[4 * len(times) // 5]

    return on_cpu


def matrix_cases(
    suite: str, device: str, quick: bool, dtypes: list[str], blocks: list[int] | None = None
) -> Iterator[Case]:
    """Cases of the suites ``linear`` and ``conv``; ``blocks`` in place of the device's own."""
    gpu = device == "cuda"
    densities = [0.1, 0.5] if quick else [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0]
    if blocks is None:
        blocks = ([64, 128] if quick else [16, 32, 64, 128]) if gpu else ([32] if quick else [16, 32, 64])
    if suite == "linear":
        sizes = LINEAR_SIZES[device][:1] if quick else LINEAR_SIZES[device]
        for dtype, size, block, density, op in itertools.product(dtypes, sizes, blocks, densities, OPS):
            yield Case(f"linear_{op}", *size, block, density, DTYPES[dtype])
        return
    images = 64 if gpu else 4
    stages = [(64, 56), (128, 28), (256, 14), (512, 7)]
    for dtype, (channels, size), block, density, op in itertools.product(
        dtypes, stages[2:3] if quick else stages, blocks, densities, OPS
    ):
        if block <= channels:
            yield Case(
                f"conv2d_{op}", images, channels, channels, block, density, DTYPES[dtype], CONV, (size, size)
            )


def measured(case: Case, device: str, time_of: Timer, faults: list[str]) -> list[Row]:
    """One row per provider that gives the right result; what is wrong goes to ``faults``."""
    operands = kernel_cases.build(case, device)
    expected = kernel_cases.call(case, operands, reference)()
    times: dict[str, Quantiles] = {}
    for name, prepare in PROVIDERS.items():
        try:
            run = prepare(case, operands)
            result = comparable(name, case, operands, run())
        except Unavailable:
            continue
        except Exception as error:  # another library's failure must not end the run
            print(f"{case.op} {case.shape}: {name} failed: {type(error).__name__}: {error}", file=sys.stderr)
            if name in OURS:
                faults.append(f"{case.op} {case.shape}: {name} failed")
            continue
        fault = kernel_cases.wrong(result, expected, case.dtype)
        if fault is not None:
            said = f"{case.op} {case.shape} {case.block} {case.density}: {name} is wrong: {fault}"
            print(said, file=sys.stderr)
            if name in OURS:
                faults.append(said)
            continue
        times[name] = time_of(run)
    dense = min((t[1] for name, t in times.items() if name.startswith("dense")), default=None)
    live = operands.layout.capacity / operands.layout.blocks
    flops = kernel_cases.flops(case, operands) / live
    rows = []
    for name, (low, middle, high) in times.items():
        density = 1.0 if name.startswith("dense") else live
        rows.append(
            {
                "op": case.op,
                "provider": name,
                "shape": case.shape,
                "block": case.block,
                "density": f"{live:.4g}",
                "dtype": str(case.dtype).removeprefix("torch."),
                "ms_20": f"{low:.5g}",
                "ms_50": f"{middle:.5g}",
                "ms_80": f"{high:.5g}",
                "tflops": f"{flops * density / middle / 1e9:.4g}",
                "efficiency": f"{density * dense / middle:.3f}" if dense else "",
            }
        )
    return rows


def matrix_rows(cases: Iterator[Case], device: str, time_of: Timer, faults: list[str]) -> Iterator[list[Row]]:
    """Rows of the suites ``linear`` and ``conv``, case by case."""
    for case in cases:
        yield measured(case, device, time_of, faults)


def other_rows(
    suite: str, device: str, quick: bool, time_of: Timer, faults: list[str]
) -> Iterator[list[Row]]:
    """Rows of the suites ``saliency`` and ``layout``, case by case: ours by backend."""
    sizes = [(4096, 4096, 64)] if quick else [(1024, 1024, 32), (4096, 4096, 64), (4096, 14336, 64)]
    op, prepare = ("block_saliency", saliency) if suite == "saliency" else ("layout_update", update)
    for out, inputs, block in sizes:
        mask = torch.rand(out // block, inputs // block, generator=torch.Generator().manual_seed(0)) < 0.25
        layout = BlockLayout(out, inputs, block, mask=mask, device=device)
        values = torch.randn(layout.capacity, block, block, device=device)
        problem = Problem(op, values.dtype, (block, block))
        times: dict[str, Quantiles] = {}
        for name, backend in OURS.items():
            _, capability = dispatch.device_facts(values.device)
            if dispatch.why_not(name.removeprefix("dynaprune-"), problem, device, capability) is not None:
                continue
            run, fault = prepare(backend, layout, values)
            if fault is not None:
                faults.append(f"{op} {out}x{inputs} {block}: {name} is wrong: {fault}")
                print(faults[-1], file=sys.stderr)
                continue
            times[name] = time_of(run)
            if device == "cuda":
                times[f"{name}-graph"] = time_of(replayed(run))
        moved = 2 * values.numel() * values.itemsize if suite == "saliency" else 0
        yield [
            {
                "op": op,
                "provider": name,
                "shape": f"{out}x{inputs}",
                "block": block,
                "density": f"{layout.capacity / layout.blocks:.4g}",
                "dtype": "float32",
                "ms_20": f"{low:.5g}",
                "ms_50": f"{middle:.5g}",
                "ms_80": f"{high:.5g}",
                "gbytes_per_s": f"{moved / middle / 1e6:.4g}" if moved else "",
            }
            for name, (low, middle, high) in times.items()
        ]


def saliency(backend: ModuleType, layout: BlockLayout, values: Tensor) -> tuple[Call, str | None]:
    """The sums over values and a gradient, and what is wrong with them."""
    grad = torch.randn_like(values)

    def run() -> Any:
        return backend.block_saliency(values, grad, layout.index, layout.rows, layout.columns)

    exact = reference.block_saliency(
        values.double(), grad.double(), layout.index, layout.rows, layout.columns
    )
    pairs = zip(run(), exact, strict=True)
    faults = [kernel_cases.wrong(ours, theirs, torch.float32) for ours, theirs in pairs]
    return run, next((fault for fault in faults if fault is not None), None)


def update(backend: ModuleType, layout: BlockLayout, values: Tensor) -> tuple[Call, str | None]:
    """The update to another mask of as many blocks, and what is wrong with it."""
    mask = layout.mask.roll((1, 1), (0, 1))
    ours = [mask.clone(), layout.slot_of_block.clone(), layout.index.clone()]
    theirs = [t.clone() for t in ours]

    def run() -> Any:
        return backend.layout_update(*ours, layout.capacity, None, True)

    run()
    reference.layout_update(*theirs, layout.capacity, None, True)
    same = all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    return run, None if same else "other slots or lists than the reference's"


def replayed(call: Call) -> Call:
    """A captured graph's replay of ``call``."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def described(device: str) -> dict[str, str]:
    """Columns that say where the numbers come from."""
    versions = [f"torch {torch.__version__}"]
    if device == "cuda":
        import triton

        versions.append(f"triton {triton.__version__}")
        return {"device": torch.cuda.get_device_name(), "versions": ", ".join(versions)}
    from dynaprune.experiment.metrics import environment

    name = f"{environment(torch.device(device))['cpu']}, {torch.get_num_threads()} threads"
    return {"device": name, "versions": versions[0]}


def write(path: Path, rows: list[Row]) -> None:
    """Write ``rows`` as CSV in place of what ``path`` held."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 where a provider of ours failed or was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", required=True, choices=["linear", "conv", "saliency", "layout"])
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--block", nargs="+", type=int, help="edges of blocks, linear and conv")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="one size, two densities")
    parser.add_argument("--seconds", type=float, help="start no case after so many seconds")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda needs an NVIDIA GPU, and torch sees none", file=sys.stderr)
        return 2
    start = time.perf_counter()
    torch.backends.cudnn.benchmark = True  # the dense baseline is the fastest algorithm that cuDNN has
    time_of = timer(options.device, options.quick)
    dtypes = options.dtype or (["bf16"] if options.device == "cuda" else ["fp32"])
    faults: list[str] = []
    rows: list[Row] = []
    where = described(options.device)
    if options.suite in ("linear", "conv"):
        wanted = matrix_cases(options.suite, options.device, options.quick, dtypes, options.block)
        cases = matrix_rows(wanted, options.device, time_of, faults)
    else:
        cases = other_rows(options.suite, options.device, options.quick, time_of, faults)
    with torch.no_grad():
        for found in cases:
            for row in found:
                rows.append(row | where)
                print(*(row.get(column, "") for column in COLUMNS[:12]), flush=True)
            write(options.out, rows)
            if options.seconds is not None and time.perf_counter() - start > options.seconds:
                print(f"{options.suite}: no case is started after {options.seconds:g} s", file=sys.stderr)
                break
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
