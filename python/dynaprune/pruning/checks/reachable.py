"""How far pruning can come, and what keeps it from coming further: said once, with numbers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

from torch import nn

from dynaprune.nn import BlockSparseLayer
from dynaprune.nn.shape import block_weights
from dynaprune.pruning.config import PruningConfig
from dynaprune.pruning.edit.structure import Structure

_NAMED = 4


def most_sparsity(structure: Structure, config: PruningConfig, whole: Iterable[str] = ()) -> float:
    """The largest sparsity that floors allow where the layers named in ``whole`` lose nothing.

    A layer keeps at least one block, and its floor's share of all blocks: here its smallest live ones.
    """
    stay = set(whole)
    kept = 0.0
    for name, layer in structure.modules.items():
        live = block_weights(layer)[layer.layout.mask]
        least = max(1, math.ceil(config.floor_of(name) * layer.layout.blocks - 1e-9))
        kept += float(live.sum() if name in stay else live.sort().values[:least].sum())
    return 1 - kept / structure.weights


def refuse_unknown_floors(config: PruningConfig, names: tuple[str, ...]) -> None:
    """Raise ValueError where a floor is of a layer that is not pruned."""
    for name in config.floors:
        if name not in names:
            raise ValueError(f"expected floors of pruned layers ({', '.join(names)}), got one of {name!r}")


def say_what_floors_keep(structure: Structure, config: PruningConfig) -> None:
    """Warn where the floors alone put the target out of reach."""
    target, most = config.target_sparsity, most_sparsity(structure, config)
    if target is not None and most < target - 1e-9:
        few = [
            f"{name} ({layer.layout.blocks} blocks)"
            for name, layer in sorted(structure.modules.items(), key=lambda item: item[1].layout.blocks)
        ]
        warnings.warn(
            f"the target of {target:.1%} is out of reach: each layer keeps a block and its floor, so at most "
            f"{most:.1%} of the prunable weights can go. Lower the target or the floors, or take a smaller "
            f"block_size than {config.block_size}: {_listed(few)}",
            RuntimeWarning,
            stacklevel=4,
        )


def say_what_is_frozen(structure: Structure, config: PruningConfig, frozen: Iterable[str]) -> None:
    """Warn of layers that are not trained, and stay: the target does not count them."""
    names = list(frozen)
    target, prunable = config.target_sparsity, structure.weights
    weights = sum(_weights(structure.model.get_submodule(name)) for name in names)
    if not weights or target is None:
        return
    warnings.warn(
        f"{len(names)} layers with {weights:,} weights are not trained (frozen, or held by no optimizer "
        f"given) and stay as they are ({_listed(names)}): the target of {target:.1%} counts the {prunable:,} "
        f"weights of the other {len(structure.layers)} layers, and is "
        f"{target * prunable / (weights + prunable):.1%} of both",
        RuntimeWarning,
        stacklevel=4,
    )


def say_what_gets_no_gradient(structure: Structure, config: PruningConfig, step: int) -> None:
    """Warn, at the first event, of layers that no gradient reached, if they put the target out of reach."""
    target = config.target_sparsity
    idle = [name for name, state in structure.layers.items() if not state.observations]
    if target is None or not idle:
        return
    most = most_sparsity(structure, config, idle)
    if most < target - 1e-9:
        share = sum(structure.layers[name].weights for name in idle) / structure.weights
        warnings.warn(
            f"no gradient has reached {len(idle)} of {len(structure.layers)} pruned layers up to step "
            f"{step}, {share:.1%} of the prunable weights ({_listed(idle)}): nothing is removed "
            f"there until one does, and without them at most {most:.1%} can go, short of the target's "
            f"{target:.1%}. Are they frozen, or unused? Exclude them, or choose a target for the rest",
            RuntimeWarning,
            stacklevel=5,
        )


def _weights(module: nn.Module) -> int:
    if isinstance(module, BlockSparseLayer):
        return math.prod(module.dense_shape())
    weight = module._parameters.get("weight")
    return 0 if weight is None else weight.numel()


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
