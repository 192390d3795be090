"""Pruning changes shapes, and a compiled model is compiled anew for each, up to a limit of torch's."""

from __future__ import annotations

import math
import sys
import warnings
from typing import Any

import torch
from torch import nn

from dynaprune.pruning.config import PruningConfig


def is_compiled(given: nn.Module, *, counted: bool) -> bool:
    """Whether the model, a part of it or the function around it runs compiled, as far as can be seen.

    Args:
        given: the model, or what is around it.
        counted: its layers have counted tokens, which they do not in compiled code.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return False
    compiled = sys.modules["torch._dynamo.eval_frame"].OptimizedModule
    if any(isinstance(m, compiled) or m._compiled_call_impl is not None for m in given.modules()):
        return True
    return not counted and bool(dynamo.utils.counters["frames"])


def say_recompilations(
    given: nn.Module, config: PruningConfig, *, counted: bool, step: int, interval: int
) -> bool:
    """Warn, when shapes change for the first time, where torch's limit comes before the last event.

    Args:
        given, counted: see :func:`is_compiled`.
        step: optimizer steps done. interval: steps between events.

    Returns:
        Whether nothing more is to be said.
    """
    if not is_compiled(given, counted=counted):
        return False
    settings: Any = torch._dynamo.config
    limit, left = settings.recompile_limit, _events_left(config, step, interval)
    if (settings.force_parameter_static_shapes or config.neurons) and (left is None or left + 2 > limit):
        events = "every event" if left is None else f"up to {left} more events"
        needed = "" if left is None else f" to {left + 2} or more"
        warnings.warn(
            f"pruning has changed the shapes of weights of the compiled model at step {step}, and "
            f"will in {events}. Each time the model is compiled anew, and past "
            f"torch._dynamo.config.recompile_limit = {limit} torch runs it uncompiled. Before training, "
            f"raise the limit{needed}; or, with neurons=False, set torch._dynamo.config."
            "force_parameter_static_shapes = False, which spares most compilations; or compile after the "
            "last event",
            RuntimeWarning,
            stacklevel=5,
        )
    return True


def _events_left(config: PruningConfig, step: int, interval: int) -> int | None:
    """Events that may still come, None where that is open."""
    if config.total_steps is None:
        return None
    end = math.floor(config.end * config.total_steps)
    return math.ceil(max(0, end - step) / interval)
