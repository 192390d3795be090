"""Every emulation test again under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

And the proof that they see what they should: with one barrier left out ThreadSanitizer reports a race, and
with one guard of the index left out AddressSanitizer an access outside of memory. The proof of a race in the
layout update is part of `make test-gpu-offline`; the rest, minutes of compiling, is `make sanitize`.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest

from tests.cuda.emulation import SANITIZERS, build, run_sanitized

pytestmark = [pytest.mark.gpu_offline, pytest.mark.timeout(900)]

OPS = sorted(
    path.stem.removeprefix("test_emulation_") for path in Path(__file__).parent.glob("test_emulation_*.py")
)

RACE = "WARNING: ThreadSanitizer: data race"
# What is left out, a test during which somebody then uses memory too early, and how that is noticed. Who does
# not wait for an mbarrier also loses count of its phases: which mistake shows first depends on timing.
LEFT_OUT = [
    ("saliency", "sync_block:1", "test_sums and all and float32 and not wide and not largest", RACE),
    ("layout_update", "sync_block:1", "test_updates and linear", RACE),
    ("runtime", "sync_warp:1", "test_neighbours", RACE),  # a shuffle before it orders nothing
    ("runtime", "named_barrier:1", "test_warps_with_roles", RACE),
    ("runtime", "named_barrier:2", "test_warps_with_roles", RACE),
    ("runtime", "sync_block:1", "test_warps_with_roles", ""),  # mbarriers not yet initialised
    ("runtime", "mbarrier_wait:2@40", "test_warps_with_roles", ""),  # a reader does not wait for the data
    ("runtime", "mbarrier_wait:3@0", "test_warps_with_roles", ""),  # the writer does not wait for the readers
]

CORRUPTED = "tests/cuda/test_corrupted_indices.py"
CORRUPTED_TESTS = {
    "linear": "test_linear",
    "linear_sm90": "test_linear_on_hopper",
    "conv2d": "test_conv2d",
    "conv2d_sm90": "test_conv2d_on_hopper",
    "saliency": "test_saliency",
    "layout_update": "test_layout_update",
}
OUTSIDE = "AddressSanitizer|runtime error"
# A guard of the index, one of these tests' cases that needs it, and how it is noticed that it is left out.
GUARDS = [
    ("linear", "order", "merged", OUTSIDE),
    ("linear", "pointers", "merged", OUTSIDE),
    ("linear", "slot", "merged", OUTSIDE),
    ("linear", "block", "one by one", OUTSIDE),
    ("linear", "column", "merged", OUTSIDE),
    ("saliency", "entry", "one warp each", OUTSIDE),
    ("saliency", "slot", "one warp each", OUTSIDE),
    ("layout_update", "slot", "linear", OUTSIDE),
    ("layout_update", "place", "linear", OUTSIDE),
    ("linear_sm90", "pointers", "low", "has NaN"),  # a number of stages below 0 ends the work
    ("linear_sm90", "slot", "low", OUTSIDE),
    ("conv2d_sm90", "column", "strided", "can_begin"),  # the copy engine takes no such shift
]


@pytest.mark.sanitized
@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("op", OPS)
def test_nothing_to_report(op: str, sanitizer: str) -> None:
    build(op, sanitizer)
    done = run_sanitized(sanitizer, f"tests/cuda/test_emulation_{op}.py")
    assert done.returncode == 0 and "Sanitizer" not in done.stdout, done.stdout[-8000:]


@functools.cache
def silent_when_whole(op: str, expression: str) -> None:
    """The same test without anything left out has nothing to report."""
    build(op, "thread")
    done = run_sanitized("thread", f"tests/cuda/test_emulation_{op}.py", "-k", expression)
    assert done.returncode == 0 and "ThreadSanitizer" not in done.stdout, done.stdout[-8000:]


@pytest.mark.parametrize(
    ("op", "wait", "expression", "report"),
    [
        pytest.param(
            *each, marks=[] if each[0] == "layout_update" else pytest.mark.sanitized, id="-".join(each[:2])
        )
        for each in LEFT_OUT
    ],
)
def test_a_removed_barrier_is_noticed(op: str, wait: str, expression: str, report: str) -> None:
    silent_when_whole(op, expression)
    settings = {"DYN_EMULATION_WITHOUT": wait}
    done = run_sanitized(
        "thread", f"tests/cuda/test_emulation_{op}.py", "-k", expression, environment=settings
    )
    assert done.returncode != 0 and report in done.stdout, done.stdout[-8000:]


@pytest.mark.sanitized
@pytest.mark.parametrize("sanitizer", SANITIZERS[:1])  # blocks that share a slot do race
@pytest.mark.parametrize("op", CORRUPTED_TESTS)
def test_no_index_leads_out_of_memory(op: str, sanitizer: str) -> None:
    build(op, sanitizer)
    done = run_sanitized(sanitizer, f"{CORRUPTED}::{CORRUPTED_TESTS[op]}")
    assert done.returncode == 0 and "Sanitizer" not in done.stdout, done.stdout[-8000:]


@pytest.mark.sanitized
@pytest.mark.parametrize("sanitizer", SANITIZERS[:1])
@pytest.mark.parametrize(("op", "guard", "name", "report"), GUARDS)
def test_a_removed_guard_is_noticed(op: str, guard: str, name: str, report: str, sanitizer: str) -> None:
    build(op, sanitizer)
    test = f"{CORRUPTED}::{CORRUPTED_TESTS[op]}[{name}-{op}]"
    done = run_sanitized(sanitizer, test, environment={"DYN_EMULATION_WITHOUT": guard})
    assert done.returncode != 0 and re.search(report, done.stdout), done.stdout[-8000:]


@pytest.mark.sanitized
def test_a_write_behind_shared_memory_is_reported() -> None:
    build("runtime", "address,undefined")
    done = run_sanitized(
        "address,undefined",
        "tests/cuda/test_emulation_runtime.py::test_write_behind_shared_memory",
        environment={"DYN_TRY_MISTAKE": "1"},
    )
    assert done.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in done.stdout, done.stdout
