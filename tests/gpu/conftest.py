"""Every test here needs an NVIDIA GPU; without one they are skipped with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from dynaprune_kernels.backends import dispatch
from tests.gpu.small_set import against


@pytest.fixture(autouse=True)
def float32_means_float32() -> Iterator[None]:
    """No TF32 unless a test asks for it, and the switches as they were afterwards."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(params=["triton", "cuda"])
def able(request: pytest.FixtureRequest) -> str:
    """A backend that can run here; skipped, with the reason, for one that cannot."""
    name: str = request.param
    reason = against(name)
    if reason is not None:
        pytest.skip(reason)
    return name


@pytest.fixture
def kernels(able: str) -> ModuleType:
    """The functions of the backend."""
    return dispatch.BACKENDS[able]


@pytest.fixture
def backend(able: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every op on the kernels of the backend, or an error."""
    monkeypatch.setenv("DYNAPRUNE_BACKEND", able)
    return able
