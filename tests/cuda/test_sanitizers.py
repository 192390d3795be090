"""Every emulation test again under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

And the proof that ThreadSanitizer sees what it should: with one barrier left out it reports a race. The proof
on the layout update is part of `make test-gpu-offline`; the rest, minutes of compiling, is `make sanitize`.
"""

from __future__ import annotations

import functools
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
def test_a_write_behind_shared_memory_is_reported() -> None:
    build("runtime", "address,undefined")
    done = run_sanitized(
        "address,undefined",
        "tests/cuda/test_emulation_runtime.py::test_write_behind_shared_memory",
        environment={"DYN_TRY_MISTAKE": "1"},
    )
    assert done.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in done.stdout, done.stdout
