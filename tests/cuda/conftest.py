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
    files = {item.path.stem for item in request.session.items if item.path.parent.name == "cuda"}
    ops = sorted(name.removeprefix("test_emulation_") for name in files if name.startswith("test_emulation_"))
    if len(ops) > 1 and emulation.reason_against() is None:
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            list(pool.map(emulation.build, ops))


@pytest.fixture
def emulated() -> Callable[[str], ModuleType]:
    """``emulated("saliency")``: the launchers of csrc/core/saliency.cu, run by host threads."""
    return emulation.load
