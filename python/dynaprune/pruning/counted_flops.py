"""The floating point operations of what is run, by torch's counter and the formulas that it lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from dynaprune.pruning.flop_formulas import uncounted_by_torch


def flops_of(run: Callable[[], Any]) -> tuple[Any, int]:
    """``(run(), its floating point operations)`` by torch's counter: block-sparse ops count their live
    blocks, and so are products that torch's counter leaves out (see ``flop_formulas``)."""
    result, flops, of_probes = flops_and_probes(run)
    return result, flops + of_probes


def flops_and_probes(run: Callable[[], Any]) -> tuple[Any, int, int]:
    """As :func:`flops_of`, but what measuring the dense gradient at dead blocks took comes apart, last."""
    with FlopCounterMode(display=False, custom_mapping=uncounted_by_torch()) as counter:
        result = run()
    by_op = counter.get_flop_counts().get("Global", {})
    probes = sum(flops for op, flops in by_op.items() if "gradient_probe" in str(op))
    return result, int(counter.get_total_flops()) - int(probes), int(probes)
