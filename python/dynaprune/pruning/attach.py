"""``attach``: the checks, the swap of layers, and the move of what optimizers already know of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dynaprune.neurons.example_inputs import ExampleInputs
from dynaprune.nn import BlockSparseLayer, swap_layers
from dynaprune.nn.adapters import find_adapters
from dynaprune.nn.optimizer_state import refuse_unsliceable, sliced_state
from dynaprune.nn.swap import FROZEN
from dynaprune.pruning.checks import refusals
from dynaprune.pruning.checks.one_process import take_off_averaging_
from dynaprune.pruning.checks.reachable import say_what_floors_keep, say_what_is_frozen
from dynaprune.pruning.checks.same_function import refuse_other_function, run_if_possible, weight_readers
from dynaprune.pruning.checks.undo_swap import BeforeSwap
from dynaprune.pruning.config import PruningConfig
from dynaprune.pruning.decide.calibration import CalibrationTrial
from dynaprune.pruning.edit.stale_copies import CopyWatch
from dynaprune.pruning.pruner import Pruner, Trial

_FROZEN = "it is frozen"
_NOT_HELD = "no optimizer given holds its weight"
_CAME_DENSE = "the model came with block-sparse layers, and this one was dense"


def attach(
    model: nn.Module,
    optimizer: Any,
    config: PruningConfig | None = None,
    *,
    trial: Trial | None = None,
    example_inputs: Any = None,
) -> Pruner:
    """Make ``model`` get smaller while ``optimizer`` trains it; the training loop stays as it is.

    Dense layers become block-sparse ones in place; their Parameters stay the same objects, and what the
    optimizer already knows of them moves along, so this may happen before training or in the middle of it. A
    model that has block-sparse layers already (loaded, or detached) goes on with those.

    Args:
        model: on its device, with its weights; not wrapped for distributed training. In a process group of
            one, DistributedDataParallel may be around it, before or after: its averaging is taken off.
        optimizer: a torch optimizer, one wrapped by accelerate or Lightning, or a list of them.
        config: default ``PruningConfig()``.
        trial: ``trial()`` returns per-sample losses ``[n]`` or (losses, classes ``[n]``) of the model as it
            stands, on data that training does not use for its scores; see ``CalibrationTrial``. Without one
            removals are untested.
        example_inputs: what the model takes (a tensor, a tuple of arguments, or a mapping of keywords), to
            trace it when neurons are cut; None takes a training batch.

    Raises:
        TypeError, ValueError: what cannot be pruned, by name and with the reason.
    """
    if config is None:
        config = PruningConfig()
    if not isinstance(config, PruningConfig):
        raise TypeError(f"expected a PruningConfig, got {type(config).__name__}")
    config.require_total_steps()
    if trial is not None and not callable(trial):
        raise TypeError(
            f"expected the trial as a callable that returns per-sample losses, got {type(trial).__name__}"
        )
    if config.target_sparsity is None and trial is None:
        raise ValueError(
            "expected a trial: self-paced pruning (target_sparsity=None) removes what passes it, nothing else"
        )
    inner = refusals.unwrap_model(model)
    if isinstance(trial, CalibrationTrial):
        trial.try_batch()
    optimizers = refusals.unwrap_optimizers(optimizer)
    example = None if example_inputs is None else ExampleInputs.of(example_inputs)
    before = BeforeSwap(
        [
            m
            for m in inner.modules()
            if isinstance(m, config.layer_types) and not isinstance(m, BlockSparseLayer)
        ],
        optimizers,
    )
    try:
        exempt, layers, checked = _take_layers(inner, optimizers, config, example)
        take_off_averaging_(inner)
        pruner = Pruner(model, inner, optimizers, layers, exempt, config, trial, example, checked)
    except BaseException:
        before.restore()
        raise
    say_what_floors_keep(pruner)
    say_what_is_frozen(pruner, [name for name, reason in exempt.items() if _untrained(inner, name, reason)])
    return pruner


def _untrained(model: nn.Module, name: str, reason: str) -> bool:
    weight = model.get_submodule(name)._parameters.get("weight")
    frozen = weight is not None and not weight.requires_grad
    return reason in (_FROZEN, _NOT_HELD) or (reason == _CAME_DENSE and frozen)


def _take_layers(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    config: PruningConfig,
    example: ExampleInputs | None,
) -> tuple[dict[str, str], dict[str, BlockSparseLayer], bool]:
    """Reasons of the exempt layers, the block-sparse layers, with their optimizer state moved, and whether
    they were compared with the plain ones."""
    sparse = {n: m for n, m in model.named_modules() if isinstance(m, BlockSparseLayer)}
    found = find_adapters(model)
    if found.merged:
        raise ValueError(
            f"cannot prune a model with merged adapters ({len(found.merged)}, the first at "
            f"{found.merged[0]}): they could not be taken out of removed blocks again. Call "
            "unmerge_adapter(), or merge_and_unload() to merge for good"
        )
    adapters = {n: why for n in found.layers if (why := found.reason(n, named=n in (config.include or ())))}
    dense = {
        n: m for n, m in model.named_modules() if isinstance(m, config.layer_types) and n not in adapters
    }
    for name, layer in sparse.items():
        watch = getattr(layer, "copy_watch", None)
        if isinstance(watch, CopyWatch) and watch.owned:
            raise ValueError(
                f"expected a model without a pruner, got one attached to {name}: detach it first"
            )
    weights = {n: m.weight for n, m in dense.items() if isinstance(m.weight, nn.Parameter)}
    values = {n: layer.values for n, layer in sparse.items()}
    trainable = [(n, p) for n, p in {**weights, **values}.items() if p.requires_grad]
    held = refusals.refuse_without_prunable_weights(trainable, optimizers)
    refusals.refuse_in_backward(trainable)
    _refuse_unsliceable(optimizers, [p for _, p in trainable], config.block_size)
    if sparse:
        foreign = [n for n, p in values.items() if id(p) not in held]
        frozen = [n for n, p in values.items() if not p.requires_grad]
        exempt = {**dict.fromkeys(dense, _CAME_DENSE), **dict.fromkeys(foreign, _NOT_HELD)}
        exempt |= {**dict.fromkeys(frozen, FROZEN), **adapters}
        if all(n in exempt for n in sparse):
            told = "; ".join(f"{n}: {exempt[n]}" for n in sparse)
            raise ValueError(f"expected a block-sparse layer that can be pruned on, got none: {told}")
        _check_floors(config, [n for n in sparse if n not in exempt])
        return exempt, {n: layer for n, layer in sparse.items() if n not in exempt}, True

    foreign = [n for n, p in weights.items() if p.requires_grad and id(p) not in held]
    states = {n: [(s, k) for s, k, _ in sliced_state(optimizers, p)] for n, p in weights.items()}
    readers: dict[str, str] = {}
    plain = None if example is None else run_if_possible(model, example)
    if example is not None and plain is not None:
        readers = weight_readers(model, example, dense)
    entries = swap_layers(
        model,
        config.block_size,
        types=config.layer_types,
        include=config.include,
        exclude=[*config.exclude, *foreign],
        exempt=readers,
    )
    _check_floors(config, [entry.name for entry in entries if entry.swapped])
    exempt = {e.name: _NOT_HELD if e.name in foreign else e.reason for e in entries if not e.swapped}
    layers: dict[str, BlockSparseLayer] = {}
    for name in (entry.name for entry in entries if entry.swapped):
        swapped = model.get_submodule(name)
        assert isinstance(swapped, BlockSparseLayer)
        layers[name] = swapped
        for state, key in states[name]:
            state[key] = swapped.to_slots(state[key])
    if example is not None and plain is not None:
        refuse_other_function(model, example, layers, plain)
    return exempt, layers, plain is not None


def _check_floors(config: PruningConfig, names: list[str]) -> None:
    for name in config.floors:
        if name not in names:
            raise ValueError(f"expected floors of pruned layers ({', '.join(names)}), got one of {name!r}")


def _refuse_unsliceable(
    optimizers: list[torch.optim.Optimizer], parameters: list[Tensor], block: int | tuple[int, int]
) -> None:
    ids = {id(p) for p in parameters}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            mine = [p for p in group["params"] if id(p) in ids]
            if mine:
                refuse_unsliceable(
                    optimizer, group, mine[0], (block, block) if isinstance(block, int) else block
                )
