"""``prepare``: dense layers become block-sparse, before an optimizer is built or the model wrapped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dynaprune.families.family import note_families
from dynaprune.neurons.example_inputs import ExampleInputs
from dynaprune.nn import BlockSparseLayer, swap_layers
from dynaprune.nn.adapters import find_adapters
from dynaprune.nn.swap import FROZEN, matches
from dynaprune.pruning.checks import refusals
from dynaprune.pruning.checks.reachable import refuse_unknown_floors
from dynaprune.pruning.checks.same_function import refuse_other_function, run_if_possible, weight_readers
from dynaprune.pruning.checks.undo_swap import BeforeSwap
from dynaprune.pruning.config import PruningConfig
from dynaprune.pruning.edit.stale_copies import CopyWatch
from dynaprune.pruning.from_meta import prepare_from_meta, real_device
from dynaprune.pruning.observe.block_fisher import Calibration
from dynaprune.pruning.prepared import Prepared
from dynaprune.pruning.settings import NEURONS
from dynaprune.pruning.sparse_start import rates_of, start_pretrained, start_sparse

CAME_DENSE = "the model came with block-sparse layers, and this one was dense"
_BLOCKS_STAY = "it is block-sparse, and only neurons of plain layers go"


def prepare(
    model: nn.Module,
    config: PruningConfig | None = None,
    *,
    example_inputs: Any = None,
    device: torch.device | str | None = None,
    calibration: Calibration | None = None,
    checkpoint: str | Path | None = None,
) -> Prepared:
    """Make the layers of ``model`` block-sparse, in place; build the optimizer afterwards, then ``attach``.
    With ``units="neurons"`` they stay what they are.

    For training loops that load weights, wrap the model or build the optimizer between the two; ``attach``
    does both. Parameters stay the same objects. A model that has block-sparse layers already (loaded, or
    detached) keeps those, with the blocks that they have.

    With an ``initial_sparsity`` a random subset of the blocks stays, and only that is ever trained: neither
    gradients nor optimizer state have more. See ``docs/sparse-start.md``.

    Args:
        model: on its device, with its weights; or, to begin sparse, on the meta device, all of it or in part:
            it is then materialised, and of layers that begin sparse their blocks only.
        config: default ``PruningConfig()``; ``total_steps`` may be left open until ``attach``.
        example_inputs: what the model takes (a tensor, a tuple of arguments, or a mapping of keywords), to
            compare it with itself before and after, and to trace it when neurons are cut; None takes a
            training batch.
        device: where a model from the meta device is materialised; by default where its real tensors are,
            else torch's default device.
        calibration: to begin sparse with trained weights: ``calibration(model)`` yields scalar losses, from
            which the blocks that stay are chosen (see :func:`block_fisher`).
        checkpoint: safetensors file or folder that the trained weights come from: blocks that were left out
            then grow back as they are there, read when they do. By default the folder that
            ``config.name_or_path`` names.

    Raises:
        TypeError, ValueError: what cannot be pruned, by name and with the reason; the model is as it was
            (one from the meta device: in parts).
    """
    config = checked(config)
    inner = refusals.unwrap_model(model, meta=config.initial_sparsity > 0)
    example = None if example_inputs is None else ExampleInputs.of(example_inputs)
    on_meta = any(t.is_meta for group in (inner.parameters(), inner.buffers()) for t in group)
    _check_start(config, calibration, checkpoint, None if on_meta else device, on_meta)
    if config.units == NEURONS:
        return keep_plain(model, inner, config, example)
    if on_meta and config.initial_sparsity:
        place = real_device(inner) if device is None else torch.device(device)
        return prepare_from_meta(model, inner, config, example, place)
    candidates = find_candidates(inner, config)
    before = BeforeSwap(list(candidates.dense.values()), [])
    try:
        prepared = swap(model, inner, config, example, candidates, {})
        if calibration is not None:
            return start_pretrained(prepared, calibration, None if checkpoint is None else Path(checkpoint))
        return start_sparse(prepared)
    except BaseException:
        before.restore()
        raise


def _check_start(
    config: PruningConfig, calibration: Any, checkpoint: Any, device: Any, on_meta: bool
) -> None:
    """Refuse what the start that is asked for does not read."""
    if device is not None:
        raise ValueError(f"expected a device with a model on the meta device only, got {device}")
    if checkpoint is not None and calibration is None:
        raise ValueError("expected a checkpoint with a calibration only: nothing else reads it")
    if calibration is not None and not callable(calibration):
        raise TypeError(f"expected calibration as a function of the model, got {type(calibration).__name__}")
    if calibration is not None and not config.initial_sparsity:
        raise ValueError("expected a calibration with an initial_sparsity only, got one with none")
    if calibration is not None and on_meta:
        raise ValueError("expected a calibration with trained weights, got a model on the meta device")


def checked(config: PruningConfig | None) -> PruningConfig:
    """The configuration, or the default one; TypeError for something else."""
    if config is None:
        return PruningConfig()
    if not isinstance(config, PruningConfig):
        raise TypeError(f"expected a PruningConfig, got {type(config).__name__}")
    return config


@dataclass(frozen=True, eq=False)
class Candidates:
    """Layers by name: the plain ones that may become block-sparse, those that are, and why others may not."""

    dense: dict[str, Any]
    sparse: dict[str, BlockSparseLayer]
    adapters: dict[str, str]

    @property
    def weights(self) -> list[tuple[str, nn.Parameter]]:
        """Weights of all of them that are trained, by layer."""
        dense = {n: m.weight for n, m in self.dense.items() if isinstance(m.weight, nn.Parameter)}
        sparse = {n: layer.values for n, layer in self.sparse.items()}
        return [(n, p) for n, p in {**dense, **sparse}.items() if p.requires_grad]


def find_candidates(model: nn.Module, config: PruningConfig) -> Candidates:
    """The layers of ``model`` that can be pruned.

    Raises:
        ValueError: merged adapters, or a model that another pruner watches.
    """
    found = find_adapters(model)
    if found.merged:
        raise ValueError(
            f"cannot prune a model with merged adapters ({len(found.merged)}, the first at "
            f"{found.merged[0]}): they could not be taken out of removed blocks again. Call "
            "unmerge_adapter(), or merge_and_unload() to merge for good"
        )
    adapters = {n: why for n in found.layers if (why := found.reason(n, named=n in (config.include or ())))}
    sparse = {n: m for n, m in model.named_modules() if isinstance(m, BlockSparseLayer)}
    for name, layer in sparse.items():
        watch = getattr(layer, "copy_watch", None)
        if isinstance(watch, CopyWatch) and watch.owned:
            raise ValueError(
                f"expected a model without a pruner, got one attached to {name}: detach it first"
            )
    kinds = config.layer_types
    dense = {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, kinds) and not isinstance(m, BlockSparseLayer) and n not in adapters
    }
    return Candidates(dense, sparse, adapters)


def swap(
    given: nn.Module,
    model: nn.Module,
    config: PruningConfig,
    example: ExampleInputs | None,
    candidates: Candidates,
    exclude: Mapping[str, str],
) -> Prepared:
    """Swap the layers of ``candidates``, and compare what the model computes; nothing in a sparse model.

    Args:
        exclude: layers that stay dense, with the reason.
    """
    note_families(model, config.families)
    if candidates.sparse:
        exempt = {**dict.fromkeys(candidates.dense, CAME_DENSE), **candidates.adapters}
        rates = rates_of(candidates.sparse, config)
        return Prepared(given, model, config, exempt, (), example, True, rates=rates)
    readers: dict[str, str] = {}
    plain = None if example is None else run_if_possible(model, example)
    if example is not None and plain is not None:
        readers = weight_readers(model, example, candidates.dense)
    entries = swap_layers(
        model,
        config.block_size,
        types=config.layer_types,
        include=config.include,
        exclude=[*config.exclude, *exclude],
        exempt=readers,
    )
    exempt = {e.name: exclude.get(e.name, e.reason) for e in entries if not e.swapped}
    swapped = tuple(entry.name for entry in entries if entry.swapped)
    refuse_unknown_floors(config, swapped)
    layers: Any = {name: model.get_submodule(name) for name in swapped}
    if example is not None and plain is not None:
        refuse_other_function(model, example, layers, plain)
    return Prepared(given, model, config, exempt, swapped, example, plain is not None)


def keep_plain(
    given: nn.Module, model: nn.Module, config: PruningConfig, example: ExampleInputs | None
) -> Prepared:
    """``model`` with its plain layers, to prune whole neurons out of them.

    Raises:
        ValueError: a pattern that matches nothing, or no layer whose neurons may go.
    """
    for pattern in [*(config.include or ()), *config.exclude]:
        if not any(matches(name, [pattern]) for name, _ in model.named_modules()):
            raise ValueError(f"expected a pattern that matches a module of the model, got {pattern!r}")
    note_families(model, config.families)
    candidates = find_candidates(model, config)
    exempt = dict(candidates.adapters)
    exempt.update(dict.fromkeys(candidates.sparse, _BLOCKS_STAY))
    exempt.update(keep_their_neurons(candidates, config))
    makers = tuple(name for name in candidates.dense if name not in exempt)
    if not makers:
        told = "; ".join(f"{name}: {reason}" for name, reason in exempt.items()) or "no layer of the types"
        raise ValueError(f"expected a layer whose neurons may go, got none: {told}")
    refuse_unknown_floors(config, makers)
    return Prepared(given, model, config, exempt, (), example, True)


def keep_their_neurons(candidates: Candidates, config: PruningConfig) -> dict[str, str]:
    """Plain layers whose neurons may not go, with the reason."""
    return {name: why for name, layer in candidates.dense.items() if (why := _stays(name, layer, config))}


def _stays(name: str, layer: Any, config: PruningConfig) -> str:
    """Why the neurons of a plain layer may not go, empty where they may."""
    if matches(name, config.exclude):
        return "excluded by name"
    if config.include is not None and not matches(name, config.include):
        return "not among the included names"
    if not isinstance(layer.weight, nn.Parameter) or "parametrizations" in layer._modules:
        return "its weight is computed from other tensors"
    return "" if layer.weight.requires_grad else FROZEN
