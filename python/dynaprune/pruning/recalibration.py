"""New running statistics for batch norms after the network has changed: evaluation uses them, training does
not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dynaprune.nn.calibration_mode import calibration_mode, uncompiled

_STATISTICS = ("running_mean", "running_var")


def recalibrate_batch_norm(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> int:
    """Replace every batch norm's running statistics by their means over ``batches``.

    Removing blocks or neurons changes what the layers before a norm put out; its running statistics then
    describe a network that is gone, until enough training steps have moved them. The means are cumulative
    (``momentum=None``): each batch counts alike, as ``torch.optim.swa_utils.update_bn`` does it.

    All norms are measured in the same pass, each on inputs that the norms before it have standardised by the
    batch, as in training. Weights, modes, random states and every other buffer stay as they were, dropout is
    off, ``momentum`` is kept. A norm that the user froze (itself in evaluation mode while the model trains)
    keeps its statistics, and so does one that the batches do not reach, or that tracks none.

    Args:
        model: the model in training or evaluation mode.
        batches: training samples, in batches of the size of training or larger, on the model's device.
        forward: ``forward(model, batch)`` runs the model; default ``model(batch)``.

    Returns:
        The number of norms that have new statistics; 0 (no batch is drawn) where there is none to change.

    Raises:
        ValueError: norms to recalibrate, and no batch.
    """
    norms = _norms(model)
    if not norms:
        return 0
    run = forward if forward is not None else lambda model, batch: model(batch)
    momenta = {name: norm.momentum for name, norm in norms.items()}
    found: dict[str, dict[str, Tensor]] = {}
    try:
        with calibration_mode(model), uncompiled():
            for norm in norms.values():
                norm.reset_running_stats()
                norm.momentum = None
            seen = 0
            for batch in batches:
                run(model, batch)
                seen += 1
            if not seen:
                raise ValueError("expected at least one batch to recalibrate batch norms with, got none")
            for name, norm in norms.items():
                assert norm.num_batches_tracked is not None
                if int(norm.num_batches_tracked) > 0:
                    found[name] = {key: getattr(norm, key) for key in (*_STATISTICS, "num_batches_tracked")}
    finally:
        for name, norm in norms.items():
            norm.momentum = momenta[name]
    with torch.no_grad():
        for name, statistics in found.items():
            for key, value in statistics.items():
                getattr(norms[name], key).copy_(value)
    return len(found)


def _norms(model: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """Batch norms whose running statistics training moves."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.track_running_stats
        and module.running_mean is not None
        and (module.training or not model.training)
    }
