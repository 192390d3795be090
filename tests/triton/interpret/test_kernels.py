"""Every kernel in Triton's interpreter, in float32 and float16, against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dynaprune_kernels import BlockLayout, ConvGeometry
from dynaprune_kernels.backends import triton as kernels
from dynaprune_kernels.backends.problem import Problem
from dynaprune_kernels.backends.triton import config
from dynaprune_kernels.backends.triton.config import Tile
from tests.triton.parity import (
    Case,
    check_gradients,
    check_layout,
    check_products,
    check_saliency,
    operands,
)

pytestmark = pytest.mark.interpret

HALF = torch.float16
LINEAR = [
    Case(40, 70, (16, 32), "random", 37),
    Case(64, 64, (64, 64), "live", 5, HALF),
    Case(130, 100, (64, 32), "cross", 1),
    Case(48, 80, (16, 16), "cross", 20, HALF),
    Case(128, 256, (128, 128), "random", 9),
    Case(96, 64, (32, 16), "suspended", 33),
    Case(50, 50, (32, 64), "dead", 4),
    Case(17, 200, (16, 128), "one", 3, HALF),
    Case(70, 33, (32, 16), "live", 300, spare_slots=0),
    Case(16, 16, (16, 16), "live", 0),
]
CONV = [
    Case(40, 36, (16, 16), "random", 2, conv=ConvGeometry(3, 3, 2, 2, 1, 1), size=(7, 9)),
    Case(64, 40, (32, 16), "random", 1, HALF, ConvGeometry(3, 2, 1, 2, 1, 0, 2, 1, 2), (6, 5)),
    Case(32, 64, (16, 64), "cross", 1, conv=ConvGeometry(1, 3, 3, 1, 0, 1), size=(4, 9)),
    Case(64, 32, (64, 32), "live", 1, HALF, ConvGeometry(2, 2, 3, 3), (6, 7)),
    Case(24, 20, (16, 32), "suspended", 3, conv=ConvGeometry(3, 3, 1, 1, 2, 2, 2, 2), size=(5, 4)),
    Case(32, 16, (16, 16), "dead", 1, conv=ConvGeometry(3, 3, 1, 1, 1, 1), size=(3, 3)),
    Case(24, 40, (16, 32), "one", 2, conv=ConvGeometry(1, 1), size=(3, 2)),
    Case(32, 16, (16, 16), "random", 0, conv=ConvGeometry(3, 3, 1, 1, 1, 1), size=(3, 3)),
]
CHECKS = [check_products, check_gradients, check_saliency]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", LINEAR + CONV, ids=str)
def test_matches_the_reference(case: Case, check: Callable[[Case, str], None]) -> None:
    check(case, "cpu")


@pytest.mark.parametrize("case", [LINEAR[0], LINEAR[5], LINEAR[7], *CONV[:3], CONV[6]], ids=str)
def test_layout_update_is_bitwise_the_reference(case: Case) -> None:
    check_layout(case, "cpu")


@pytest.fixture
def use_tile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tile, int], None]:
    """Launch with a given tile, and with sums over tokens cut into so many parts."""

    def use(tile: Tile, splits: int = 1) -> None:
        def chosen(problem: Problem, device: object) -> Tile:
            return tile

        monkeypatch.setattr(config, "tile", chosen)
        monkeypatch.setattr(config, "splits", lambda programs, steps, device: splits)

    return use


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("depth", [16, 32, 64, 128], ids=lambda depth: f"depth{depth}")
def test_steps_that_cut_or_merge_blocks(use_tile: Callable[..., None], depth: int, tma: bool) -> None:
    use_tile(Tile(tokens=16, depth=depth, warps=4, stages=3, tma=tma))
    check_products(Case(64, 128, (32, 64), "random", 21), "cpu")
    check_gradients(Case(64, 128, (32, 32), "random", 21), "cpu")


def test_descriptors_of_rows_that_do_not_align(use_tile: Callable[..., None]) -> None:
    use_tile(Tile(tokens=16, depth=32, warps=4, stages=3, tma=True))
    check_products(Case(70, 33, (32, 32), "random", 21), "cpu")
    check_gradients(Case(70, 33, (32, 32), "random", 21), "cpu")
    check_gradients(Case(72, 36, (32, 32), "random", 21), "cpu")


def test_descriptors_of_operands_that_begin_anywhere(use_tile: Callable[..., None]) -> None:
    """Views into flat buffers: what a descriptor reads begins at a multiple of 16 bytes, or is copied."""

    def shifted(tensor: Tensor) -> Tensor:
        memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
        return memory.view(tensor.shape).copy_(tensor)

    use_tile(Tile(tokens=16, depth=32, warps=4, stages=3, tma=True))
    layout, x, values, _, bias, dy = operands(Case(64, 64, (32, 32), "random", 21), "cpu")
    moved = [shifted(each) for each in (x, values, bias, dy)]
    assert all(each.data_ptr() % 16 for each in moved)
    x2, values2, bias2, dy2 = moved
    index, sizes = layout.index, (64,)
    forward, dgrad = kernels.linear_forward, kernels.linear_dgrad
    assert torch.equal(forward(x2, values2, bias2, index, *sizes), forward(x, values, bias, index, *sizes))
    assert torch.equal(dgrad(dy2, values2, index, *sizes), dgrad(dy, values, index, *sizes))
    wgrad = kernels.linear_wgrad_saliency
    for ours, theirs in zip(wgrad(dy2, x2, values2, index), wgrad(dy, x, values, index), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("splits", [2, 5])
def test_sums_over_tokens_in_two_passes(use_tile: Callable[..., None], splits: int) -> None:
    use_tile(Tile(tokens=16, depth=32, warps=4, stages=3), splits)
    check_gradients(Case(40, 70, (16, 32), "random", 150), "cpu")
    check_gradients(Case(40, 70, (32, 16), "random", 50), "cpu")
    conv = ConvGeometry(2, 2, 1, 1, 1, 1)
    check_gradients(Case(40, 20, (16, 16), "random", 2, conv=conv, size=(6, 6)), "cpu")


def test_padding_stays_zero_beside_infinite_gradients() -> None:
    case = Case(40, 70, (32, 32), "live", 9)
    layout, x, _, _, _, dy = operands(case, "cpu")
    dy[3] = torch.inf
    dw = kernels.linear_wgrad(dy, x, layout.index, layout.capacity, (32, 32))
    last_column = layout.slot_of_block[:, -1].long()
    assert torch.equal(dw[last_column, 6:], torch.zeros(2, 26, 32)), "inputs beyond 70"
    last_row = layout.slot_of_block[-1].long()
    assert torch.equal(dw[last_row, :, 8:], torch.zeros(3, 32, 24)), "outputs beyond 40"
    assert not dw[layout.slot_of_block[0, 0]].isfinite().any()


@pytest.mark.parametrize("merge", [16, 32, 64])
def test_convolution_steps_that_cut_or_merge_blocks(use_tile: Callable[..., None], merge: int) -> None:
    use_tile(Tile(tokens=16, depth=merge, warps=4, stages=3))
    conv = ConvGeometry(2, 3, 2, 1, 1, 1)
    for groups in (1, 2):
        case = Case(64, 64, (32, 32), "random", 1, conv=conv._replace(groups=groups), size=(5, 4))
        check_products(case, "cpu")
        check_gradients(case, "cpu")


def test_values_of_other_strides_are_the_same_values() -> None:
    layout, x, values, _, _, dy = operands(Case(64, 96, (32, 32), "live", 9), "cpu")
    apart = values.transpose(1, 2).contiguous().transpose(1, 2)
    results = [kernels.linear_wgrad_saliency(dy, x, v, layout.index) for v in (values, apart)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_images_too_large_for_32_bits_are_refused() -> None:
    conv = ConvGeometry(3, 3, 1, 1, 1, 1)
    layout = BlockLayout(16, 2048, 16, conv=conv)
    x = torch.zeros(1).expand(1, 2048, 1024, 1024)
    dy = torch.zeros(1).expand(1, 16, 1024, 1024)
    values = torch.zeros(1).expand(layout.capacity, 16, 16)
    for call in (
        lambda: kernels.conv2d_forward(x, values, None, layout.index, 16, conv),
        lambda: kernels.conv2d_wgrad(dy, x, layout.index, layout.capacity, (16, 16), conv),
        lambda: kernels.conv2d_dgrad(x, values, layout.index, [1, 16, 1024, 1024], conv),
    ):
        with pytest.raises(ValueError, match=r"at most 2\^30 elements per image, got 2147483648"):
            call()
