"""Cases of the raw CPU convolution kernels, and their check against the dense convolution in float64."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
# The c of the tolerance, in units of eps * (|x| * |W|): n sequential sums of random terms are wrong by half
# a unit whatever n is (n roundings of partial sums growing like sqrt(n)), by about 3 in the worst of 1e5.
ORDER_OF_SUMS = 4.0


class Case(NamedTuple):
    """One convolution: sizes, block (outputs, inputs), hyper-parameters and the way its mask is drawn.

    ``channels_last`` is the memory format that output and input gradient are wanted in.
    """

    images: int
    inputs: int
    outputs: int
    size: tuple[int, int]
    block: tuple[int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    mask: str = "random"
    bias: bool = True
    seed: int = 0
    channels_last: bool = True

    @property
    def conv(self) -> list[int]:
        return [*self.kernel, *self.stride, *self.padding, *self.dilation, self.groups]

    @property
    def grid(self) -> tuple[int, int]:
        channel_blocks = -(-self.inputs // self.groups // self.block[1])
        return -(-self.outputs // self.block[0]), self.kernel[0] * self.kernel[1] * channel_blocks


class Problem(NamedTuple):
    """A case's tensors in one dtype; `dense` is the masked weight, `packed` the index."""

    x: Tensor
    dy: Tensor
    bias: Tensor | None
    dense: Tensor
    mask: Tensor
    slots: Tensor
    values: Tensor
    packed: Tensor


def draw_mask(case: Case, random: np.random.Generator) -> np.ndarray:
    rows, columns = case.grid
    mask = random.random((rows, columns)) < random.choice([0.1, 0.3, 0.7])
    if case.mask == "dead":
        mask[:] = False
    elif case.mask == "live":
        mask[:] = True
    elif case.mask == "one":
        mask[:] = False
        mask[random.integers(rows), random.integers(columns)] = True
    elif case.mask == "cross":  # an empty row, an empty column, the rest live
        mask[:] = True
        mask[random.integers(rows)] = False
        mask[:, random.integers(columns)] = False
    return mask


def packed_index(case: Case, mask: np.ndarray, slots: np.ndarray, capacity: int) -> Tensor:
    """The index of a live mask, entry by entry as the layout's definition says; -1 in `slots`: no slot."""
    rows, columns = mask.shape
    kh, kw, sh, sw, _, _, dh, dw, groups = case.conv
    channel_blocks = columns // (kh * kw)
    lists: list[list[tuple[int, int, int]]] = [[] for _ in range(groups * channel_blocks * sh * sw)]
    row_lists: list[list[tuple[int, int]]] = [[] for _ in range(rows)]
    block_of_slot = np.full(capacity, -1)
    for row, column in itertools.product(range(rows), range(columns)):
        if slots[row, column] >= 0:
            block_of_slot[slots[row, column]] = row * columns + column
        if mask[row, column]:
            tap, c = divmod(column, channel_blocks)
            r, s = divmod(tap, kw)
            phase = (r * dh % sh) * sw + s * dw % sw
            group = row // (rows // groups) if groups > 1 else 0
            lists[(group * channel_blocks + c) * sh * sw + phase].append((tap, row, column))
            row_lists[row].append((column, int(slots[row, column])))

    def pad(entries: list[int]) -> list[int]:
        return entries + [-1] * (capacity - len(entries))

    by_row = [entry for entries in row_lists for entry in entries]
    by_list = [entry for entries in lists for entry in sorted(entries)]
    live = int(mask.sum())
    sections = [
        [live, 0, int((slots >= 0).sum()), 0, 0, 0, 0, 0],
        block_of_slot.tolist(),
        [0, *np.cumsum([len(entries) for entries in row_lists])],
        pad([column for column, _ in by_row]),
        pad([slot for _, slot in by_row]),
        [0, *np.cumsum([len(entries) for entries in lists])],
        pad([row for _, row, _ in by_list]),
        pad([column for _, _, column in by_list]),
        pad([int(slots[row, column]) for _, row, column in by_list]),
        sorted(range(rows), key=lambda row: (-len(row_lists[row]), row)),
        sorted(range(len(lists)), key=lambda number: (-len(lists[number]), number)),
    ]
    return torch.tensor([int(number) for section in sections for number in section], dtype=torch.int32)


def make_problem(case: Case, dtype: torch.dtype) -> Problem:
    """Random tensors; slots in random order, NaN in every slot and padded place that may not be read."""
    random = np.random.default_rng(case.seed)
    torch.manual_seed(case.seed)
    columns = case.grid[1]
    bo, bi = case.block
    mask = draw_mask(case, random)
    has_slot = mask | (random.random(mask.shape) < 0.2)  # some suspended blocks
    capacity = int(has_slot.sum()) + int(random.integers(0, 4)) or 1
    slots = np.full(mask.shape, -1)
    slots[has_slot] = random.permutation(capacity)[: int(has_slot.sum())]

    kh, kw = case.kernel
    group_in = case.inputs // case.groups
    channel_blocks = columns // (kh * kw)
    dense = torch.zeros(case.outputs, group_in, kh, kw, dtype=torch.float64)
    values = torch.full((capacity, bi, bo), float("nan"), dtype=torch.float64)
    for row, column in zip(*np.nonzero(mask), strict=True):
        tap, c = divmod(int(column), channel_blocks)
        row = int(row)
        block = torch.randn(min(bi, group_in - c * bi), min(bo, case.outputs - row * bo)).to(dtype).double()
        values[slots[row, column], : block.shape[0], : block.shape[1]] = block
        dense[row * bo :, c * bi :, tap // kw, tap % kw][: block.shape[1], : block.shape[0]] = block.t()

    x = torch.randn(case.images, case.inputs, *case.size).to(dtype)
    if random.random() < 0.7:
        x = x.contiguous(memory_format=torch.channels_last)
    bias = torch.randn(case.outputs).to(dtype) if case.bias else None
    shape = F.conv2d(x, dense.to(dtype), None, case.stride, case.padding, case.dilation, case.groups).shape
    dy = torch.randn(shape).to(dtype)
    if random.random() < 0.5:
        dy = dy.contiguous(memory_format=torch.channels_last)
    index = packed_index(case, mask, slots, capacity)
    return Problem(
        x, dy, bias, dense, torch.from_numpy(mask), torch.from_numpy(slots), values.to(dtype), index
    )


def dense_results(
    case: Case, p: Problem, dtype: torch.dtype, absolute: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dW of torch's convolution in `dtype`, as float64; `absolute` of |tensors| (the scale)."""

    def leaf(t: Tensor) -> Tensor:
        return (t.abs() if absolute else t).to(dtype).requires_grad_()

    x, weight = leaf(p.x), leaf(p.dense)
    bias = leaf(p.bias) if p.bias is not None else None
    y = F.conv2d(x, weight, bias, case.stride, case.padding, case.dilation, case.groups)
    dx, dw = torch.autograd.grad(y, (x, weight), (p.dy.abs() if absolute else p.dy).to(dtype))
    return y.detach().double(), dx.double(), dw.double()


def run_kernels(case: Case, p: Problem) -> tuple[Tensor, ...]:
    """y, dx, dvalues, then (dvalues, saliency) of the fused op, then the probe."""
    ops = torch.ops.dynaprune_cpu
    bo, bi = case.block
    capacity = p.values.shape[0]
    y = ops.conv2d_forward(p.x, p.values, p.bias, p.packed, case.outputs, case.conv, case.channels_last)
    dx = ops.conv2d_dgrad(p.dy, p.values, p.packed, list(p.x.shape), case.conv, case.channels_last)
    dvalues = ops.conv2d_wgrad(p.dy, p.x, p.packed, capacity, bi, bo, case.conv)
    fused, saliency = ops.conv2d_wgrad_saliency(p.dy, p.x, p.values, p.packed, case.conv)
    probe = ops.conv2d_probe(p.dy, p.x, p.packed, capacity, bi, bo, case.conv)
    return y, dx, dvalues, fused, saliency, probe


def blocks_of(case: Case, dense: Tensor) -> Tensor:
    """A dense weight as [R, C, bi, bo], zeros in the padding."""
    bo, bi = case.block
    rows, columns = case.grid
    taps = case.kernel[0] * case.kernel[1]
    matrix = dense.permute(0, 2, 3, 1).flatten(1, 2)
    matrix = F.pad(matrix, (0, -dense.shape[1] % bi, 0, 0, 0, -dense.shape[0] % bo))
    blocks = matrix.reshape(rows, bo, taps, columns // taps, bi).permute(0, 2, 3, 4, 1)
    return blocks.reshape(rows, columns, bi, bo)


def assert_as_good(
    ours: Tensor, torchs: Tensor, exact: Tensor, scale: Tensor, dtype: torch.dtype, what: str
) -> None:
    """|ours - exact| <= 2 x torch's largest relative error + ORDER_OF_SUMS, in units of eps * scale."""
    assert ours.shape == exact.shape, what
    assert torch.isfinite(ours).all(), f"{what}: not finite"
    if exact.numel() == 0:
        return
    unit = torch.finfo(dtype).eps * scale
    assert (ours.double() - exact)[unit == 0].abs().sum() == 0, f"{what}: not zero where nothing contributes"
    unit = unit.clamp(min=torch.finfo(torch.float64).tiny)
    error = ((ours.double() - exact).abs() / unit).max().item()
    allowed = 2 * ((torchs - exact).abs() / unit).max().item() + ORDER_OF_SUMS
    assert error <= allowed, f"{what}: error {error:.2f} eps, allowed {allowed:.2f}"


def check(case: Case, dtype: torch.dtype) -> None:
    p = make_problem(case, dtype)
    y, dx, dvalues, fused, saliency, probe = run_kernels(case, p)
    exact, torchs = dense_results(case, p, torch.float64), dense_results(case, p, dtype)
    scale = dense_results(case, p, torch.float64, absolute=True)
    names = f"{case} {dtype}"
    assert y.dtype == dx.dtype == dvalues.dtype == dtype
    wanted = torch.channels_last if case.channels_last else torch.contiguous_format
    assert y.is_contiguous(memory_format=wanted) and dx.is_contiguous(memory_format=wanted), names
    assert_as_good(y, torchs[0], exact[0], scale[0], dtype, f"forward {names}")
    assert_as_good(dx, torchs[1], exact[1], scale[1], dtype, f"dgrad {names}")

    exact_blocks, scale_blocks = blocks_of(case, exact[2]), blocks_of(case, scale[2])
    live, slots = p.mask, p.slots[p.mask]
    assert_as_good(
        dvalues[slots],
        blocks_of(case, torchs[2])[live],
        exact_blocks[live],
        scale_blocks[live],
        dtype,
        f"wgrad {names}",
    )
    unlisted = torch.ones(dvalues.shape[0], dtype=torch.bool)
    unlisted[slots] = False
    assert (dvalues[unlisted] == 0).all(), f"unlisted slots are not zero: {names}"
    assert torch.equal(fused, dvalues), f"fused wgrad differs: {names}"

    # The sums over a block: their error is that of the gradients, weighted, plus one rounding an element.
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    assert saliency.dtype == probe.dtype == sums and saliency.numel() == probe.numel() == p.mask.numel()
    eps, rounding = torch.finfo(sums).eps, case.block[0] * case.block[1] + p.dy.numel() // p.dy.shape[1]
    weight_blocks = blocks_of(case, p.dense)
    expected = torch.where(live, (weight_blocks * exact_blocks).sum((2, 3)), 0.0)
    bound = rounding * eps * (weight_blocks.abs() * scale_blocks).sum((2, 3))
    assert ((saliency.double().view_as(expected) - expected).abs() <= bound).all(), f"saliency {names}"
    expected = torch.where(live, 0.0, exact_blocks.square().sum((2, 3)))
    bound = torch.where(live, 0.0, 2 * rounding * eps * (exact_blocks.abs() * scale_blocks).sum((2, 3)))
    bound += (rounding * eps * scale_blocks).square().sum((2, 3)) * ~live
    assert ((probe.double().view_as(expected) - expected).abs() <= bound).all(), f"probe {names}"


def random_case(seed: int) -> Case:
    """Any combination the kernels accept, small enough to take milliseconds."""
    random = np.random.default_rng(seed)

    def pair(choices: list[int]) -> tuple[int, int]:
        return int(random.choice(choices)), int(random.choice(choices))

    block = pair([8, 16, 32]) if random.random() < 0.8 else pair([8, 12, 24, 40, 64])
    groups = int(random.choice([1, 1, 1, 2, 3]))
    outputs = block[0] * int(random.integers(1, 3)) * groups if groups > 1 else int(random.integers(1, 80))
    inputs = groups * int(random.integers(1, 70))
    kernel, stride, dilation = pair([1, 2, 3, 3, 5]), pair([1, 1, 2, 3]), pair([1, 1, 2])
    padding = pair([0, 1, 2, 3])
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    size = least[0] + int(random.integers(0, 9)), least[1] + int(random.integers(0, 9))
    mask = str(random.choice(["random", "random", "random", "dead", "live", "one", "cross"]))
    return Case(
        int(random.integers(1, 5)),
        inputs,
        outputs,
        size,
        block,
        kernel,
        stride,
        padding,
        dilation,
        groups,
        mask,
        bool(random.integers(2)),
        seed,
        bool(random.integers(2)),
    )
