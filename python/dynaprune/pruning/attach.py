"""``attach``: the checks, the swap of layers, and the move of what optimizers already know of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dynaprune.neurons.example_inputs import ExampleInputs
from dynaprune.nn import BlockSparseLayer
from dynaprune.nn.optimizer_state import refuse_unsliceable, sliced_state
from dynaprune.nn.swap import FROZEN
from dynaprune.pruning.checks import refusals
from dynaprune.pruning.checks.one_process import take_off_averaging_
from dynaprune.pruning.checks.reachable import refuse_unknown_floors, say_what_floors_keep, say_what_is_frozen
from dynaprune.pruning.checks.undo_swap import BeforeSwap
from dynaprune.pruning.config import PruningConfig
from dynaprune.pruning.decide.calibration import CalibrationTrial
from dynaprune.pruning.decide.trial import Losses, Trial, as_trial
from dynaprune.pruning.learning_rate import refuse_without_rate
from dynaprune.pruning.plain import attach_plain, know_neurons_at_attach
from dynaprune.pruning.prepare import (
    CAME_DENSE,
    Candidates,
    checked,
    find_candidates,
    keep_plain,
    keep_their_neurons,
    swap,
)
from dynaprune.pruning.prepared import Prepared
from dynaprune.pruning.pruner import Pruner
from dynaprune.pruning.settings import BOTH, NEURONS
from dynaprune.pruning.sparse_start import start_sparse

_FROZEN = "it is frozen"
_NOT_HELD = "no optimizer given holds its weight"


def attach(
    model: nn.Module | Prepared,
    optimizer: Any,
    config: PruningConfig | None = None,
    *,
    trial: Trial | Callable[[], Losses] | None = None,
    example_inputs: Any = None,
) -> Pruner:
    """Make ``model`` get smaller while ``optimizer`` trains it; the training loop stays as it is.

    Dense layers become block-sparse ones in place; their Parameters stay the same objects, and what the
    optimizer already knows of them moves along, so this may happen before training or (without an
    ``initial_sparsity``) in the middle of it. With ``units="neurons"`` they stay plain, and get narrower. A
    model that has block-sparse layers already (loaded, or detached) goes on with those.

    Args:
        model: on its device, with its weights; not wrapped for distributed training. In a process group of
            one, DistributedDataParallel may be around it, before or after: its averaging is taken off. Or
            what ``prepare`` made of it: then the optimizer was built afterwards, and ``config`` and
            ``example_inputs`` were given there.
        optimizer: a torch optimizer, one wrapped by accelerate or Lightning, or a list of them.
        config: default ``PruningConfig()``.
        trial: ``trial()`` returns per-sample losses ``[n]`` or (losses, classes ``[n]``) of the model as it
            stands, on data that training does not use for its scores; see ``CalibrationTrial``. Without one
            removals are untested.
        example_inputs: what the model takes, as for ``prepare``; None takes a training batch.

    Raises:
        TypeError, ValueError: what cannot be pruned, by name and with the reason.
    """
    if isinstance(model, Prepared):
        if config is not None or example_inputs is not None:
            raise ValueError("expected config and example_inputs in prepare, got them in attach")
        return _attach_prepared(model, optimizer, trial)
    config = checked(config)
    tested = _check(config, trial)
    inner = refusals.unwrap_model(model)
    _try_batch(trial)
    optimizers = refusals.unwrap_optimizers(optimizer, blocks=config.units != NEURONS)
    example = None if example_inputs is None else ExampleInputs.of(example_inputs)
    if config.units == NEURONS:
        return attach_plain(keep_plain(model, inner, config, example), optimizers, tested)
    before = BeforeSwap([m for m in inner.modules() if _may_swap(m, config)], optimizers)
    try:
        candidates = find_candidates(inner, config)
        held = _held(candidates, optimizers, config)
        foreign = [n for n, p in candidates.weights if n in candidates.dense and id(p) not in held]
        states = {n: list(sliced_state(optimizers, m.weight)) for n, m in candidates.dense.items()}
        if config.initial_sparsity and not config.mask_pretrained:
            _refuse_trained_state(states)
        swapped = swap(model, inner, config, example, candidates, dict.fromkeys(foreign, _NOT_HELD))
        prepared = start_sparse(swapped)
        _move_state(prepared, states)
        return _watch(prepared, find_candidates(inner, config), optimizers, tested, held)
    except BaseException:
        before.restore()
        raise


def _attach_prepared(prepared: Prepared, optimizer: Any, trial: Any) -> Pruner:
    config = prepared.config
    tested = _check(config, trial)
    _try_batch(trial)
    optimizers = refusals.unwrap_optimizers(optimizer, blocks=config.units != NEURONS)
    if config.units == NEURONS:
        return attach_plain(prepared, optimizers, tested)
    candidates = find_candidates(prepared.model, config)
    _refuse_dense_state(prepared, optimizers)
    return _watch(prepared, candidates, optimizers, tested, _held(candidates, optimizers, config))


def _check(config: PruningConfig, trial: Any) -> Trial | None:
    config.require_total_steps()
    found = as_trial(trial)
    if config.target_sparsity is None and config.policy is None and found is None:
        raise ValueError(
            "expected a trial: self-paced pruning (target_sparsity=None) removes what passes it, nothing else"
        )
    if config.rewire_audit and config.policy is None and found is None:
        raise ValueError(
            f"expected a trial beside rewire_audit={config.rewire_audit}: an audit tests what swaps drop"
        )
    return found


def _try_batch(trial: Any) -> None:
    if isinstance(trial, CalibrationTrial):
        trial.try_batch()


def _may_swap(module: nn.Module, config: PruningConfig) -> bool:
    return isinstance(module, config.layer_types) and not isinstance(module, BlockSparseLayer)


def _held(
    candidates: Candidates, optimizers: Sequence[torch.optim.Optimizer], config: PruningConfig
) -> set[int]:
    """Ids of all parameters of the optimizers, which can all train blocks."""
    held = refusals.refuse_without_prunable_weights(candidates.weights, optimizers)
    refusals.refuse_in_backward(candidates.weights)
    size = config.block_size
    block = (size, size) if isinstance(size, int) else size
    ids = {id(p) for _, p in candidates.weights}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            mine = [p for p in group["params"] if id(p) in ids]
            if mine:
                refuse_unsliceable(optimizer, group, mine[0], (3, block[1], block[0]))
                if config.initial_sparsity and config.sparse_learning_rate != 1:
                    refuse_without_rate(group)
    return held


def _watch(
    prepared: Prepared,
    candidates: Candidates,
    optimizers: list[torch.optim.Optimizer],
    trial: Trial | None,
    held: set[int],
) -> Pruner:
    """Attach a pruner to the block-sparse layers whose weights are among ``held``."""
    model, config = prepared.model, prepared.config
    exempt = dict(prepared.exempt)
    for name, layer in candidates.sparse.items():
        if not layer.values.requires_grad:
            exempt[name] = FROZEN
        elif id(layer.values) not in held:
            exempt[name] = _NOT_HELD
    exempt.update({name: why for name, why in candidates.adapters.items() if name in candidates.sparse})
    layers = {name: layer for name, layer in candidates.sparse.items() if name not in exempt}
    if not layers:
        told = "; ".join(f"{name}: {exempt[name]}" for name in candidates.sparse)
        raise ValueError(f"expected a block-sparse layer that can be pruned on, got none: {told}")
    refuse_unknown_floors(config, tuple(layers))
    refusals.refuse_without_room(layers, config)
    for name in set(prepared.left_out) - set(layers):
        raise ValueError(
            f"cannot attach: {name} begins without some of its blocks, and {exempt[name]}. Exclude it "
            "(PruningConfig(exclude=[...])) before prepare"
        )
    for name in set(prepared.swapped) - set(layers):
        swapped = candidates.sparse.get(name)
        if swapped is not None:
            swapped.to_dense()
    take_off_averaging_(model)
    plain: dict[str, Any] = {}
    if config.units == BOTH:
        stay = keep_their_neurons(candidates, config)
        plain = {n: m for n, m in candidates.dense.items() if n not in stay and id(m.weight) in held}
    pruner = Pruner(prepared, optimizers, layers, exempt, trial, plain)
    if config.units == BOTH:
        know_neurons_at_attach(pruner)
    say_what_floors_keep(pruner.structure, config)
    untrained = [name for name, reason in exempt.items() if _untrained(model, name, reason)]
    say_what_is_frozen(pruner.structure, config, untrained)
    return pruner


def _move_state(prepared: Prepared, states: Mapping[str, Sequence[Any]]) -> None:
    """Bring what optimizers know of the dense weights into the form of the blocks."""
    for name in prepared.swapped:
        layer: Any = prepared.model.get_submodule(name)
        for state, key, tensor in states[name]:
            state[key] = layer.to_slots(tensor)


def _refuse_trained_state(states: Mapping[str, Sequence[Any]]) -> None:
    """Raise ValueError where an optimizer has stepped on weights of which random blocks would go."""
    for name, found in states.items():
        if not all(bool((tensor == tensor.flatten()[0]).all()) for _, _, tensor in found):
            raise ValueError(
                f"cannot leave out random blocks: the optimizer has stepped on {name} already, and what was "
                "learned would be lost. Attach before training, or prune gradually (initial_sparsity=0)"
            )


def _refuse_dense_state(prepared: Prepared, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Raise ValueError where an optimizer has stepped on the weights before they became blocks."""
    for name in prepared.swapped:
        layer = prepared.model.get_submodule(name)
        if not isinstance(layer, BlockSparseLayer) or layer.values.shape == layer.dense_shape():
            continue
        for optimizer in optimizers:
            state = optimizer.state.get(layer.values) or {}
            for key, tensor in state.items():
                if isinstance(tensor, torch.Tensor) and tensor.shape == layer.dense_shape():
                    raise ValueError(
                        f"the {type(optimizer).__name__}'s state of {name} ({key}) is of before prepare, in "
                        "the weight's dense shape: build the optimizer after prepare, or use attach alone"
                    )


def _untrained(model: nn.Module, name: str, reason: str) -> bool:
    weight = model.get_submodule(name)._parameters.get("weight")
    frozen = weight is not None and not weight.requires_grad
    return reason in (_FROZEN, _NOT_HELD) or (reason == CAME_DENSE and frozen)
