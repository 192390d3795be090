"""Fixtures of the CUDA backend's tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest

from tests.cuda import emulation


@pytest.fixture(scope="session", autouse=True)
def built(request: pytest.FixtureRequest) -> None:
    """Every module that the session's tests need, compiled side by side."""
    modules = sorted({module for item in request.session.items for module in _modules(item)})
    if len(modules) > 1 and emulation.reason_against() is None:
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            list(pool.map(lambda module: emulation.build(*module), modules))


def _modules(item: pytest.Item) -> list[tuple[str, str]]:
    """Op and sanitizer of what a test loads, or runs in a process of its own."""
    name = item.path.stem
    if item.path.parent.name == "cuda" and name.startswith("test_emulation_"):
        return [(name.removeprefix("test_emulation_"), "")]
    chosen = getattr(item, "callspec", None)
    if chosen is None or name not in ("test_sanitizers", "test_corrupted_indices"):
        return []
    sanitizer = "thread" if name == "test_sanitizers" else ""
    return [(chosen.params["op"], chosen.params.get("sanitizer", sanitizer))]


@pytest.fixture
def emulated() -> Callable[[str], ModuleType]:
    """``emulated("saliency")``: the launchers of csrc/core/launch/saliency.cu, run by host threads."""
    return emulation.load
