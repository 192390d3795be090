"""The raw CUDA ops over emulated kernels, with arguments that are not as they should be: refused, or run."""

from __future__ import annotations

import collections
import random
from typing import Any

import pytest
import torch

from dynaprune_kernels import BlockLayout, ConvGeometry
from tests.cuda import tensors
from tests.fuzz.malformed_calls import malformed

pytestmark = [pytest.mark.gpu_offline, pytest.mark.slow]

CALLS = 600
CONV = ConvGeometry(2, 3, 1, 2, 0, 1, 1, 1, 2)


def right_calls() -> list[tuple[str, list[Any]]]:
    """Op and arguments of a linear layer of 40 inputs and 20 outputs, and of a small grouped convolution."""
    generator = torch.Generator().manual_seed(0)
    linear = BlockLayout(20, 40, (16, 16), capacity=5, mask=torch.tensor([[1, 0, 1], [1, 1, 0]]) > 0)
    conv = BlockLayout(64, 20, (16, 16), conv=CONV, mask=torch.rand(4, 6, generator=generator) < 0.6)
    x, dy = torch.zeros(3, 48), torch.zeros(3, 32)
    x[:, :40], dy[:, :20] = torch.randn(3, 40, generator=generator), torch.randn(3, 20, generator=generator)
    (height, width), numbers = CONV.output_size(3, 5), list(CONV)
    images, gradients = torch.zeros(1, 3, 5, 32), torch.randn(1, height, width, 64, generator=generator)
    images[..., [*range(10), *range(16, 26)]] = 1.0
    values, probe = torch.randn(5, 16, 16, generator=generator), torch.tensor(True)
    weight, slots = torch.randn(conv.capacity, 16, 16, generator=generator), conv.capacity
    sizes, block, bias = [40, 20, False], [5, 16, 16], torch.zeros(20)
    update = [conv.mask, conv.slot_of_block, conv.index, slots, 2, [2, 3], [1, 2], [1, 1], True]
    return [
        ("linear_forward", [x, values, bias, linear.index, *sizes]),
        ("linear_dgrad", [dy, values, linear.index, *sizes]),
        ("linear_wgrad", [dy, x, linear.index, *block, *sizes]),
        ("linear_wgrad_saliency", [dy, x, values, linear.index, *sizes]),
        ("linear_probe", [dy, x, linear.index, *block, 40, 20, probe, False]),
        ("conv2d_forward", [images, weight, None, conv.index, 20, 64, numbers, False]),
        ("conv2d_dgrad", [gradients, weight, conv.index, 64, [1, 20, 3, 5], numbers, False]),
        ("conv2d_wgrad", [gradients, images, conv.index, slots, 16, 16, 20, 64, numbers, False]),
        ("conv2d_wgrad_saliency", [gradients, images, weight, conv.index, 20, 64, numbers, False]),
        ("conv2d_probe", [gradients, images, conv.index, slots, 16, 16, 20, 64, numbers, probe, False]),
        ("block_saliency", [values, values.clone(), linear.index, 2, 3]),
        ("layout_update", update),
    ]


@pytest.mark.parametrize("capability", ["80", "90"])
def test_every_call_is_refused_or_runs(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_EMULATION_CAPABILITY", capability)
    calls, raw = right_calls(), tensors.load()
    for op, arguments in calls:
        getattr(raw, op)(*(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments))
    became: collections.Counter[str] = collections.Counter()
    for number in range(CALLS):
        pick = random.Random(f"{capability}/{number}")
        torch.manual_seed(number)
        op, arguments = calls[number % len(calls)]
        try:
            getattr(raw, op)(*malformed(arguments, pick))
        except Exception as error:
            became[type(error).__name__] += 1
        else:
            became["returned"] += 1
    assert became["RuntimeError"] > CALLS / 4 and became["returned"]


def test_tensors_that_overlap_are_refused() -> None:
    op, arguments = right_calls()[-1]
    memory = torch.zeros(arguments[2].numel() + arguments[1].numel(), dtype=torch.int32)
    arguments[2] = memory[: arguments[2].numel()]
    arguments[1] = memory[-arguments[1].numel() - 1 : -1].view(arguments[1].shape)
    with pytest.raises(RuntimeError, match="in memory of their own"):
        getattr(tensors.load(), op)(*arguments)
