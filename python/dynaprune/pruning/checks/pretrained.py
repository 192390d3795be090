"""Signs that a model's weights were trained, which random masks would destroy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dynaprune.nn.weight_account import is_norm


def refuse_trained(model: nn.Module) -> None:
    """Raise ValueError where :func:`signs_of_training` finds one."""
    signs = list(signs_of_training(model))
    if signs:
        raise ValueError(
            f"cannot leave out random blocks of weights that look trained ({'; '.join(signs)}): what was "
            "learned would be lost. Give dynaprune.prepare a calibration, which chooses the blocks that "
            "matter, or prune gradually (initial_sparsity=0). Where the weights are new in spite of this, "
            "set mask_pretrained=True"
        )


def signs_of_training(model: nn.Module) -> Iterator[str]:
    """One sign of each kind: where a configuration says that the weights come from, a norm's weights that are
    neither all 1 nor all 0, running statistics that have seen data. A network without norms shows none."""
    name = next(filter(None, map(_origin, model.modules())), None)
    if name is not None:
        yield name
    norms = [(path, module) for path, module in model.named_modules() if is_norm(module)]
    for path, module in norms:
        weight = module._parameters.get("weight")
        if weight is not None and not weight.is_meta and not _all(weight, 1) and not _all(weight, 0):
            yield f"the weights of the norm {path} are not 1"
            break
    for path, module in norms:
        if _has_seen_data(module):
            yield f"the running statistics of {path} are not those of a new norm"
            break


def _origin(module: nn.Module) -> str | None:
    config = getattr(module, "config", None)
    for key in ("name_or_path", "_name_or_path"):
        value: Any = getattr(config, key, None)
        if isinstance(value, str) and value:
            return f"config.{key} is {value!r}"
    return None


def _has_seen_data(norm: nn.Module) -> bool:
    initial = {"running_mean": 0, "running_var": 1, "num_batches_tracked": 0}
    found = {key: norm._buffers.get(key) for key in initial}
    return any(t is not None and not t.is_meta and not _all(t, initial[key]) for key, t in found.items())


def _all(tensor: Tensor, value: float) -> bool:
    return bool((tensor.detach() == torch.tensor(value, dtype=tensor.dtype, device=tensor.device)).all())
