"""Which convolutions have a position of the kernel that no output lays on the input."""

from __future__ import annotations

import random

import torch

from dynaprune_kernels.geometry import ConvGeometry
from dynaprune_kernels.reference import _a_tap_meets_only_padding


def _tried_one_by_one(size: torch.Size, conv: ConvGeometry) -> bool:
    for dim, outputs in enumerate(conv.output_size(size[2], size[3])):
        kernel, stride, padding, dilation = conv[dim:8:2]
        for tap in range(kernel):
            at = range(tap * dilation - padding, tap * dilation - padding + outputs * stride, stride)
            if not any(0 <= position < size[dim + 2] for position in at):
                return True
    return False


def test_the_rule_says_what_trying_every_position_says() -> None:
    said = {True: 0, False: 0}
    for seed in range(4000):
        pick = random.Random(seed)
        pairs = [pick.randint(*span) for span in ((1, 9), (1, 9), (0, 12), (1, 5)) for _ in "hw"]
        conv, size = ConvGeometry(*pairs), torch.Size([1, 1, pick.randint(1, 12), pick.randint(1, 12)])
        try:
            conv.output_size(size[2], size[3])
        except ValueError:
            continue
        met = _a_tap_meets_only_padding(size, conv)
        assert met == _tried_one_by_one(size, conv), (conv, size)
        said[met] += 1
    assert min(said.values()) > 300


def test_the_rule_takes_no_longer_for_a_huge_kernel() -> None:
    huge = 2**40
    assert _a_tap_meets_only_padding(torch.Size([1, 1, 7, 7]), ConvGeometry(huge, 1, 1, 1, huge // 2, 0))
    assert not _a_tap_meets_only_padding(torch.Size([1, 1, 7, 7]), ConvGeometry(huge, 1, 1, 1, huge, 0))
    assert not _a_tap_meets_only_padding(torch.Size([1, 1, 2 * huge, 7]), ConvGeometry(huge, 1))
