"""Growth: how many blocks return or begin at an event, and which ones."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

GRADIENT, RANDOM = GROWTHS = ("gradient", "random")


def growth_fraction(step: int, end_step: int, initial: float = 0.3) -> float:
    """Share of units that may return, or change places, at an event.

    ``initial / 2 * (1 + cos(pi * step / end_step))``, 0 from ``end_step`` on (RigL, Evci et al. 2020,
    arXiv:1911.11134, section 3 (2)).

    Raises:
        ValueError: a negative step, an end before step 1, a fraction outside [0, 1].
    """
    if step < 0 or end_step < 1:
        raise ValueError(f"expected a step of at least 0 and an end of at least 1, got {step} and {end_step}")
    if not 0 <= initial <= 1:
        raise ValueError(f"expected an initial fraction from 0 to 1, got {initial}")
    return 0.0 if step >= end_step else initial / 2 * (1 + math.cos(math.pi * step / end_step))


def select_growth(
    probe_norms: Mapping[str, Tensor],
    eligible: Mapping[str, Tensor],
    count: int,
    capacity_left: Mapping[str, int],
) -> dict[str, Tensor]:
    """Choose the blocks that return: largest norm of the dense gradient first, over all layers. No host sync.

    Ties go by layer order, then by block number. Blocks without gradient (norm 0 or not finite) never return.

    Args:
        probe_norms: per layer, float ``[rows, columns]``.
        eligible: bool, blocks that may return.
        count: at most this many in all.
        capacity_left: free slots of each layer.

    Returns:
        Bool ``[rows, columns]`` per layer.

    Raises:
        TypeError, ValueError: layers, shapes or dtypes that do not fit, a negative number.
    """
    names = list(probe_norms)
    if not names or set(names) != set(eligible) or set(names) - set(capacity_left):
        raise ValueError(
            f"expected norms, eligible blocks and free slots of the same layers, got {names}, "
            f"{sorted(eligible)} and {sorted(capacity_left)}"
        )
    if count < 0 or min(capacity_left[name] for name in names) < 0:
        raise ValueError(f"expected counts of at least 0, got {count} and {dict(capacity_left)}")
    for name in names:
        mask, norms = eligible[name], probe_norms[name]
        if mask.dtype != torch.bool:
            raise TypeError(f"expected a bool mask for {name}, got {mask.dtype}")
        if mask.shape != norms.shape:
            raise ValueError(
                f"expected a mask for {name} of shape {tuple(norms.shape)}, got {tuple(mask.shape)}"
            )

    device = probe_norms[names[0]].device
    wanted = []
    for name in names:
        norms = probe_norms[name].detach().reshape(-1)
        norms = torch.where(
            eligible[name].reshape(-1) & torch.isfinite(norms) & (norms > 0), norms, -torch.inf
        )
        best = torch.sort(norms, descending=True, stable=True).indices[capacity_left[name] :]
        norms[best] = -torch.inf
        wanted.append(norms.to(device))
    flat = torch.cat(wanted)
    order = torch.sort(flat, descending=True, stable=True).indices[:count]
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[order] = flat[order] > -torch.inf
    parts = zip(names, chosen.split([norms.shape[0] for norms in wanted]), strict=True)
    return {name: part.view_as(probe_norms[name]).to(probe_norms[name].device) for name, part in parts}
