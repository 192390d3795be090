"""Kernel benchmarks: ``python -m benchmarks.run --suite linear --device cuda --out linear.csv [--quick]``.

Every provider's result is checked before it is timed; a wrong one is not reported and makes the exit status
1.
Columns: milliseconds at 20, 50 and 80% of the repetitions, TFLOP/s of live blocks, and efficiency = density x
best dense time / time (1.0: the kernel is as good as the best dense one and skips all dead blocks). Suites
without a matrix product have GB/s instead.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

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


def matrix_cases(suite: str, device: str, quick: bool, dtypes: list[str]) -> Iterator[Case]:
    """Cases of the suites ``linear`` and ``conv``."""
    gpu = device == "cuda"
    densities = [0.1, 0.5] if quick else [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0]
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


def measured(case: Case, device: str, time_of: Timer, faults: list[str]) -> list[dict[str, Any]]:
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
            faults.append(f"{case.op} {case.shape} {case.block} {case.density}: {name} is wrong: {fault}")
            print(faults[-1], file=sys.stderr)
            continue
        times[name] = time_of(run)
    dense = min((t[1] for name, t in times.items() if name.startswith("dense")), default=None)
    flops = kernel_cases.flops(case, operands)
    rows = []
    for name, (low, middle, high) in times.items():
        density = 1.0 if name.startswith("dense") else case.density
        rows.append(
            {
                "op": case.op,
                "provider": name,
                "shape": case.shape,
                "block": case.block,
                "density": case.density,
                "dtype": str(case.dtype).removeprefix("torch."),
                "ms_20": f"{low:.5g}",
                "ms_50": f"{middle:.5g}",
                "ms_80": f"{high:.5g}",
                "tflops": f"{flops / case.density * density / middle / 1e9:.4g}",
                "efficiency": f"{density * dense / middle:.3f}" if dense else "",
            }
        )
    return rows


def other_cases(suite: str, device: str, quick: bool, time_of: Timer) -> Iterator[dict[str, Any]]:
    """Rows of the suites ``saliency`` and ``layout``: ours by backend beside plain torch."""
    sizes = [(4096, 4096, 64)] if quick else [(1024, 1024, 32), (4096, 4096, 64), (4096, 14336, 64)]
    for out, inputs, block in sizes:
        density = 0.25
        layout = BlockLayout(out, inputs, block, device=device)
        mask = torch.rand(layout.rows, layout.columns, device=device) < density
        layout = BlockLayout(out, inputs, block, mask=mask, device=device)
        values = torch.randn(layout.capacity, block, block, device=device)
        for name, backend in OURS.items():
            op = "block_saliency" if suite == "saliency" else "layout_update"
            problem = Problem(op, values.dtype, (block, block))
            if dispatch.why_not(name.removeprefix("dynaprune-"), problem, device) is not None:
                continue

            def run(
                backend: Any = backend, op: str = op, layout: BlockLayout = layout, values: Any = values
            ) -> Any:
                if op == "block_saliency":
                    return backend.block_saliency(values, values, layout.index, layout.rows, layout.columns)
                arguments = layout.mask, layout.slot_of_block, layout.index, layout.capacity, None, True
                return backend.layout_update(*arguments)

            low, middle, high = time_of(run)
            moved = 2 * values.numel() * values.itemsize if suite == "saliency" else 0
            yield {
                "op": op,
                "provider": name,
                "shape": f"{out}x{inputs}",
                "block": block,
                "density": density,
                "dtype": "float32",
                "ms_20": f"{low:.5g}",
                "ms_50": f"{middle:.5g}",
                "ms_80": f"{high:.5g}",
                "gbytes_per_s": f"{moved / middle / 1e6:.4g}" if moved else "",
            }


def described(device: str) -> dict[str, str]:
    """Columns that say where the numbers come from."""
    name = (
        torch.cuda.get_device_name() if device == "cuda" else f"{platform.processor() or platform.machine()}"
    )
    threads = "" if device == "cuda" else f", {torch.get_num_threads()} threads"
    versions = [f"torch {torch.__version__}"]
    if device == "cuda":
        import triton

        versions.append(f"triton {triton.__version__}")
    return {"device": name + threads, "versions": ", ".join(versions)}


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 where a provider of ours failed or any was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", required=True, choices=["linear", "conv", "saliency", "layout"])
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="one size, two densities")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda needs an NVIDIA GPU, and torch sees none", file=sys.stderr)
        return 2
    time_of = timer(options.device, options.quick)
    dtypes = options.dtype or (["bf16"] if options.device == "cuda" else ["fp32"])
    faults: list[str] = []
    rows: list[dict[str, Any]] = []
    where = described(options.device)

    def keep(row: dict[str, Any]) -> None:
        rows.append(row | where)
        print(*(row.get(column, "") for column in COLUMNS[:12]), flush=True)

    with torch.no_grad():
        if options.suite in ("linear", "conv"):
            for case in matrix_cases(options.suite, options.device, options.quick, dtypes):
                for row in measured(case, options.device, time_of, faults):
                    keep(row)
        else:
            for row in other_cases(options.suite, options.device, options.quick, time_of):
                keep(row)
    temporary = options.out.with_suffix(".tmp")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, options.out)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
