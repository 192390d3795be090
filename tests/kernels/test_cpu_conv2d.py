"""The raw CPU convolution kernels against torch's dense convolution with the masked weight, in float64."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dynaprune_kernels import _extension
from tests.kernels.conv2d_cases import DTYPES, Case, check, make_problem, random_case, run_kernels

pytestmark = pytest.mark.skipif(not _extension.load().loaded, reason=str(_extension.load().reason))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small cases, and torch's waiting threads cost more than the kernels on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.filterwarnings("ignore:.*deterministic.*")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_convolutions(dtype: torch.dtype) -> None:
    for seed in range({torch.float32: 300, torch.bfloat16: 100, torch.float64: 200}[dtype]):
        check(random_case(seed), dtype)


NETWORK = [
    Case(4, 64, 64, (32, 32), (16, 16)),
    Case(4, 64, 128, (32, 32), (32, 32), stride=(2, 2)),
    Case(4, 64, 128, (32, 32), (16, 16), kernel=(1, 1), stride=(2, 2), padding=(0, 0)),
    Case(32, 256, 256, (4, 4), (32, 16)),
    Case(2, 64, 64, (14, 14), (16, 16), kernel=(1, 1), padding=(0, 0)),
    Case(1, 48, 96, (56, 56), (32, 16)),
]


@pytest.mark.parametrize("capability", ["generic", "avx2"])
def test_narrower_instruction_sets(capability: str) -> None:
    """The kernels that this machine does not choose by itself, in a process of their own."""
    order = ["generic", "avx2", "avx512"]
    best = torch.ops.dynaprune_cpu.capability()
    if best not in order or order.index(best) <= order.index(capability):
        pytest.skip(f"{capability} is not below {best}")
    code = (
        "import torch, tests.kernels.conv2d_cases as t\n"
        "from dynaprune_kernels import _extension\n"
        "assert _extension.load().loaded\n"
        "torch.set_num_threads(1)\n"
        f"assert torch.ops.dynaprune_cpu.capability() == {capability!r}\n"
        "for seed in range(150): t.check(t.random_case(seed), t.DTYPES[seed % 3])\n"
    )
    environment = os.environ | {"DYNAPRUNE_CPU_CAPABILITY": capability}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("case", NETWORK, ids=str)
def test_layers_of_networks(case: Case) -> None:
    check(case, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_same_bits_for_any_number_of_threads(seed: int, dtype: torch.dtype) -> None:
    case = NETWORK[seed]._replace(images=5)
    p = make_problem(case, dtype)
    alone = run_kernels(case, p)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        for one, many in zip(alone, run_kernels(case, p), strict=True):
            assert torch.equal(one, many)


FORMATS = (torch.contiguous_format, torch.channels_last)
IN_FORMATS = [
    *(random_case(seed) for seed in range(1000, 1060)),
    *NETWORK[:4],
    Case(3, 24, 40, (8, 8), (16, 16)),
    Case(2, 16, 16, (4, 4), (16, 16)),
    Case(2, 33, 17, (1, 1), (8, 8)),
    Case(2, 20, 50, (3, 130), (24, 12), stride=(1, 2)),
    Case(2, 20, 50, (7, 1), (16, 16), stride=(1, 2)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_memory_format_changes_no_bit(dtype: torch.dtype) -> None:
    """Sums have one order in either format, so all combinations of formats agree exactly.

    Not so where a pointwise convolution is computed as a matrix product, in channels-last memory alone.
    """
    for case in IN_FORMATS:
        if case.kernel == case.stride == (1, 1) and case.padding == (0, 0):
            continue
        p = make_problem(case, dtype)
        expected = None
        for of_x, of_dy, channels_last in itertools.product(FORMATS, FORMATS, (False, True)):
            given = p._replace(x=p.x.contiguous(memory_format=of_x), dy=p.dy.contiguous(memory_format=of_dy))
            results = run_kernels(case._replace(channels_last=channels_last), given)
            for result in results[:2]:
                assert result.is_contiguous(memory_format=FORMATS[channels_last])
            expected = expected or results
            for one, other in zip(results, expected, strict=True):
                assert torch.equal(one, other), f"{case} {dtype} {of_x} {of_dy} {channels_last}"


def test_image_results_do_not_depend_on_the_batch() -> None:
    case = Case(9, 40, 24, (9, 7), (8, 16), stride=(2, 1))
    p = make_problem(case, torch.float32)
    y, dx = run_kernels(case, p)[:2]
    for n in range(case.images):
        alone = run_kernels(case, p._replace(x=p.x[n : n + 1], dy=p.dy[n : n + 1]))
        assert torch.equal(alone[0], y[n : n + 1])
        assert torch.equal(alone[1], dx[n : n + 1])


@pytest.mark.parametrize("mask", ["random", "dead", "live"])
def test_empty_batch(mask: str) -> None:
    case = Case(0, 20, 16, (5, 5), (8, 8), mask=mask)
    p = make_problem(case, torch.float32)
    y, dx, dvalues, fused, saliency, probe = run_kernels(case, p)
    assert y.shape == (0, 16, 5, 5) and dx.shape == p.x.shape
    for zero in (dvalues, fused, saliency, probe):
        assert (zero == 0).all()


def test_non_finite_inputs_stay_in_their_pixels_and_channels() -> None:
    """An infinite input reaches exactly the outputs that read it, although padding is multiplied too."""
    case = Case(2, 20, 24, (6, 6), (8, 8), mask="cross", bias=False)
    p = make_problem(case, torch.float32)
    p.x[0, 3, 2, 2] = float("inf")
    y = run_kernels(case, p)[0]
    infinite, live = torch.isinf(p.x).double(), (p.dense != 0).double()
    reached = F.conv2d(infinite, live, None, case.stride, case.padding) > 0
    assert torch.equal(~torch.isfinite(y), reached)


@pytest.mark.parametrize("strides", ["expanded", "sliced", "one_channel"])
def test_any_strides(strides: str) -> None:
    case = Case(2, 1 if strides == "one_channel" else 24, 16, (6, 5), (8, 8))
    p = make_problem(case, torch.float32)
    plain = run_kernels(case, p)
    if strides == "expanded":
        p = p._replace(dy=torch.ones(()).expand(p.dy.shape))
        plain = run_kernels(case, p._replace(dy=p.dy.clone()))
    elif strides == "sliced":
        wide = torch.randn(2, 24, 6, 10)
        wide[..., ::2] = p.x
        p = p._replace(x=wide[..., ::2])
    else:
        p = p._replace(x=p.x.clone().as_strided(p.x.shape, (30, 17, 5, 1)))
    for one, other in zip(plain, run_kernels(case, p), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv": [3, 3]}, "expected conv"),
        ({"conv": [3, 3, 0, 1, 1, 1, 1, 1, 1]}, "expected conv"),
        ({"conv": [9, 9, 1, 1, 0, 0, 1, 1, 1]}, "pixels after padding"),
        ({"conv": [3, 3, 1, 1, 1, 1, 1, 1, 5]}, "divisible"),
        ({"x": torch.zeros(2, 24, 6)}, "N, C, H, W"),
        ({"x": torch.zeros(2, 24, 6, 5, dtype=torch.float64)}, "x"),
        ({"index": torch.zeros(3, dtype=torch.int32)}, "index"),
        ({"bias": torch.zeros(3)}, "bias"),
    ],
)
def test_wrong_input_is_refused(change: dict[str, object], message: str) -> None:
    case = Case(2, 24, 16, (6, 5), (8, 8))
    p = make_problem(case, torch.float32)
    given = {"x": p.x, "bias": p.bias, "index": p.packed, "conv": case.conv} | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dynaprune_cpu.conv2d_forward(
            given["x"], p.values, given["bias"], given["index"], case.outputs, given["conv"]
        )
