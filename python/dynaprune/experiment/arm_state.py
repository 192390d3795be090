"""The whole state of an arm in training as plain values and tensors, and an arm that goes on from it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from dynaprune.experiment import metrics
from dynaprune.experiment.arm import Arm, Epoch
from dynaprune.experiment.model_state import (
    load_model_state,
    load_optimizer_state,
    model_state,
    optimizer_state,
)
from dynaprune.experiment.random_states import random_states, set_random_states
from dynaprune.experiment.steps import now
from dynaprune.pruning.early_stopping import EarlyStopping

__all__ = ["best_state", "resume_arm", "state_of_arm"]

_OF_OUTCOME = ("history", "best_epoch", "first_steps", "steps")
_OF_COSTS = ("step_seconds", "flops_per_sample")


def state_of_arm(arm: Arm) -> dict[str, Any]:
    """Everything but the best model, between two steps. Draws no random number and changes nothing.

    Tensors of model and optimizer are the arm's own: write them before its next step."""
    state, done, epoch = arm.state, arm.done, arm.epoch
    return {
        "model": model_state(state.model),
        "optimizer": optimizer_state(state.optimizer),
        "schedule": None if state.schedule is None else state.schedule.state_dict(),
        "network": arm.network.state_dict(),
        "stopping": asdict(arm.stopping),
        "outcome": {
            **{name: getattr(done, name) for name in _OF_OUTCOME},
            "seconds": now(state.device) - arm.begun,
        },
        "costs": {
            **{name: torch.tensor(getattr(state, name), dtype=torch.float64) for name in _OF_COSTS},
            "flops_total": state.flops_total,
            "flops_probes": state.flops_probes,
            "peak_memory_bytes": max(arm.peak_before, metrics.peak_memory_bytes(state.device)),
        },
        "memory": arm.memory.state_dict(state.device),
        "epoch": None if epoch is None else dict(vars(epoch)),
        "measured_version": arm.measured_version,
        "notes": arm.notes,
        "order": arm.order.get_state(),
        "random": random_states(state.device),
    }


def best_state(arm: Arm) -> dict[str, Any]:
    """The best model so far, and what was said of it."""
    assert arm.done.kept is not None
    model, facts = arm.done.kept
    return {"model": model_state(model), "facts": facts}


def resume_arm(arm: Arm, state: Mapping[str, Any], best: Mapping[str, Any] | None) -> None:
    """Bring a new ``arm`` to where `state_of_arm` was taken, with the ``best`` model of then.

    Raises:
        ValueError, TypeError, KeyError, RuntimeError: a state that does not fit; the arm is spoilt."""
    mine, device = arm.state, arm.state.device
    arm.network.load_state_dict(state["network"])
    if best is not None:
        kept = copy.deepcopy(mine.model)
        load_model_state(kept, best["model"])
        arm.done.kept = kept, dict(best["facts"])
    load_model_state(mine.model, state["model"])
    load_optimizer_state(mine.optimizer, mine.model, state["optimizer"])
    if mine.schedule is not None:
        mine.schedule.load_state_dict(dict(state["schedule"]))
    arm.stopping = EarlyStopping(**state["stopping"])
    for name in _OF_OUTCOME:
        setattr(arm.done, name, state["outcome"][name])
    arm.done.seconds = state["outcome"]["seconds"]
    for name in _OF_COSTS:
        setattr(mine, name, state["costs"][name].tolist())
    mine.flops_total, arm.peak_before = state["costs"]["flops_total"], state["costs"]["peak_memory_bytes"]
    arm.memory.load_state_dict(state["memory"])
    mine.flops_probes = state["costs"].get("flops_probes", 0.0)
    if (epoch := state["epoch"]) is not None:
        tensors = {"began": epoch["began"].clone(), "loss_sum": epoch["loss_sum"].to(device, copy=True)}
        arm.epoch = Epoch(**{**epoch, **tensors})
    arm.measured_version, arm.notes = state["measured_version"], state["notes"]
    arm.order.set_state(state["order"].clone())
    set_random_states(state["random"], device)
