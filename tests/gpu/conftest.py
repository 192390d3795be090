"""Every test here needs an NVIDIA GPU; without one they are skipped with the reason."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def float32_means_float32() -> Iterator[None]:
    """No TF32 unless a test asks for it, and the switches as they were afterwards."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every op on the Triton kernels, or an error."""
    monkeypatch.setenv("DYNAPRUNE_BACKEND", "triton")
