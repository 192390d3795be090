"""How far pruning whole neurons can come, and why it cannot come anywhere."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

from dynaprune.pruning.config import PruningConfig
from dynaprune.pruning.decide.neuron_choice import choose
from dynaprune.pruning.decide.policy import WholeNeurons
from dynaprune.pruning.edit.structure import Structure
from dynaprune.pruning.settings import FLOPS

_NAMED = 4


def no_neurons_reason(structure: Structure, reasons: Mapping[str, str]) -> str:
    """Why nothing can be pruned where whole neurons are all that goes; empty where some can.

    Args:
        reasons: why the neurons of layers stay.
    """
    if structure.layers or structure.weights:
        return ""
    told = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:_NAMED])
    more = f" and {len(reasons) - _NAMED} more layers" if len(reasons) > _NAMED else ""
    return f"cannot prune this model, no neuron can go: {told or 'it has no hidden layer'}{more}"


def say_what_neurons_keep(whole: WholeNeurons, config: PruningConfig) -> None:
    """Warn where floors alone put the target out of reach."""
    target = config.target_sparsity
    if target is None or not whole.units:
        return
    going = choose(whole.units, whole.widths, math.inf)
    most = 1 - (whole.left - going.weights(len(going.units))) / whole.total
    what = "forward FLOPs" if config.target_of == FLOPS else "prunable weights"
    if most < target - 1e-9:
        warnings.warn(
            f"the target of {target:.1%} is out of reach: each layer keeps an output and its floor, so at "
            f"most {most:.1%} of the {what} can go. Lower the target or the floors",
            RuntimeWarning,
            stacklevel=6,
        )
