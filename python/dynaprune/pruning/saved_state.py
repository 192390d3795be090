"""What a resumed training needs of a pruner, beside the model's and the optimizer's states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from dynaprune.pruning.observe.gradients import Observed
from dynaprune.pruning.settings import FLOPS
from dynaprune.pruning.standing import Standing
from dynaprune.pruning.whole_model import ModelSize

STATE_VERSION = 1


def state_of(pruner: Standing) -> dict[str, Any]:
    """Tensors and plain values; the tensors are copies."""
    structure, ledger = pruner.structure, pruner.ledger
    states = structure.layers
    decided = pruner.policy.state_dict()
    seen = sorted(name for name, state in states.items() if state.observations)
    return {
        "version": STATE_VERSION,
        "steps": pruner.steps,
        "seconds": ledger.seconds,
        "structure_version": structure.version,
        "compactions": structure.compactions,
        "observe_every": pruner.observer.every,
        "rows": dict(structure.tokens),
        "step_flops": structure.step_flops,
        "score": {
            "name": pruner.score.name,
            "layers": {n: {k: t.clone() for k, t in s.statistics.items()} for n, s in states.items()},
            "steps": {name: state.observations for name, state in states.items()},
            **pruner.score.state_dict(),
        },
        "groups": structure.groups.state_dict(),
        "neurons": structure.neurons.state_dict(),
        "widths": {name: list(widths) for name, widths in structure.neurons.widths().items()},
        "protection": {
            n: s.protected_until.clone() for n, s in states.items() if s.protected_until is not None
        },
        "trial_state": decided.pop("trial_state", None),
        "trial": None if pruner.trial is None else pruner.trial.state_dict(),
        "removals": {
            **ledger.removals(),
            "neurons_refused": dict(pruner.tracer.refused),
            "events": decided.pop("events", []),
        },
        "policy": decided,
        "observed": {**asdict(pruner.observer.observed), "layers": seen},
        "history": [dict(row) for row in ledger.history],
        "live_weights": {name: state.live_weights for name, state in states.items()},
        "original_shapes": {name: list(state.original) for name, state in states.items()},
        "units_total": structure.units,
        "left_out": {name: state.left_out for name, state in states.items()},
        "ever_lived": {name: state.ever_lived for name, state in states.items()},
        "never_lived": {n: s.never_lived.clone() for n, s in states.items() if s.never_lived is not None},
        "rates": {name: state.rate for name, state in states.items()},
        "waiting": {n: s.waiting.clone() for n, s in states.items() if s.waiting is not None},
        "pretrained": None if structure.pretrained is None else structure.pretrained.checksums(),
        "size_at_attach": asdict(ledger.size),
        "exempt_later": dict(ledger.exempt_later),
        "slots": {name: state.layer.layout.slot_of_block.clone() for name, state in states.items()},
    }


def check_state(pruner: Standing, state: Mapping[str, Any]) -> None:
    """Refuse a state of another version, score or model: ValueError."""
    if state.get("version") != STATE_VERSION:
        raise ValueError(
            f"expected a pruner's state of version {STATE_VERSION}, got {state.get('version')!r}"
        )
    names = pruner.structure.layers
    if set(state["slots"]) != set(names):
        raise ValueError(f"expected the state of layers {sorted(names)}, got {sorted(state['slots'])}")
    mine, theirs = set(pruner.structure.neurons.makers), set(state.get("widths", {}))
    if mine != theirs:
        raise ValueError(
            f"expected the state of whole neurons of {sorted(mine) or 'no layer'}, got that of "
            f"{sorted(theirs) or 'none'}: it was saved with other settings (units, include, exclude)"
        )
    if pruner.config.target_of == FLOPS and not state.get("neurons", {}).get("first_flops"):
        raise ValueError("expected a state with the forward FLOPs at first, for target_of='flops', got none")
    found = state["score"].get("name")
    if found != pruner.score.name:
        raise ValueError(f"expected the state of the score {pruner.score.name!r}, got that of {found!r}")
    pretrained = pruner.structure.pretrained
    if state.get("pretrained") != (None if pretrained is None else pretrained.checksums()):
        raise ValueError(
            "expected the checkpoint whose blocks grow back in the saved training, got another one, or none "
            "where it had one: prepare the model as then"
        )
    if state["trial"] is not None and pruner.trial is None:
        raise ValueError("expected a trial that can continue the saved one (load_state_dict), got none")


def adopt(pruner: Standing, state: Mapping[str, Any]) -> None:
    """Take over what :func:`state_of` saved, and :func:`check_state` has found to fit."""
    structure, ledger = pruner.structure, pruner.ledger
    if state["trial"] is not None:
        assert pruner.trial is not None
        pruner.trial.load_state_dict(state["trial"])
    score, removals, observed = state["score"], state["removals"], dict(state["observed"])
    seen, counts = set(observed.pop("layers")), score.get("steps", {})
    for name, each in structure.layers.items():
        device = each.layer.values.device
        each.statistics = {k: t.clone() for k, t in score["layers"].get(name, {}).items()}
        each.observations = max(int(counts.get(name, 0)), int(name in seen))
        until = state["protection"].get(name)
        each.protected_until = None if until is None else until.to(device, copy=True)
        each.live_weights = int(state["live_weights"][name])
        each.original = tuple(state["original_shapes"][name])
        waiting = state.get("waiting", {}).get(name)
        each.waiting = None if waiting is None else waiting.to(device, copy=True)
        each.left_out = int(state.get("left_out", {}).get(name, 0))
        each.ever_lived = int(state.get("ever_lived", {}).get(name, each.blocks - each.left_out))
        never = state.get("never_lived", {}).get(name)
        each.never_lived = None if never is None else never.to(device, copy=True)
        if each.rate != 1:
            each.rate = float(state.get("rates", {}).get(name, each.rate))
    pruner.score.load_state_dict(score)
    if state["trial_state"] is not None or state.get("policy"):
        decided = {"trial_state": state["trial_state"], "events": list(removals["events"])}
        pruner.policy.load_state_dict({**decided, **state.get("policy", {})})
    structure.groups.load_state_dict(state.get("groups", {}))
    structure.neurons.load_state_dict(state.get("neurons", {}))
    structure.tokens = dict(state["rows"])
    if "step_flops" in state:
        structure.step_flops = float(state["step_flops"])
    else:  # states of earlier versions have none
        structure.note_step_flops()
    structure.units = int(state["units_total"])
    structure.version, structure.compactions = int(state["structure_version"]), int(state["compactions"])
    pruner.tracer.refused = dict(removals["neurons_refused"])
    pruner.tracer.forget()
    ledger.resume(removals, state["history"], float(state["seconds"]))
    if "size_at_attach" in state:  # states of earlier versions have none
        ledger.size = ModelSize(**state["size_at_attach"])
    pruner.steps = int(state["steps"])
    pruner.observer.resume(Observed(**observed), int(state["observe_every"]), pruner.steps)
