"""The emulation itself: threads, warps, shared memory, asynchronous copies, and how it reports mistakes."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

from tests.cuda.emulation import CHOSEN, bfloat16_bits

pytestmark = pytest.mark.gpu_offline

Emulated = Callable[[str], ModuleType]


def test_every_thread_of_every_block_runs_once(emulated: Emulated) -> None:
    found = emulated("runtime").place((3, 2, 4), 40)
    z, y, x, thread = np.indices(found.shape)
    np.testing.assert_array_equal(found, 1000 * z + 100 * y + 10 * x + thread % 32 + thread // 32)


def test_an_empty_grid_is_no_launch(emulated: Emulated) -> None:
    assert emulated("runtime").place((3, 0, 4), 32).size == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding(emulated: Emulated, dtype: str) -> None:
    random = np.random.default_rng(0)
    exact = np.arange(2**16, dtype=np.uint16)
    exact_values = exact.view(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        exact_values = (exact.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        ties = (exact_values[:-1].astype(np.float64) + exact_values[1:]) / 2  # of neighbours of one sign
        drawn = random.standard_normal(20000) * 10.0 ** random.integers(-12, 8, 20000)
        values = np.concatenate([exact_values, ties.astype(np.float32), drawn.astype(np.float32)])
        values = values[~np.isnan(values)]
        expected = bfloat16_bits(values) if dtype == "bfloat16" else values.astype(np.float16).view(np.uint16)
    rounded, back = emulated("runtime").round_to(values, dtype)
    np.testing.assert_array_equal(rounded, expected)
    expanded = (expected.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(back, expanded if dtype == "bfloat16" else expected.view(np.float16))
    nan, back = emulated("runtime").round_to(np.array([np.nan, -np.nan], dtype=np.float32), dtype)
    assert nan.tolist() == [0x7FFF, 0x7FFF] and np.isnan(back).all()


@pytest.mark.parametrize(("threads", "stop"), [(64, 64), (64, 48), (64, 32), (40, 40)])
def test_lanes_exchange_values(emulated: Emulated, threads: int, stop: int) -> None:
    from_lane, xor, up, down, votes = emulated("runtime").shuffles(threads, stop)
    thread = np.arange(stop)
    lane, first = thread % 32, thread // 32 * 32
    lanes = np.minimum(32, stop - first)  # of the warp that did not return
    np.testing.assert_array_equal(from_lane[:stop], 100 + first + 3)
    expected = [(xor, lane ^ 5), (up, np.where(lane < 2, lane, lane - 2))]
    expected.append((down, np.where(lane < 28, lane + 4, lane)))
    for found, other in expected:
        there = other < lanes  # what a lane that returned would show is undefined
        np.testing.assert_array_equal(found[:stop][there], (100 + first + other)[there])
    multiples = np.array([sum(1 << k for k in range(0, n, 3)) for n in lanes])
    np.testing.assert_array_equal(votes[:stop], multiples)
    assert (votes[stop:] == 0xFFFFFFFF).all()  # never written


def test_neighbours(emulated: Emulated) -> None:
    np.testing.assert_array_equal(emulated("runtime").neighbours(64), np.arange(64) ^ 1)


@pytest.mark.parametrize("pending", [0, 1, 2])
def test_a_copy_takes_place_when_it_is_waited_for(emulated: Emulated, pending: int) -> None:
    values = np.arange(1, 9, dtype=np.float32).reshape(2, 4)
    found = emulated("runtime").copies(values, pending)
    values[1, 2:] = 0
    values[2 - pending :] = np.nan
    np.testing.assert_array_equal(found, values)


def test_warps_with_roles(emulated: Emulated) -> None:
    values = np.random.default_rng(0).integers(0, 100, (9, 64)).astype(np.float32)
    found = emulated("runtime").pipeline(values)
    sums = [sum(values[r, (32 + t + r) % 64] for r in range(9)) for t in range(64)]
    np.testing.assert_array_equal(found, sums[::-1])


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("deadlock", "deadlock: every thread waits"),
        ("misaligned", r"not so: .*16 == 0 \(thread 3 of block 0, 0, 0\)"),
        ("outside", "an address outside shared memory"),
        ("not initialised", "not an mbarrier, or not yet initialised"),
        ("not waited for", "a block ended before its copies"),
    ],
)
def test_mistakes_are_reported(emulated: Emulated, mistake: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        emulated("runtime").mistake(mistake)
    assert emulated("runtime").neighbours(32)[0] == 1  # and the next launch works


def test_an_unknown_wait_to_leave_out_is_an_error(
    emulated: Emulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_EMULATION_WITHOUT", "sync_blok:1")
    with pytest.raises(ValueError, match="DYN_EMULATION_WITHOUT=sync_blok:1"):
        emulated("runtime").neighbours(32)


@pytest.mark.skipif("DYN_TRY_MISTAKE" not in os.environ, reason="run by test_sanitizers.py")
def test_write_behind_shared_memory(emulated: Emulated) -> None:
    assert os.environ[CHOSEN] != ""
    emulated("runtime").mistake("behind")
