"""How far a pruned training is, in the few figures that belong beside the loss."""

from __future__ import annotations

import math

from dynaprune.pruning.pruner import Pruner


def figures(pruner: Pruner) -> dict[str, float]:
    """Figures of the model as it is now, for a training's log. No host sync.

    - ``density``, ``sparsity``: share of the prunable layers' weights, as they were at first, that live, and
      that are gone.
    - ``sparsity_of_model``: share of all the model's parameters, as they were at first, that is gone.
    - ``live_parameters``: values that live: of block-sparse weights those of live blocks, of the rest all.
    - ``flops_saving``: share of the prunable layers' multiplications, as they were at first, that is saved:
      weights gone times rows (tokens, output positions) seen; 0 before the first step.
    """
    rows = {name: pruner.rows.get(name, 0) for name in pruner.layers}
    full = sum(math.prod(pruner.original_shapes[name]) * seen for name, seen in rows.items())
    now = sum(pruner.live_weights[name] * seen for name, seen in rows.items())
    return {
        "density": 1 - pruner.sparsity,
        "sparsity": pruner.sparsity,
        "sparsity_of_model": pruner.sparsity_of_model,
        "live_parameters": float(pruner.live_parameters),
        "flops_saving": 1 - now / full if full else 0.0,
    }
