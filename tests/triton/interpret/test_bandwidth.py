"""The kernel that measures bandwidth reads every tile as often as it says."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu_bandwidth

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize(("tiles", "programs", "repeat"), [(3, 2, 4), (5, 3, 1), (1, 2, 2)])
def test_sums_are_those_of_the_tiles_that_are_read(tiles: int, programs: int, repeat: int, tma: bool) -> None:
    source = torch.randn(tiles * gpu_bandwidth.ROWS, gpu_bandwidth.COLUMNS).to(torch.float16)
    sums = gpu_bandwidth.reader(source, programs, repeat, tma=tma)()
    gpu_bandwidth.check("sums", sums, source, programs, repeat)
    with pytest.raises(RuntimeError, match="sums are wrong"):
        gpu_bandwidth.check("sums", sums + 0.1, source, programs, repeat)
