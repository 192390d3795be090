"""What each of the three calls to a GPU runs: parity, speed, sanitizers."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.gpu import one_kernel
from tests.gpu.parts import Part

PYTEST = (
    "-m",
    "pytest",
    "-v",
    "-o",
    "addopts=--import-mode=importlib",
    "-p",
    "no:cacheprovider",
    "-m",
    "gpu",
)
# A test that hangs is named and ends; by a thread: a signal waits for Python, and Python for the kernel.
PATIENCE = ("--timeout=60", "--timeout-method=thread")
SUITES = {"linear": 130, "conv": 90, "saliency": 18, "layout": 18}
BLOCKS = ("32", "64", "128")
SANITIZERS = {"memcheck": 95, "synccheck": 45, "racecheck": 95}


def _python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)


def parity(out: Path, watchdog: Path | None) -> list[Part]:
    """Every kernel of Hopper alone, by the watchdog's build where there is one; all tests, cuda's first."""
    library = () if watchdog is None else ("--library", str(watchdog))
    alone = [
        Part(
            f"{op}-{block}-{tile}",
            _python("-m", "tests.gpu.one_kernel", op, str(block), tile, *library),
            40,
            together="alone",
        )
        for op, block, tile in one_kernel.choices()
    ]
    # Most of the time goes into Triton's compiling: as many processes as cores.
    workers = ("-n", str(min(os.cpu_count() or 1, 16)), "--dist", "worksteal")
    tests = [
        Part(
            f"tests-{backend}",
            _python(*PYTEST, *PATIENCE, *workers, "-k", chosen, "tests/gpu"),
            seconds,
        )
        for backend, chosen, seconds in (("cuda", "cuda", 120), ("triton", "not cuda", 150))
    ]
    return [Part("info", _python("-m", "dynaprune_kernels.info"), 30), *alone, *tests]


def speed(out: Path, watchdog: Path | None) -> list[Part]:
    """Bandwidth, kernels beside their peers, counters of six kernels, and configurations of Triton."""
    suites = [
        Part(
            name,
            _python(
                *("-m", "benchmarks.run", "--suite", name, "--device", "cuda", "--quick", "--block", *BLOCKS),
                *("--seconds", str(seconds - 12), "--out", str(out / f"{name}.csv")),
            ),
            seconds,
            expects=f"{name}.csv",
        )
        for name, seconds in SUITES.items()
    ]
    counters = [
        Part(
            f"ncu-{op}-{block}",
            (
                *("ncu", "--set", "basic", "--clock-control", "none", "--launch-count", "4"),
                *("--kernel-name", "regex:sm90|sm80", "--csv"),
                *_python("-m", "tests.gpu.one_kernel", op, str(block), "wide"),
            ),
            15,
            tool="ncu",
            counts=False,
        )
        for op in ("linear-products", "linear-wgrad", "conv2d-products")
        for block in (64, 128)
    ]
    return [
        Part(
            "bandwidth",
            _python("-m", "benchmarks.gpu_bandwidth", "--out", str(out / "bandwidth.csv")),
            45,
            expects="bandwidth.csv",
        ),
        *suites,
        *counters,
        Part(
            "tuning",
            _python(
                "-m",
                "benchmarks.tune_triton",
                "--quick",
                "--seconds",
                "90",
                "--out",
                str(out / "tuned.json"),
            ),
            105,
            counts=False,
            expects="tuned.json",
        ),
        Part(
            "plot",
            _python(
                *("-m", "benchmarks.plot", str(out / "linear.csv"), str(out / "conv.csv")),
                *("--out", str(out / "speedup.png")),
            ),
            20,
            counts=False,
        ),
    ]


def sanitizers(out: Path, watchdog: Path | None) -> list[Part]:
    """compute-sanitizer over small problems, a process for each tool and backend; cuda's kernels first."""
    # The caching allocator would hide accesses beyond a tensor.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Part(
            f"{tool}-{backend}",
            (
                *("compute-sanitizer", "--tool", tool, "--error-exitcode", "9"),
                *_python("-m", "tests.gpu.small_set", backend, "--dtype", "bfloat16"),
            ),
            seconds,
            tool="compute-sanitizer",
            environment=uncached,
        )
        for backend in ("cuda", "triton")
        for tool, seconds in SANITIZERS.items()
    ]


# Seconds that each may take in all, and what it runs.
CALLS: dict[str, tuple[int, Callable[[Path, Path | None], Sequence[Part]]]] = {
    "parity": (360, parity),
    "speed": (540, speed),
    "sanitizers": (480, sanitizers),
}
