"""The CPU kernels say how much scratch memory they hold, and how much they held at most."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from dynaprune_kernels import BlockLayout, _extension, block_sparse_conv2d, block_sparse_linear
from dynaprune_kernels.backends.cpu import scratch_bytes
from dynaprune_kernels.geometry import ConvGeometry

STATUS = _extension.load()
pytestmark = pytest.mark.skipif(not STATUS.loaded, reason=str(STATUS.reason))


def _convolve(channels: int) -> None:
    conv = ConvGeometry(3, 3, 1, 1, 1, 1)
    layout = BlockLayout(channels, channels, 16, conv=conv)
    values = torch.randn(layout.capacity, 16, 16, requires_grad=True)
    x = torch.randn(2, channels, 9, 9, requires_grad=True)
    block_sparse_conv2d(x, values, None, layout).sum().backward()


def _in_a_thread(channels: int) -> tuple[int, int]:
    """What a new thread held after a convolution, and after another one; it has given all of it back."""
    held: list[int] = []
    before, _ = scratch_bytes()

    def work() -> None:
        for _ in range(2):
            _convolve(channels)
            held.append(scratch_bytes()[0] - before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    deadline = time.monotonic() + 60  # Python's join comes a little before the system's
    while scratch_bytes()[0] != before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert scratch_bytes()[0] == before
    return held[0], held[1]


def test_convolutions_keep_their_scratch_until_their_thread_ends() -> None:
    before, _ = scratch_bytes(restart=True)
    first, second = _in_a_thread(32)
    assert first == second > 0
    held, most = scratch_bytes()
    assert held == before and most >= before + first


def test_larger_convolutions_hold_more() -> None:
    assert _in_a_thread(64)[0] > _in_a_thread(16)[0]


def test_linear_layers_give_theirs_back_and_the_most_says_what_it_was() -> None:
    layout = BlockLayout(512, 512, 16)
    values = torch.randn(layout.capacity, 16, 16, requires_grad=True)
    held, most = scratch_bytes(restart=True)
    assert scratch_bytes() == (held, held)
    block_sparse_linear(torch.randn(64, 512), values, None, layout).sum().backward()
    after, most = scratch_bytes()
    assert after == held
    # The weight's gradient marks the slots that are listed, a byte each, and packs 64 rows of both operands.
    assert most - held >= layout.capacity
    assert scratch_bytes(restart=True) == (held, most)
    assert scratch_bytes() == (held, held)


def test_what_is_held_is_a_whole_number_of_cache_lines() -> None:
    _convolve(16)
    held, most = scratch_bytes()
    assert most >= held > 0 and held % 64 == most % 64 == 0
