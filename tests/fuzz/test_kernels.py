"""A slice of the fuzzing of kernels, without the sanitizer: `make fuzz-kernels` runs all of it, with it."""

from __future__ import annotations

import pytest

from dynaprune_kernels import _extension
from tests.fuzz.kernels import KINDS, fuzz

SEED, CASES = 7, 800


@pytest.mark.skipif(not _extension.load().loaded, reason="the compiled kernels are not loaded")
@pytest.mark.parametrize("kind", KINDS)
def test_every_case_raises_or_is_right(kind: str) -> None:
    outcomes, faults = fuzz(kind, SEED, 0, CASES, sanitized=False)
    assert faults == []
    assert sum(outcomes.values()) == CASES
    became = {outcome for _, outcome in outcomes}
    assert any("refused" in each for each in became)
    if kind == "indices":
        assert {"right", "refused as corrupted"} <= became
