"""Train one arm of a comparison, dense or pruned, in this process, and measure it.

``python -m dynaprune.experiment.train CONFIG.json --arm pruned --out DIR`` is what ``dynaprune compare``
starts for each arm."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dynaprune.experiment import metrics
from dynaprune.experiment.arm import Arm
from dynaprune.experiment.arm_checkpoint import Checkpoints, open_checkpoints
from dynaprune.experiment.arm_settings import ArmSettings
from dynaprune.experiment.controls import arm_name, arm_settings
from dynaprune.experiment.data_fingerprint import data_fingerprint
from dynaprune.experiment.epochs import train_epochs
from dynaprune.experiment.interrupts import StopRequest, signals_taken
from dynaprune.experiment.length import total_steps
from dynaprune.experiment.network import DenseNetwork, PrunedNetwork
from dynaprune.experiment.out_folder import CONFIG
from dynaprune.experiment.planned_flops import with_options
from dynaprune.experiment.run_config import Resuming, RunConfig
from dynaprune.experiment.sole_writer import FolderInUse, end_with_parent, sole_writer
from dynaprune.experiment.state_files import Identity, StateFiles, remove_states
from dynaprune.experiment.steps import (
    TrainState,
    closing_steps,
    evaluate_rows,
    full_batches,
    make_optimizer,
    make_schedule,
)
from dynaprune.experiment.tasks import Task, TaskData, get_task
from dynaprune.experiment.test_rows import write_test_rows
from dynaprune.experiment.write import write_json
from dynaprune.pruning.early_stopping import EarlyStopping
from dynaprune.saving.durable import cannot_write
from dynaprune.saving.tensor_file import read_tensors, write_tensors

__all__ = ["CannotStart", "main", "run_arm"]


class CannotStart(Exception):
    """The data or the initial weights cannot be read, or the settings do not fit the model; the message says
    what was expected and what came."""


def _costs(arm: Arm) -> dict[str, Any]:
    """Time, memory and FLOPs of the arm; after an interrupt without the closing steps."""
    state, done, network = arm.state, arm.done, arm.network
    found: dict[str, Any] = {
        "train_seconds": done.seconds,
        "epochs": len(done.history),
        "steps": done.steps,
        "state": done.ended,
        "interrupted": done.ended == "interrupted",
        "best_epoch": done.best_epoch,
        "step_seconds_first": metrics.median_seconds(done.first_steps),
        "step_seconds_last": metrics.median_seconds(state.step_seconds[-metrics.STEPS_TIMED :]),
        "peak_memory_bytes": max(arm.peak_before, metrics.peak_memory_bytes(state.device)),
        "flops_per_step_first": state.flops_per_step(0),
        "flops_per_step_last": state.flops_per_step(-1),
        "flops_total": round(state.flops_total + network.trial_flops()),
        "flops_trials": round(network.trial_flops()),
        "memory_bytes_process": arm.memory.process_bytes(state.device),
        "flops_probes": round(state.flops_probes),
        **network.end_of_training(),
    }
    interrupted = found["interrupted"]
    source = full_batches(arm.data, state.config, state.device, arm.order)
    if interrupted:
        with metrics.memory_peak_from_now(state.device) as held:
            found["memory_bytes_last"] = held()
    else:
        found.update(closing_steps(state, source))
        # The peak was reset for the closing steps, and they may exceed what came before.
        found["peak_memory_bytes"] = max(found["peak_memory_bytes"], found["memory_bytes_last"] or 0)
        arm.memory.measure(state, network.pruner, *next(source), done.steps)
    found.update(arm.memory.figures(closed=not interrupted))
    found["training_state"] = metrics.training_state_bytes(state.model, state.optimizer)
    found["training_state_bytes"] = found["training_state"]["total"]
    found.update(network.step_times(None if interrupted else source))
    return found


def _pretrained(
    task: Task,
    model: nn.Module,
    data: TaskData,
    config: RunConfig,
    device: torch.device,
    file: Path,
    states: StateFiles,
) -> dict[str, Any]:
    """Pretrains the fresh model where the settings ask for it, or takes the weights that the other arm left
    in ``file``. Returns what the report says of it. One that was cut short goes on from ``states``."""
    if not config.options.get("pretrain_epochs"):
        return {}
    if task.pretrain is None:
        raise CannotStart(f"{task.name} has no pretraining, got pretrain_epochs")
    notes = file.with_suffix(".json")
    if not (file.is_file() and notes.is_file()):
        said = task.pretrain(model, data, config, device, states)
        write_tensors(file, model.state_dict(), {})
        write_json(notes, said)
        states.remove()
    try:
        model.load_state_dict(read_tensors(file).tensors)
    except (ValueError, RuntimeError) as error:
        raise CannotStart(f"expected the weights of a pretraining in {file}: {error}") from error
    torch.manual_seed(config.model_seed)
    return dict(json.loads(notes.read_text()))


def run_arm(
    config: RunConfig,
    arm: str,
    out: Path,
    *,
    quiet: bool = False,
    pretrained: Path | None = None,
    resuming: Resuming | None = None,
) -> dict[str, Any]:
    """Train and test one arm; write ``config.json``, ``history.csv``, what the network became and, last,
    ``arm.json`` into ``out``. A pilot is not tested.

    ``arm`` is baseline, pruned, or a control of a comparison with these settings: NAME or NAME=VALUE.
    It goes on from the arm's newest checkpoint where there is one, and removes its checkpoints when it is
    done. ``pretrained`` is where the weights of a pretraining are kept or taken from (``out`` where not
    given).

    A SIGINT ends training after the current step; what was trained is then tested and written,
    ``interrupted`` true, and a checkpoint stays.

    Raises:
        ValueError: an unknown arm, or another process writes ``out`` or the checkpoints.
        OSError: ``out`` or the checkpoints cannot be written.
        CannotStart: data that cannot be read, settings that the pruner refuses for this model, checkpoints
            of another training or none that is whole."""
    arm_name(arm)
    resuming = resuming if resuming is not None else Resuming()
    stop = StopRequest()
    with sole_writer(out), signals_taken(stop.take), _denormals_flushed():
        file = pretrained if pretrained is not None else out / "pretrained.safetensors"
        data = _data(config, out, file)
        settings = _settings(config, arm, data)
        data = with_options(data, settings.config.options)
        with open_checkpoints(
            resuming.folder(settings.name, out),
            Identity(settings.name, settings.config, data_fingerprint(data)),
            metrics.environment(torch.device(config.device)),
            every_seconds=60 * resuming.checkpoint_minutes,
            restart=resuming.restart,
        ) as checkpoints:
            begin = functools.partial(_new_arm, settings, data, file, checkpoints.pretraining)
            return _run(begin, checkpoints, out, config, stop, quiet)


@contextlib.contextmanager
def _denormals_flushed() -> Iterator[None]:
    """L2 decays the weights of dead units into denormals, and fused Adam takes four times as long with them.

    A thread that starts inherits the setting, so it comes before torch's own threads do. numpy works out once
    what its smallest numbers are, and warns where they are flushed: it does so before."""
    for dtype in (np.float32, np.float64):
        np.finfo(dtype)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def _data(config: RunConfig, out: Path, pretrained: Path) -> TaskData:
    # Alone an arm leaves nothing in ``out`` where it cannot start.
    kept = None if pretrained.parent == out else pretrained.parent
    try:
        return get_task(config.task).load(replace(config.split(), kept=kept), config.options)
    except (ValueError, OSError, ImportError) as error:
        raise CannotStart(str(error)) from error


def _settings(config: RunConfig, arm: str, data: TaskData) -> ArmSettings:
    try:
        return arm_settings(arm, config, get_task(config.task), data)
    except (ValueError, TypeError) as error:
        raise CannotStart(f"the arm {arm}: {error}") from error


def _new_arm(
    settings: ArmSettings, data: TaskData, pretrained: Path, states: StateFiles, *, goes_on: bool
) -> Arm:
    """An arm before its first step. One that goes on from a checkpoint gets its weights from there, any other
    where the settings say so from a pretraining, which has ``states`` of its own."""
    config = settings.config
    device, task = torch.device(config.device), get_task(config.task)
    torch.manual_seed(config.model_seed)
    try:
        model = task.build_model(data, settings.dropout).to(device).train()
    except (ValueError, OSError, ImportError) as error:
        raise CannotStart(str(error)) from error
    notes = {} if goes_on else _pretrained(task, model, data, config, device, pretrained, states)
    optimizer, implementation = make_optimizer(model, config)
    schedule = make_schedule(optimizer, config, total_steps(config, len(data.train)))  # type: ignore[arg-type]
    state = TrainState(config, task, model, optimizer, device, schedule)
    try:
        network = PrunedNetwork(state, data) if settings.pruned else DenseNetwork(model)
    except (ValueError, TypeError) as error:
        raise CannotStart(str(error)) from error
    order = torch.Generator().manual_seed(config.model_seed)
    notes["optimizer"] = implementation
    notes["settings"] = config.to_json()
    if settings.plan:
        notes["plan"] = settings.plan
    return Arm(settings.name, state, data, network, order, EarlyStopping(config.patience), notes=notes)


def _begun(begin: Callable[..., Arm], checkpoints: Checkpoints, quiet: bool) -> Arm:
    """A new arm, or one that goes on from the newest checkpoint."""
    try:
        newest = checkpoints.newest()
        arm = begin(goes_on=newest is not None)
        if newest is None:
            return arm
        checkpoints.resume(arm, newest)
    except ValueError as error:
        raise CannotStart(str(error)) from error
    metrics.prepare_memory_reading(arm.state.device)  # what reading took is none of the training's
    if not quiet:
        said = f"goes on from {newest.saved.path}, after step {arm.done.steps:,} of {arm.total_steps:,}"
        print(f"{arm.name:>9}  {said}", file=sys.stderr, flush=True)
    return arm


def _run(
    begin: Callable[..., Arm],
    checkpoints: Checkpoints,
    out: Path,
    given: RunConfig,
    stop: StopRequest,
    quiet: bool,
) -> dict[str, Any]:
    device = torch.device(checkpoints.identity.config.device)
    loaded = metrics.peak_memory_bytes(device)
    can_reset = metrics.prepare_memory_reading(device)
    held_before = metrics.held_bytes(device)
    arm = _begun(begin, checkpoints, quiet)
    arm.peak_before = max(arm.peak_before, loaded)
    arm.memory.held_before = held_before if can_reset else None
    (out / "arm.json").unlink(missing_ok=True)
    write_json(out / CONFIG, given.to_json())
    train_epochs(arm, stop, out, checkpoints=checkpoints, quiet=quiet)
    result = {
        **(_validated(arm) if arm.state.config.pilot else _tested(arm, out)),
        "memory_bytes_before_model": held_before,
        **arm.notes,
        "data": arm.data.description,
        "checkpoints": {"written": checkpoints.written, "seconds": checkpoints.seconds},
        "parts": checkpoints.parts,
    }
    said = {"arm": arm.name, "environment": checkpoints.environment, "result": result}
    write_json(out / "arm.json", said)
    if not result["interrupted"]:
        remove_states(checkpoints.folder)
    return result


def _tested(arm: Arm, out: Path) -> dict[str, Any]:
    """Scores on the test part, what it cost and what became of the network, which is written to ``out``."""
    assert arm.done.kept is not None
    tested, facts = arm.done.kept
    found = evaluate_rows(arm.state.task, tested, arm.data.test, arm.state.device, arm.data.collate)
    arm.network.write(out, tested)
    write_test_rows(out, {f"test_{name}": rows for name, rows in found.rows.items()})
    return {
        **{f"test_{name}": value for name, value in found.scores.items()},
        "test_loss": found.loss,
        **_costs(arm),
        **facts,
    }


def _validated(arm: Arm) -> dict[str, Any]:
    """What a pilot tells: the validation part's scores of the epoch that was the best, else of the last."""
    history = arm.done.history
    row = history[-1 if arm.done.best_epoch is None else arm.done.best_epoch - 1]
    return {
        **{name: value for name, value in row.items() if name.startswith("validation_")},
        "steps": arm.done.steps,
        "train_seconds": arm.done.seconds,
        "interrupted": arm.done.ended == "interrupted",
    }


def exit_code(run: Callable[[], dict[str, Any]]) -> int:
    """Run an arm: 0, or 2 where it cannot start, 3 where it cannot write its files (both said in one line on
    stderr), or 130 after an interrupt."""
    try:
        result = run()
    except (CannotStart, FolderInUse) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {cannot_write(error)}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        return 130
    return 130 if result["interrupted"] else 0


def main(arguments: list[str] | None = None) -> int:
    """Entry point of an arm's process; the return value is its exit code."""
    parser = argparse.ArgumentParser(prog="python -m dynaprune.experiment.train", description=__doc__)
    parser.add_argument("config", type=Path, help="JSON with the fields of RunConfig")
    parser.add_argument("--arm", required=True, help="NAME or NAME=VALUE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lr", type=float, help="in place of that of the settings")
    parser.add_argument("--sparse-rate", help="in place of that of the settings")
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--pretrained", type=Path, help="weights of a pretraining: kept or taken here")
    parser.add_argument("--checkpoints", help="folder for the arm's checkpoints")
    parser.add_argument("--checkpoint-minutes", type=float)
    parser.add_argument("--restart", action="store_true")
    parser.add_argument("--parent", type=int, help="end with this process, the parent")
    given = parser.parse_args(arguments)
    if given.parent is not None:
        end_with_parent(given.parent)
    try:
        config = RunConfig.read(given.config)
        own = {"lr": given.lr, "sparse_rate": given.sparse_rate}
        config = replace(config, **{name: value for name, value in own.items() if value is not None})
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    resuming = Resuming.given(
        checkpoints=given.checkpoints, checkpoint_minutes=given.checkpoint_minutes, restart=given.restart
    )
    return exit_code(
        lambda: run_arm(
            config, given.arm, given.out, quiet=given.quiet, pretrained=given.pretrained, resuming=resuming
        )
    )


if __name__ == "__main__":
    sys.exit(main())
