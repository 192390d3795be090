"""Edits are checked as a whole before the first is carried out: a wrong one changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dynaprune.pruning.edit.edits import REASONS, Cut, Edit, Grow, Release, Resize, Rewire, count_blocks
from dynaprune.pruning.edit.structure import Structure


def check_edits(structure: Structure, edits: Sequence[Edit]) -> None:
    """Refuse edits that do not fit the structure, each as the ones before it leave the structure. Syncs.

    Raises:
        TypeError: no edits, or masks that are none. ValueError: a layer that does not exist or is not pruned,
            a mask of another shape, a block that is released dead or grown live, more blocks than slots,
            layers that would lose more blocks by rewiring than they get, or fewer.
    """
    if isinstance(edits, (str, bytes)) or not isinstance(edits, Sequence):
        raise TypeError(f"expected a list of edits, got {type(edits).__name__}")
    live = {name: state.mask.clone() for name, state in structure.layers.items()} if edits else {}
    for edit in edits:
        match edit:
            case Release():
                if edit.why not in REASONS:
                    raise ValueError(
                        f"expected a release to say why among {', '.join(REASONS)}, got {edit.why!r}"
                    )
                for name, mask in _masks("release", edit.masks, live).items():
                    _refuse_blocks("release", name, mask & ~live[name], "is dead already")
                    live[name] &= ~mask
            case Grow():
                for name, mask in _masks("grow", edit.masks, live).items():
                    _refuse_blocks("grow", name, mask & live[name], "lives already")
                    live[name] |= mask
                    capacity, used = structure.layers[name].layer.layout.capacity, int(live[name].sum())
                    if used > capacity:
                        raise ValueError(
                            f"grow: expected at most {capacity} live blocks in {name} (its capacity), "
                            f"got {used}"
                        )
            case Rewire():
                _check_rewiring(edit, live)
            case Resize():
                for name, capacity in edit.capacities.items():
                    _known("resize", name, live)
                    _check_capacity(name, capacity, structure, int(live[name].sum()))
            case Cut():
                if edit.found.plan is None:
                    raise ValueError("cut: expected a plan of neurons to cut, got none")
            case _:
                raise TypeError(f"expected Release, Grow, Rewire, Cut or Resize, got {type(edit).__name__}")


def _check_rewiring(edit: Rewire, live: dict[str, Tensor]) -> None:
    dropped, grown = _masks("rewire", edit.dropped, live), _masks("rewire", edit.grown, live)
    for name in {**dropped, **grown}:
        none = torch.zeros_like(live[name])
        gone, new = dropped.get(name, none), grown.get(name, none)
        _refuse_blocks("rewire", name, gone & ~live[name], "is dead already")
        _refuse_blocks("rewire", name, new & live[name], "lives already")
        if int(gone.sum()) != int(new.sum()):
            raise ValueError(
                f"rewire: expected as many blocks of {name} to go as to begin, got {int(gone.sum())} and "
                f"{int(new.sum())}"
            )
        live[name] = live[name] & ~gone | new


def _masks(what: str, masks: Any, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks by layer, each on its layer's device."""
    if not isinstance(masks, Mapping):
        raise TypeError(f"{what}: expected masks by layer, got {type(masks).__name__}")
    found = {}
    for name, mask in masks.items():
        _known(what, name, live)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"{what}: expected a bool mask for {name}, got {got}")
        if mask.shape != live[name].shape:
            raise ValueError(
                f"{what}: expected a mask of shape {tuple(live[name].shape)} for {name}, "
                f"got {tuple(mask.shape)}"
            )
        found[name] = mask.to(live[name].device)
    return found


def _known(what: str, name: Any, live: Mapping[str, Tensor]) -> None:
    if name not in live:
        raise ValueError(f"{what}: expected a pruned layer ({', '.join(live)}), got {name!r}")


def _refuse_blocks(what: str, name: str, wrong: Tensor, why: str) -> None:
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{what}: block ({row}, {column}) of {name} {why} ({count_blocks({name: wrong})} such blocks)"
        )


def _check_capacity(name: str, capacity: Any, structure: Structure, used: int) -> None:
    blocks = structure.layers[name].layer.layout.blocks
    if type(capacity) is not int or not 1 <= capacity <= blocks:
        raise ValueError(f"resize: expected 1 to {blocks} slots for {name}, got {capacity!r}")
    if capacity < used:
        raise ValueError(f"resize: expected at least the {used} slots in use for {name}, got {capacity}")
