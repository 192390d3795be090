"""DistributedDataParallel around a model in a group of one process (``torchrun --nproc-per-node 1``).

The mean over one process is each gradient itself, and DistributedDataParallel computes it in buckets of the
shapes that the weights had when it was made. Pruning changes these shapes; the wrapper then stops at an
unfinished reduction. So its averaging is taken off: what it averaged stays the same, bit for bit.
"""

from __future__ import annotations

import gc

from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

_AROUND = "cannot prune inside DistributedDataParallel"


def in_a_group() -> bool:
    """Whether this process has joined a process group, of one process or of more."""
    return distributed.is_available() and distributed.is_initialized()


def take_off_averaging_(model: nn.Module) -> None:
    """Stop every DistributedDataParallel around ``model``, or around what contains it, from averaging.

    The wrapper leaves no mark on what it wraps, so all objects of the process are looked through. That takes
    about a tenth of a second, and only where a process group is initialised.

    Raises:
        RuntimeError: more than one process. ValueError: a wrapper that does more than to average.
    """
    if not in_a_group():
        return
    if (size := distributed.get_world_size()) > 1:
        raise RuntimeError(
            f"cannot prune at world size {size}: ranks would prune differently, and a Parameter of another "
            "shape loses DistributedDataParallel's averaging without a word; train in one process"
        )
    for found in gc.get_objects():
        if issubclass(type(found), DistributedDataParallel) and any(m is model for m in found.modules()):
            if reason := wrapper_reason(found):
                raise ValueError(f"{_AROUND}: {reason}")
            if found.require_backward_grad_sync:
                found.require_backward_grad_sync = False
                found._remove_autograd_hooks()


def wrapper_reason(wrapper: DistributedDataParallel) -> str:
    """Why ``wrapper``, alone in its group, cannot hold a model that is pruned; empty where it can."""
    if getattr(wrapper, "static_graph", False):
        return "static_graph=True promises that no shape ever changes, and pruning does; leave it out"
    if getattr(wrapper, "mixed_precision", None) is not None:
        return "its mixed_precision keeps copies of the weights in their first shape; use torch.autocast"
    return ""


def inside(model: nn.Module) -> nn.Module:
    """The model that ``torch.compile`` and DistributedDataParallel were put around, in any order."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model
