"""Every kernel on the GPU against float64, in every dtype and block size, and bitwise twice."""

from __future__ import annotations

import itertools
from types import ModuleType

import pytest
import torch

from dynaprune_kernels import ConvGeometry, reference
from dynaprune_kernels.backends import triton
from dynaprune_kernels.backends.triton import config
from tests.gpu import small_set
from tests.triton.parity import (
    Case,
    assert_close,
    check_gradients,
    check_layout,
    check_products,
    check_saliency,
    operands,
)

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCKS = [(16, 16), (32, 32), (64, 64), (128, 128), (16, 128), (128, 32), (64, 16)]
CONV = ConvGeometry(3, 3, 1, 1, 1, 1)
SIZES = [  # tokens, outputs, inputs, mask
    (300, 256, 384, "random"),
    (1, 130, 250, "cross"),
    (65, 200, 136, "suspended"),
    (1030, 128, 128, "one"),
    (16, 128, 256, "dead"),
    (40, 128, 128, "live"),
]
GEOMETRIES = [
    (CONV, (9, 11)),
    (CONV._replace(stride_h=2, stride_w=2), (8, 7)),
    (CONV._replace(stride_h=3, stride_w=1, dilation_w=2, padding_w=0), (7, 9)),
    (CONV._replace(groups=2), (6, 5)),
    (ConvGeometry(1, 1, 2, 2), (7, 8)),
    (ConvGeometry(1, 1), (5, 6)),
]


@pytest.mark.parametrize("case", small_set.CASES, ids=str)
def test_small_set(case: Case, kernels: ModuleType) -> None:
    small_set.check(case, kernels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block[0]}x{block[1]}")
def test_linear(block: tuple[int, int], dtype: torch.dtype, kernels: ModuleType) -> None:
    for rows, out, inputs, mask in SIZES:
        case = Case(out, inputs, block, mask, rows, dtype)
        check_products(case, "cuda", kernels=kernels)
        check_gradients(case, "cuda", kernels=kernels)
        check_saliency(case, "cuda", kernels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block[0]}x{block[1]}")
def test_conv2d(block: tuple[int, int], dtype: torch.dtype, kernels: ModuleType) -> None:
    for (geometry, size), (out, inputs) in itertools.product(GEOMETRIES, ((128, 128), (192, 80))):
        out = out if geometry.groups == 1 else 2 * block[0]
        case = Case(out, inputs, block, "random", 3, dtype, geometry, size)
        check_products(case, "cuda", kernels=kernels)
        check_gradients(case, "cuda", kernels=kernels)


@pytest.mark.parametrize("conv", [None, CONV], ids=["linear", "conv2d"])
def test_more_tiles_than_multiprocessors(conv: ConvGeometry | None, kernels: ModuleType) -> None:
    rows = 40000 if conv is None else 70
    case = Case(128, 128, (64, 64), "random", rows, torch.bfloat16, conv, (24, 23))
    check_products(case, "cuda", kernels=kernels)
    check_gradients(case, "cuda", kernels=kernels)


@pytest.mark.parametrize("conv", [None, CONV._replace(stride_h=2, groups=2)], ids=["linear", "conv2d"])
def test_layout_update(conv: ConvGeometry | None, kernels: ModuleType) -> None:
    check_layout(Case(256, 512, (16, 16), conv=conv, size=(3, 3)), "cuda", kernels)
    check_layout(Case(2048, 2048, (16, 16), size=(3, 3)), "cuda", kernels)


def test_tf32_where_torch_may_use_it(kernels: ModuleType) -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    case = Case(256, 256, (64, 64), "random", 200)
    check_products(case, "cuda", "tf32", kernels)
    with pytest.raises(AssertionError, match="off by"):
        check_products(case, "cuda", "float32", kernels)


@pytest.mark.parametrize("stages", [2, 3, 4, 5, 6, 7])
def test_any_number_of_stages_gives_the_same(stages: int) -> None:
    case = Case(256, 512, (64, 64), "random", 300, torch.bfloat16)
    layout, x, values, _, bias, dy = operands(case, "cuda")
    results = []
    for tile in (config.Tile(64, 64, 4, stages), config.Tile(64, 64, 4, 3)):
        with config.forced(tile):
            results.append(
                (
                    triton.linear_forward(x, values, bias, layout.index, 256),
                    triton.linear_dgrad(dy, values, layout.index, 512),
                    triton.linear_wgrad(dy, x, layout.index, layout.capacity, (64, 64)),
                )
            )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("conv", [None, CONV], ids=["linear", "conv2d"])
def test_results_repeat_bitwise(conv: ConvGeometry | None, kernels: ModuleType) -> None:
    case = Case(128, 128, (32, 32), "one", 40 if conv else 5000, torch.bfloat16, conv, (12, 12))
    layout, x, values, _, bias, dy = operands(case, "cuda")

    def results() -> list[torch.Tensor]:
        if conv is None:
            y = kernels.linear_forward(x, values, bias, layout.index, 128)
            dx = kernels.linear_dgrad(dy, values, layout.index, 128)
            return [y, dx, *kernels.linear_wgrad_saliency(dy, x, values, layout.index)]
        y = kernels.conv2d_forward(x, values, bias, layout.index, 128, conv)
        dx = kernels.conv2d_dgrad(dy, values, layout.index, list(x.shape), conv)
        return [y, dx, *kernels.conv2d_wgrad_saliency(dy, x, values, layout.index, conv)]

    first = results()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, results(), strict=True))


def test_rows_may_lie_apart(kernels: ModuleType) -> None:
    case = Case(128, 128, (64, 64), "random", 50, torch.bfloat16)
    layout, x, values, clean, _, dy = operands(case, "cuda")
    exact = [
        reference.linear_forward(f(x.double()), f(clean.double()), None, layout.index, 128)
        for f in (torch.clone, torch.abs)
    ]
    wide = torch.full((50, 144), torch.nan, device="cuda", dtype=torch.bfloat16)
    for offset in (0, 8, 9):
        part = wide[:, offset : offset + 128]
        part.copy_(x)
        y = kernels.linear_forward(part, values, None, layout.index, 128)
        assert_close("forward", y, *exact)
    expanded = dy[:1].expand(50, 128)
    dx = kernels.linear_dgrad(expanded, values, layout.index, 128)
    assert torch.equal(dx, kernels.linear_dgrad(expanded.contiguous(), values, layout.index, 128))
