"""What the launchers refuse before any kernel runs, and what they take whatever its memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dynaprune_kernels import ConvGeometry
from dynaprune_kernels.backends import triton as kernels
from dynaprune_kernels.backends.pointwise import OverPixels
from dynaprune_kernels.geometry import Block
from tests.triton.interpret.guarded_memory import guarded
from tests.triton.parity import Case, Operands, operands

pytestmark = pytest.mark.interpret

CONV, POINTWISE = ConvGeometry(2, 2, 1, 1, 1, 1), ConvGeometry(1, 1)
LINEAR_CASE = Case(40, 64, (16, 32), "live", 4)
CONV_CASE = Case(32, 20, (16, 16), "live", 1, conv=CONV, size=(3, 4))


def without_memory(tensor: Tensor) -> Tensor:
    emptied = tensor.clone()
    emptied.untyped_storage().resize_(4)
    return emptied


def linear(op: str, **changed: Any) -> Callable[[], Any]:
    """A call on a linear layer, with some arguments replaced by functions of themselves."""
    o = operands(LINEAR_CASE, "cpu")
    return call("linear", op, o, (LINEAR_CASE.out,), (LINEAR_CASE.inputs,), (), changed)


def conv2d(op: str, **changed: Any) -> Callable[[], Any]:
    """The same of a convolution."""
    o = operands(CONV_CASE, "cpu")
    return call("conv2d", op, o, (CONV_CASE.out,), (list(o.x.shape),), (CONV,), changed)


def call(
    kind: str,
    op: str,
    o: Operands,
    outputs: tuple[Any, ...],
    inputs: tuple[Any, ...],
    conv: tuple[Any, ...],
    changed: dict[str, Any],
) -> Callable[[], Any]:
    given: dict[str, Any] = {
        "x": o.x, "dy": o.dy, "values": o.values, "bias": o.bias, "index": o.layout.index,
        "capacity": o.layout.capacity, "block": o.layout.block, "flag": torch.tensor(True),
        "outputs": outputs[0], "inputs": inputs[0], "conv": conv[0] if conv else None,
    }  # fmt: skip
    given |= {name: change(given[name]) for name, change in changed.items()}
    orders = {
        "forward": ("x", "values", "bias", "index", "outputs", "conv"),
        "dgrad": ("dy", "values", "index", "inputs", "conv"),
        "wgrad": ("dy", "x", "index", "capacity", "block", "conv"),
        "wgrad_saliency": ("dy", "x", "values", "index", "conv"),
        "probe": ("dy", "x", "index", "capacity", "block", "conv", "flag"),
    }
    arguments = [given[name] for name in orders[op] if name != "conv" or conv]
    return lambda: getattr(kernels, f"{kind}_{op}")(*arguments)


REFUSED = [
    (lambda: linear("forward", x=lambda t: t[0]), r"linear_forward: expected x of 2 dimensions"),
    (lambda: linear("forward", x=lambda t: t.double()), r"expected x of float16, bfloat16 or float32, got"),
    (lambda: linear("forward", values=lambda t: t.half()), r"expected values of torch.float32, got"),
    (lambda: linear("forward", values=lambda t: t.to("meta")), r"expected values dense and on cpu"),
    (lambda: linear("forward", values=without_memory), r"expected values .* with its memory"),
    (lambda: linear("forward", values=lambda t: t[:, :, :9].clone()), r"expected a block of 16, 32"),
    (lambda: linear("forward", values=lambda t: t[1:]), r"contiguous int32 index of"),
    (lambda: linear("forward", bias=lambda t: t[1:]), r"expected bias \[40\], got shape \[39\]"),
    (lambda: linear("forward", index=lambda t: t[1:]), r"for 3 block rows, 2 block columns, 2 column lists"),
    (lambda: linear("forward", index=lambda t: t.long()), r"got torch.int64"),
    (lambda: linear("forward", index=without_memory), r"expected index .* with its memory"),
    (lambda: linear("forward", outputs=lambda n: n + 16), r"expected bias \[56\]"),
    (lambda: linear("dgrad", inputs=lambda n: n + 32), r"int32 index of"),
    (lambda: linear("dgrad", inputs=lambda n: 0), r"expected at least one output and one input"),
    (lambda: linear("wgrad", dy=lambda t: t[1:]), r"expected dy \[4, 40\], got shape \[3, 40\]"),
    (lambda: linear("wgrad", capacity=lambda n: n - 1), r"int32 index of"),
    (lambda: linear("wgrad", capacity=lambda n: -1), r"a capacity of at least 0, got -1"),
    (lambda: linear("wgrad", block=lambda b: (b[0], 24)), r"expected a block of .* got \[16, 24\]"),
    (lambda: linear("wgrad_saliency", x=lambda t: t.half()), r"expected dy of torch.float16"),
    (lambda: linear("probe", flag=lambda t: t.float()), r"expected probe as one bool, got torch.float32"),
    (lambda: conv2d("forward", x=lambda t: t[0]), r"conv2d_forward: expected x of 4 dimensions"),
    (lambda: conv2d("forward", x=without_memory), r"expected x .* with its memory"),
    (lambda: conv2d("forward", x=lambda t: t[:, :4]), r"int32 index of"),
    (lambda: conv2d("forward", conv=lambda c: c._replace(groups=3)), r"channels divisible by groups=3"),
    (lambda: conv2d("forward", conv=lambda c: c._replace(stride_w=0)), r"expected numbers of a convolution"),
    (lambda: conv2d("dgrad", inputs=lambda s: [*s[:3], s[3] + 1]), r"expected dy \[1, 32, 4, 6\]"),
    (lambda: conv2d("dgrad", inputs=lambda s: s[:3]), r"expected an input \[N, C, H, W\]"),
    (lambda: conv2d("wgrad", dy=lambda t: t[..., 1:]), r"expected dy \[1, 32, 4, 5\]"),
    (
        lambda: (
            lambda: OverPixels(kernels).conv2d_wgrad(
                *[without_memory(torch.zeros(1, 16, 2, 2))] * 2,
                torch.zeros(20).int(),
                1,
                Block(16, 16),
                POINTWISE,
            )
        ),
        r"pixels: expected x \[1, 16, 2, 2\] with its memory",
    ),
    (lambda: conv2d("probe", flag=lambda t: t.expand(2)), r"expected probe as one bool"),
    (
        lambda: (
            lambda: kernels.block_saliency(
                torch.zeros(2, 16, 16), torch.zeros(3, 16, 16), torch.zeros(30).int(), 2, 1
            )
        ),
        r"block_saliency: expected grad \[2, 16, 16\]",
    ),
    (
        lambda: lambda: kernels.block_saliency(*[torch.zeros(2, 16, 16)] * 2, torch.zeros(27).int(), 2, 1),
        r"expected a contiguous int32 index of",
    ),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_does_not_fit_is_refused(make: Callable[[], Callable[[], Any]], message: str) -> None:
    run = make()
    with pytest.raises(ValueError, match=message):
        run()


@pytest.mark.parametrize("make", [linear, conv2d])
def test_a_bias_of_other_strides_is_the_same_bias(make: Callable[..., Callable[[], Any]]) -> None:
    torch.manual_seed(0)
    exact = make("forward")()
    torch.manual_seed(0)
    with guarded():
        assert torch.equal(make("forward", bias=lambda t: t.repeat_interleave(2)[::2])(), exact)


def test_channels_that_alignment_makes_too_many_are_refused() -> None:
    x, values = torch.zeros(1).expand(1, 1, 16384, 16384), torch.zeros(4, 16, 16)
    with pytest.raises(ValueError, match=r"at most 2\^30 elements per image, got 4294967296"):
        kernels.conv2d_forward(x, values, None, torch.zeros(40).int(), 16, CONV)
