"""What the check of a packed index costs: `python -m benchmarks.index_check`.

The check alone is timed through an op that does nothing else, a thousand at a time. The forward pass that
it guards is timed as it is, with the check inside. Both alternate within one run. Share = check /
(forward - check), of the medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from dynaprune_kernels import BlockLayout, block_sparse_linear
from dynaprune_kernels.geometry import ConvGeometry

SHAPES = [(1024, 1024), (768, 768), (128, 64)]
BATCH, BLOCK, ROUNDS, CHECKS = 32, 32, 200, 1000


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measured(out: int, inputs: int, density: float) -> tuple[list[float], list[float]]:
    """Seconds of forward passes, and of as many checks of their index."""
    generator = torch.Generator().manual_seed(0)
    grid = -(-out // BLOCK), -(-inputs // BLOCK)
    layout = BlockLayout(out, inputs, BLOCK, mask=torch.rand(grid, generator=generator) <= density)
    values = torch.randn(layout.capacity, BLOCK, BLOCK, generator=generator)
    x = torch.randn(BATCH, inputs, generator=generator)
    conv = list(ConvGeometry(1, 1))
    check = torch.ops.dynaprune_cpu.check_index
    forward, checks = [], []
    with torch.no_grad():
        for _ in range(ROUNDS):
            forward.append(seconds(lambda: block_sparse_linear(x, values, None, layout)))
            given = (layout.index, *grid, layout.capacity, conv, False, CHECKS)
            checks.append(seconds(lambda given=given: check(*given)) / CHECKS)
    return forward, checks


def main() -> None:
    """Print a row per shape and density."""
    print(f"{torch.get_num_threads()} threads, batch {BATCH}, blocks of {BLOCK}: medians (quartiles) in us")
    for out, inputs in SHAPES:
        for density in (1.0, 0.5, 0.1):
            forward, checks = measured(out, inputs, density)
            low, middle, high = (1e6 * q for q in statistics.quantiles(forward, n=4))
            check = 1e6 * statistics.median(checks)
            share = check / (middle - check)
            print(
                f"{out}x{inputs} density {density}: forward {middle:.1f} ({low:.1f} to {high:.1f}), "
                f"check {check:.2f}, share {share:.2%}"
            )


if __name__ == "__main__":
    main()
