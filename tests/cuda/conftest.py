"""Fixtures of the CUDA backend's tests."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest

from tests.cuda import emulation


@pytest.fixture
def emulated() -> Callable[[str], ModuleType]:
    """``emulated("saliency")``: the launchers of csrc/core/saliency.cu, run by host threads."""
    return emulation.load
