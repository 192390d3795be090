"""What the whole training of each arm takes by step times measured alone: ``times.json`` of a comparison.

Arms train side by side, on a machine that does other things too; their clocks say little. Here each structure
that an arm had takes steps in turn with the baseline's network. An arm's time is the sum of these, each times
the steps that it made in that structure, and of its events.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dynaprune.experiment import metrics
from dynaprune.experiment.arm_settings import BASELINE
from dynaprune.experiment.arm_times import TIMES
from dynaprune.experiment.run_config import RunConfig, check
from dynaprune.experiment.saved_results import read_arm, read_json
from dynaprune.experiment.steps import TrainState, full_batches, make_optimizer, now, steps_in_turn
from dynaprune.experiment.tasks import TaskData, get_task, task_names
from dynaprune.experiment.write import write_json
from dynaprune.nn.swap import SPARSE_TYPES, swap_layer

__all__ = ["Structure", "measure_arm", "structures_of", "write_times"]

_MOST_STRUCTURES = 6
_EVENTS, _MOST_STEPS = 3, 120


@dataclass(frozen=True)
class Structure:
    """The network between two changes of it: ``steps`` long, with the share of live blocks by layer; layers
    that are not named are dense."""

    steps: int
    density: Mapping[str, float]

    @property
    def mean_density(self) -> float:
        """Over the layers, each counted once; 1 for a dense network."""
        return sum(self.density.values()) / len(self.density) if self.density else 1.0


def structures_of(result: Mapping[str, Any]) -> list[Structure]:
    """The structures that an arm had, in order; neighbours of the same densities are one.

    Args:
        result: of the arm's ``arm.json``.
    """
    history = result["pruner"]["history"] if "pruner" in result else []
    changes = [(row["step"], row["density"]) for row in history]
    if not changes or changes[0][0] > 0:
        changes.insert(0, (0, {}))
    ends = [step for step, _ in changes[1:]] + [result["steps"]]
    found: list[Structure] = []
    for (begin, density), end in zip(changes, ends, strict=True):
        if found and found[-1].density == density:
            found[-1] = Structure(found[-1].steps + end - begin, density)
        elif end > begin:
            found.append(Structure(end - begin, density))
    return found


def write_times(run: Path, *, quiet: bool = False) -> Path:
    """Measure every arm of the comparison in ``run``; write ``run/times.json`` and return its path.

    The machine should do nothing else meanwhile. A repeated comparison gives its first run for all.

    Raises:
        ValueError: no finished arm of this version in ``run``, a damaged file, or an arm that lost whole
            neurons of plain layers, whose structures its report does not have.
    """
    folder = next(iter(sorted(run.glob("seed-*"))), run)
    path = folder / BASELINE / "arm.json"
    task = ((read_json(path).get("result") or {}).get("settings") or {}).get("task")
    if task not in task_names():
        raise ValueError(f"{path}: expected the settings of an arm, got the task {task!r}")
    names = sorted(path.parent.name for path in folder.glob("*/arm.json"))
    arms = {name: read_arm(folder / name, name, task) for name in [BASELINE, *names]}
    unfinished = [name for name, arm in arms.items() if arm is None]
    if unfinished:
        raise ValueError(f"{folder} holds unfinished arms: {', '.join(unfinished)}")
    finished = {name: arm["result"] for name, arm in arms.items() if arm is not None}
    base = _config(finished[BASELINE])
    found: dict[str, Any] = {}
    for name, result in finished.items():
        found[name] = measure_arm(result, base, folder)
        if not quiet:
            print(f"{name:>13}  {_told(found[name])}", file=sys.stderr, flush=True)
    device = torch.device(base.device)
    said = {"task": task, "environment": metrics.environment(device), "arms": found}
    write_json(run / TIMES, said)
    return run / TIMES


def measure_arm(result: Mapping[str, Any], base: RunConfig, folder: Path) -> dict[str, Any]:
    """The seconds of one arm's training, with what they were computed from.

    At most six structures are measured, the others lie on the line between their neighbours by mean density.
    Where neurons were cut, the density of their blocks stands for them. An event's cost is what the first
    three events of the arm, trained anew, take beyond ordinary steps; its trials are among that. Where none
    comes within 120 steps they are left out, and ``event_seconds`` is None.

    Args:
        result: of its ``arm.json``.
        base: the baseline's settings.
        folder: of the comparison, where a task keeps what both arms share.

    Returns:
        ``seconds`` of the arm and ``seconds_dense`` of as many steps of the baseline's network, and their
        ``ratio``; ``steps``, ``events``, ``event_seconds`` of one, and the measured ``structures``.
    """
    config = _config(result)
    if "pruner" in result and config.units != "blocks":
        raise ValueError(f"expected arms that are pruned in blocks, got units={config.units!r}")
    data, base_data = _data(config, folder), _data(base, folder)
    structures = structures_of(result)
    measured = [
        (each.mean_density, *_measure(each, config, data, base, base_data)) for each in _some(structures)
    ]
    ratios = {density: ours / dense for density, ours, dense in measured}
    dense_step = sum(dense for _, _, dense in measured) / len(measured)
    events, of_event = _events(config, data, result["steps"]) if "pruner" in result else (0, 0.0)
    of_steps = sum(each.steps * _on_line(each.mean_density, ratios) for each in structures) * dense_step
    seconds, seconds_dense = of_steps + events * (of_event or 0.0), result["steps"] * dense_step
    return {
        "seconds": seconds,
        "seconds_dense": seconds_dense,
        "ratio": seconds / seconds_dense,
        "steps": result["steps"],
        "events": events,
        "event_seconds": of_event,
        "structures": [
            {"mean_density": density, "step_seconds": ours, "step_seconds_dense": dense}
            for density, ours, dense in measured
        ],
    }


def _config(result: Mapping[str, Any]) -> RunConfig:
    try:
        return check(RunConfig(**result["settings"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"expected the settings of an arm of this version: {error}") from None


def _data(config: RunConfig, folder: Path) -> TaskData:
    return get_task(config.task).load(replace(config.split(), kept=folder), config.options)


def _some(structures: Sequence[Structure]) -> list[Structure]:
    """At most six, the first and the last among them, evenly by their number."""
    last = len(structures) - 1
    wanted = min(len(structures), _MOST_STRUCTURES)
    return [structures[round(k * last / max(wanted - 1, 1))] for k in range(wanted)]


def _on_line(density: float, ratios: Mapping[float, float]) -> float:
    """The ratio at ``density``, on the line between the nearest measured ones."""
    below = max((d for d in ratios if d <= density), default=min(ratios))
    above = min((d for d in ratios if d >= density), default=max(ratios))
    if below == above:
        return ratios[below]
    part = (density - below) / (above - below)
    return (1 - part) * ratios[below] + part * ratios[above]


def _measure(
    structure: Structure, config: RunConfig, data: TaskData, base: RunConfig, base_data: TaskData
) -> tuple[float, float]:
    """Seconds of a step of the structure, and of one of the baseline's network in turn with it."""
    ours = _state(config, data, 0.0 if structure.density else config.dropout)
    dense = _state(base, base_data, base.dropout)
    _make_sparse(ours.model, structure.density, config.block_size)
    ours.optimizer = make_optimizer(ours.model, config)[0]
    source = full_batches(data, config, ours.device, torch.Generator().manual_seed(0))
    return steps_in_turn(ours, dense, source, rounds=4)


def _state(config: RunConfig, data: TaskData, dropout: float) -> TrainState:
    task, device = get_task(config.task), torch.device(config.device)
    torch.manual_seed(config.model_seed)
    model = task.build_model(data, dropout).to(device).train()
    return TrainState(config, task, model, make_optimizer(model, config)[0], device)


def _make_sparse(model: nn.Module, density: Mapping[str, float], block: int) -> None:
    """Random blocks live, of each layer its share, and only they have memory."""
    generator = torch.Generator().manual_seed(0)
    for name, share in density.items():
        layer = model.get_submodule(name)
        if type(layer) not in SPARSE_TYPES:  # an embedding: always dense
            continue
        grid = SPARSE_TYPES[type(layer)].layout_for(layer, block, None, torch.device("cpu"))
        live = torch.randperm(grid.blocks, generator=generator)[: max(1, round(share * grid.blocks))]
        mask = torch.zeros(grid.blocks, dtype=torch.bool)
        mask[live] = True
        swap_layer(model, name, block, mask.view(grid.rows, grid.columns))


def _events(config: RunConfig, data: TaskData, steps: int) -> tuple[int, float | None]:
    """How many events the training has, and what one takes beyond an ordinary step: its dense gradients, its
    trial and the change itself, by the first three; None where none came."""
    from dynaprune.experiment.network import PrunedNetwork

    state = _state(config, data, dropout=0.0)
    network = PrunedNetwork(state, data)
    number = sum(network.pruner.policy.due(step) for step in range(1, steps + 1))
    if not number:
        return 0, 0.0
    source = full_batches(data, config, state.device, torch.Generator().manual_seed(0))
    plain: list[float] = []
    special: list[float] = []
    seen = 0
    for step in range(1, min(steps, _MOST_STEPS) + 1):
        event = network.event_next()
        taken = special if event or network.probes() else plain
        inputs, targets = next(source)
        started = now(state.device)
        state.step(inputs, targets)
        network.after_step(step)
        taken.append(now(state.device) - started)
        seen += event
        if seen == _EVENTS:
            break
    if not seen or not plain:
        return number, None
    beyond = sum(special) - len(special) * statistics.median(plain)
    return number, max(beyond, 0.0) / seen


def _told(time: Mapping[str, Any]) -> str:
    of_event = time["event_seconds"]
    cost = f"of {of_event:.2f} s" if of_event is not None else f"left out: none within {_MOST_STEPS} steps"
    return (
        f"{time['seconds']:,.0f} s of steps measured alone, {time['ratio']:.3f} of as many dense ones; "
        f"{time['events']} events {cost}"
    )
