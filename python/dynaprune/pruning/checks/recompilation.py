"""Pruning changes shapes, and a compiled model is compiled anew for each, up to a limit of torch's."""

from __future__ import annotations

import math
import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from dynaprune.pruning.pruner import Pruner


def is_compiled(pruner: Pruner) -> bool:
    """Whether the model, a part of it or the function around it runs compiled, as far as can be seen."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return False
    compiled = sys.modules["torch._dynamo.eval_frame"].OptimizedModule
    if any(isinstance(m, compiled) or m._compiled_call_impl is not None for m in pruner.given.modules()):
        return True
    return not pruner.rows and bool(dynamo.utils.counters["frames"])  # rows are not counted in compiled code


def say_recompilations(pruner: Pruner) -> bool:
    """Warn, when shapes change for the first time, where torch's limit comes before the last event.

    Returns:
        Whether nothing more is to be said.
    """
    if not is_compiled(pruner):
        return False
    settings: Any = torch._dynamo.config
    limit, left = settings.recompile_limit, _events_left(pruner)
    cuts = pruner.config.neurons
    if (settings.force_parameter_static_shapes or cuts) and (left is None or left + 2 > limit):
        events = "every event" if left is None else f"up to {left} more events"
        needed = "" if left is None else f" to {left + 2} or more"
        warnings.warn(
            f"pruning has changed the shapes of weights of the compiled model at step {pruner.steps}, and "
            f"will in {events}. Each time the model is compiled anew, and past "
            f"torch._dynamo.config.recompile_limit = {limit} torch runs it uncompiled. Before training, "
            f"raise the limit{needed}; or, with neurons=False, set torch._dynamo.config."
            "force_parameter_static_shapes = False, which spares most compilations; or compile after the "
            "last event",
            RuntimeWarning,
            stacklevel=5,
        )
    return True


def _events_left(pruner: Pruner) -> int | None:
    """Events that may still come, None where that is open."""
    config = pruner.config
    if config.total_steps is None:
        return None
    end = math.floor(config.end * config.total_steps)
    return math.ceil(max(0, end - pruner.steps) / pruner.pace.interval)
