"""Tile sizes, tables of measurements, and which backend a GPU gets; needs neither triton nor a GPU."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dynaprune_kernels import _extension
from dynaprune_kernels.backends import cuda, dispatch
from dynaprune_kernels.backends.problem import Problem
from dynaprune_kernels.backends.triton import config, support
from dynaprune_kernels.backends.triton.config import Tile
from dynaprune_kernels.backends.triton.launch import Device

OPS = [f"{family}_{op}" for family in ("linear", "conv2d") for op in ("forward", "dgrad", "wgrad", "probe")]
DEVICES = [
    Device("A100", 80, 108, 166912),
    Device("RTX 3090", 86, 82, 101376),
    Device("H100", 90, 132, 232448),
]
PROBLEM = Problem("linear_forward", torch.bfloat16, (64, 64), 8192, 4096, 4096, 1024)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty folder of tables, and no choice remembered from before or for after."""

    def forget() -> None:
        for function in (config.table, config._chosen, dispatch.choose, support.against_installed):
            function.cache_clear()

    monkeypatch.setattr(config, "FOLDER", tmp_path)
    monkeypatch.setattr(dispatch, "_said", set())
    forget()
    yield tmp_path
    forget()


@pytest.fixture
def triton_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.10.0")


@pytest.fixture
def cuda_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA kernels as compiled for the architectures that setup.py chooses."""
    monkeypatch.setattr(_extension, "load_cuda", lambda: _extension.ExtensionStatus(None, None))
    monkeypatch.setattr(cuda, "architectures", lambda: ("8.0", "9.0a"))
    monkeypatch.setattr(cuda, "toolkit_and_driver", lambda: (13, 13))


@pytest.fixture
def cuda_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    status = _extension.ExtensionStatus(None, "the CUDA kernels were not built: no nvcc was found")
    monkeypatch.setattr(_extension, "load_cuda", lambda: status)


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_the_default_fits_every_device(device: Device) -> None:
    sizes = itertools.product(OPS, support.DTYPES, support.BLOCKS, support.BLOCKS, (1, 40, 8192))
    for op, dtype, bi, bo, rows in sizes:
        problem = Problem(op, dtype, (bi, bo), rows, 4096, 4096, 100)
        tile = config.default_tile(problem, device)
        assert config.shared_bytes(problem, tile, device) <= device.shared_bytes, problem
        assert tile.stages >= 3 and tile.warps in (4, 8), problem
        assert all(n >= 16 and n & (n - 1) == 0 for n in (tile.tokens, tile.depth)), problem


def test_keys_are_buckets_of_what_the_host_knows() -> None:
    assert config.key(PROBLEM) == "linear_forward/bfloat16/64x64/t8192/o4096/i4096/c25"
    assert config.key(PROBLEM._replace(tokens=5000, capacity=700)) == config.key(PROBLEM)
    for change in ({"tokens": 4096}, {"capacity": 1025}, {"block": (64, 32)}, {"dtype": torch.float16}):
        assert config.key(PROBLEM._replace(**change)) != config.key(PROBLEM)
    assert config.key(PROBLEM._replace(capacity=4096)).endswith("c100")


def write_table(
    folder: Path, device: str, problem: Problem, tile: Tile, ours: float, dense: float, **more: float
) -> None:
    entry = {"tile": tile._asdict(), "milliseconds": ours, "dense_milliseconds": dense, **more}
    table = {"device": device, "entries": {config.key(problem): entry}}
    (folder / config.file_of(device).name).write_text(json.dumps(table))


def test_a_measured_tile_is_taken_in_its_bucket_only(fresh: Path) -> None:
    tile = Tile(32, 16, 2, 6, True)
    write_table(fresh, "A100", PROBLEM, tile, 1.0, 2.0)
    assert config.tile(PROBLEM, DEVICES[0]) == tile
    other = PROBLEM._replace(tokens=64)
    assert config.tile(other, DEVICES[0]) == config.default_tile(other, DEVICES[0])
    assert config.tile(PROBLEM, DEVICES[2]) == config.default_tile(PROBLEM, DEVICES[2])


def test_auto_follows_the_measurement_and_says_why(fresh: Path, triton_installed: None) -> None:
    for ours, dense, backend in ((1.0, 2.0, "triton"), (2.0, 1.0, "dense")):
        write_table(fresh, "NVIDIA H100 80GB HBM3", PROBLEM, Tile(64, 64, 4, 4), ours, dense)
        config.table.cache_clear()
        dispatch.choose.cache_clear()
        choice = dispatch.choose(PROBLEM, "cuda", "NVIDIA H100 80GB HBM3")
        assert choice.backend == backend
        expected = f"measured on NVIDIA H100 80GB HBM3: triton {ours:.4g} ms, dense {dense:.4g} ms"
        assert choice.reason == expected


@pytest.mark.parametrize(("ours", "backend"), [(0.5, "cuda"), (3.0, "triton")])
def test_the_fastest_of_three_is_taken(
    ours: float, backend: str, fresh: Path, triton_installed: None, cuda_built: None
) -> None:
    write_table(fresh, "H100", PROBLEM, Tile(64, 64, 4, 4), 1.0, 2.0, cuda_milliseconds=ours)
    choice = dispatch.choose(PROBLEM, "cuda", "H100", 90)
    assert choice.backend == backend
    assert choice.reason == f"measured on H100: triton 1 ms, cuda {ours:.4g} ms, dense 2 ms"


def test_what_was_measured_and_is_not_built_is_no_candidate(
    fresh: Path, triton_installed: None, cuda_missing: None
) -> None:
    write_table(fresh, "H100", PROBLEM, Tile(64, 64, 4, 4), 1.0, 2.0, cuda_milliseconds=0.5)
    assert dispatch.choose(PROBLEM, "cuda", "H100", 90).backend == "triton"


@pytest.mark.parametrize(
    ("change", "capability", "first"),
    [
        ({}, 90, "cuda"),
        ({"op": "conv2d_dgrad", "dtype": torch.float16, "block": (128, 64), "capacity": 300}, 90, "cuda"),
        ({}, 80, "triton"),
        ({}, None, "triton"),
        ({"dtype": torch.float32}, 90, "triton"),
        ({"block": (32, 128), "capacity": 300}, 90, "triton"),
        ({"op": "layout_update", "dtype": torch.int32, "block": None}, 90, "triton"),
    ],
    ids=str,
)
def test_without_a_measurement_an_estimate_decides_which_comes_first(
    change: dict[str, Any],
    capability: int | None,
    first: str,
    fresh: Path,
    triton_installed: None,
    cuda_built: None,
) -> None:
    choice = dispatch.choose(PROBLEM._replace(**change), "cuda", "some GPU", capability)
    other = {"cuda": "triton", "triton": "cuda"}[first] if capability else None
    assert choice.backend == first
    if other is not None:
        assert choice.reason.endswith(f"; {first} comes before {other} unmeasured")


def test_cuda_takes_what_triton_cannot(
    fresh: Path, cuda_built: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.5")
    for problem in (PROBLEM, Problem("layout_update", torch.int32)):
        assert dispatch.choose(problem, "cuda", "some GPU", 90).backend == "cuda"
    assert dispatch.choose(PROBLEM._replace(capacity=4096), "cuda", "some GPU", 90).backend == "dense"


@pytest.mark.parametrize(
    ("problem", "device_type", "capability", "reason"),
    [
        (PROBLEM, "cpu", None, "the cuda kernels run on CUDA tensors, got cpu"),
        (PROBLEM._replace(dtype=torch.float64), "cuda", 90, "take float16, bfloat16 and float32, got"),
        (PROBLEM._replace(block=(8, 64)), "cuda", 90, r"take blocks of 16, 32, 64 and 128, got \(8, 64\)"),
        (PROBLEM, "cuda", 120, r"compiled for 8\.0 9\.0a, this GPU has compute capability 12\.0"),
    ],
)
def test_what_cuda_cannot_run(
    problem: Problem, device_type: str, capability: int | None, reason: str, fresh: Path, cuda_built: None
) -> None:
    with pytest.raises(RuntimeError, match=f"DYNAPRUNE_BACKEND=cuda cannot run linear_forward: .*{reason}"):
        dispatch.choose(problem, device_type, "some GPU", capability, "cuda")


def test_an_older_driver_is_told(fresh: Path, cuda_built: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "toolkit_and_driver", lambda: (13, 12))
    with pytest.raises(
        RuntimeError, match=r"compiled with CUDA 13, the driver is for CUDA 12: update the driver"
    ):
        dispatch.choose(PROBLEM, "cuda", "some GPU", 90, "cuda")


def test_what_is_not_built_says_why(fresh: Path, cuda_missing: None) -> None:
    with pytest.raises(RuntimeError, match=r"cannot run linear_forward: .* not built: no nvcc was found"):
        dispatch.choose(PROBLEM, "cuda", "some GPU", 90, "cuda")
    with pytest.raises(RuntimeError, match="no nvcc was found"):
        cuda._raw.__wrapped__()


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        (80, ("8.0", "9.0a"), True),
        (86, ("8.0", "9.0a"), True),
        (90, ("8.0", "9.0a"), True),
        (100, ("8.0", "9.0a"), False),
        (75, ("8.0",), False),
        (80, ("8.6",), False),
        (90, ("8.0",), False),
        (90, ("8.0+PTX",), True),
        (120, ("8.0", "9.0a+PTX"), True),
        (121, ("12.0",), True),
        (103, ("10.0a",), False),
    ],
)
def test_which_gpu_runs_what_was_compiled(
    capability: int, architectures: tuple[str, ...], runs: bool
) -> None:
    assert cuda.runs_on(capability, architectures) is runs


def test_without_a_measurement_the_density_decides(fresh: Path, triton_installed: None) -> None:
    sparse = dispatch.choose(PROBLEM, "cuda", "some GPU")
    full = dispatch.choose(PROBLEM._replace(capacity=4096), "cuda", "some GPU")
    assert (sparse.backend, full.backend) == ("triton", "dense")
    assert "no measurement" in sparse.reason and "capacity 1.00 is above 0.4" in full.reason


def test_the_probe_never_computes_a_dense_gradient(fresh: Path, triton_installed: None) -> None:
    for op in ("linear_probe", "conv2d_probe"):
        assert dispatch.choose(PROBLEM._replace(op=op, capacity=4096), "cuda", "some GPU").backend == "triton"


def test_capacity_free_ops_run_on_the_kernels(fresh: Path, triton_installed: None) -> None:
    update = Problem("layout_update", torch.int32)
    saliency = Problem("block_saliency", torch.float32, (64, 64))
    assert dispatch.choose(update, "cuda", "some GPU").backend == "triton"
    assert dispatch.choose(saliency, "cuda", "some GPU").backend == "triton"


@pytest.mark.parametrize(
    ("problem", "device_type", "reason"),
    [
        (PROBLEM, "cpu", "run on CUDA tensors"),
        (
            PROBLEM._replace(dtype=torch.float64),
            "cuda",
            "take float16, bfloat16 and float32, got torch.float64",
        ),
        (PROBLEM._replace(block=(8, 64)), "cuda", r"take blocks of 16, 32, 64 and 128, got \(8, 64\)"),
    ],
)
def test_what_triton_cannot_run(
    problem: Problem,
    device_type: str,
    reason: str,
    fresh: Path,
    triton_installed: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=f"DYNAPRUNE_BACKEND=triton cannot run linear_forward: .*{reason}"):
        dispatch.choose(problem, device_type, forced="triton")
    if device_type == "cuda":
        with pytest.warns(RuntimeWarning, match=reason):
            assert dispatch.choose(problem, "cuda", "some GPU").backend == "dense"


@pytest.mark.parametrize("version", ["3.5.1", "3.10.0", "3.6.0"])
def test_versions_are_compared_as_numbers(version: str, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    reason = support.why_not("linear_forward", "cuda", torch.float32, (64, 64))
    expected = "expected triton 3.6 or newer, got 3.5.1" if version == "3.5.1" else None
    assert reason == expected


def test_without_triton_everything_else_works() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, dynaprune_kernels as k\n"
        "layout = k.BlockLayout(32, 32, 16)\n"
        "k.block_sparse_linear(torch.ones(2, 32), torch.ones(4, 16, 16), None, layout)\n"
        "assert 'dynaprune_kernels.backends.triton.linear' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


@pytest.mark.parametrize(
    ("block", "rows", "density", "dtype", "backend"),
    [
        ((8, 8), 2048, 0.5, torch.float32, "dense"),
        ((32, 8), 2048, 0.5, torch.float32, "dense"),
        ((8, 8), 2048, 0.25, torch.float32, "cpu"),
        ((8, 8), 32, 0.5, torch.float32, "cpu"),
        ((8, 8), 2048, 0.5, torch.float64, "cpu"),
        ((16, 16), 2048, 1.0, torch.float32, "cpu"),
    ],
)
def test_half_vectors_go_to_the_dense_library_where_it_is_faster(
    fresh: Path, block: tuple[int, int], rows: int, density: float, dtype: torch.dtype, backend: str
) -> None:
    if not _extension.load().loaded or torch.ops.dynaprune_cpu.capability() != "avx512":
        pytest.skip("blocks of 8 fill half a vector with AVX-512 only")
    capacity = int(1024 * 1024 * density) // (block[0] * block[1])
    problem = Problem("linear_forward", dtype, block, rows, 1024, 1024, capacity)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert dispatch.choose(problem, "cpu").backend == backend
    assert [bool(re.search("half an AVX-512 vector", str(w.message))) for w in said] == (
        [True] if backend == "dense" else []
    )
