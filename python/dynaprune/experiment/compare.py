"""Both arms of a comparison, each in its own process, and the report of the two.

A comparison that was cut short goes on where it is started again with the same settings: an arm that has
finished is kept, and one that has a checkpoint goes on from there."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dynaprune.experiment.arm_process import CANNOT_START, ArmFailed, run_in_process
from dynaprune.experiment.controls import ARMS, CONTROLS, arm_name
from dynaprune.experiment.interrupts import ArmInterrupts, signals_taken
from dynaprune.experiment.out_folder import CONFIG, check_settings, check_value
from dynaprune.experiment.rates import with_rate
from dynaprune.experiment.report import OF_A_MACHINE, build_report
from dynaprune.experiment.report_text import write_markdown
from dynaprune.experiment.run_config import Resuming, RunConfig
from dynaprune.experiment.saved_results import read_arm, read_json
from dynaprune.experiment.sole_writer import LOCK_NAME, FolderInUse, sole_writer
from dynaprune.experiment.state_files import holds_states, remove_states
from dynaprune.experiment.write import write_csv_lines, write_json

__all__ = ["CANNOT_START", "ArmFailed", "compare"]

Rates = Mapping[str, Mapping[str, Any]]


def _finished_arm(folder: Path, arm: str, config: RunConfig) -> dict[str, Any] | None:
    """The content of ``arm.json`` in ``folder`` if that arm was trained to its end.

    ValueError where its files are damaged, where it has other settings, or where it was trained on another
    device or with other threads than this process has: the arms could not be compared. Another processor is
    allowed, and the report says so."""
    found = read_arm(folder, arm_name(arm), config.task)
    if found is None:
        return None
    check_value(folder, found["result"], arm)
    if (folder / CONFIG).is_file():
        check_settings(folder, read_json(folder / CONFIG), config)
    import torch

    from dynaprune.experiment.metrics import environment

    here = environment(torch.device(config.device))
    different = [
        f"{key} {found['environment'].get(key)}, now {here[key]}"
        for key in OF_A_MACHINE
        if found["environment"].get(key) != here[key]
    ]
    if different:
        raise ValueError(
            f"{folder} holds an arm that was trained elsewhere ({'; '.join(different)}), whose times cannot "
            "be set beside this machine's: choose another --out"
        )
    return dict(found)


def _forget(out: Path, config_path: Path, arm: str, checkpoints: Path) -> None:
    """Remove what an arm that could not start has left, so that the same command can be given again; not its
    checkpoints."""
    with contextlib.suppress(FolderInUse), sole_writer(out / arm):
        _clear(out / arm, checkpoints)
    if not any((out / other).exists() for other in (*ARMS, *CONTROLS)):
        for left in (config_path, *out.glob("pretrained.*"), *out.glob("vocabulary.json")):
            left.unlink(missing_ok=True)


def _clear(folder: Path, checkpoints: Path) -> None:
    """Remove what an arm has left in ``folder``, but for its checkpoints."""
    if not holds_states(checkpoints):
        shutil.rmtree(folder, ignore_errors=True)
        return
    for each in folder.iterdir():
        if each.is_file() and each.name != LOCK_NAME:
            each.unlink()


def _check_same_data(out: Path, arms: dict[str, dict[str, Any] | None]) -> None:
    """ValueError where the arms name different sources: the newest commit on the hub may have moved."""
    sources = {arm["data"].get("source") for arm in arms.values() if arm is not None and arm.get("data")}
    if len(sources) > 1:
        raise ValueError(
            f"the arms in {out} read different data ({', '.join(map(str, sources))}): choose another --out "
            "and a commit with --data hub@COMMIT"
        )


def compare(
    config: RunConfig,
    out: Path,
    *,
    controls: Sequence[str] = (),
    rates: Rates | None = None,
    quiet: bool = False,
    pictures: bool = True,
    interrupts: ArmInterrupts | None = None,
    resuming: Resuming | None = None,
) -> dict[str, Any]:
    """Train both arms and the ``controls`` (NAME or NAME=VALUE) on the same data and write ``out``: the
    report, histories and pictures. Returns the report. ``rates`` are those of `read_rates`.

    After an interrupt the report holds what was done (``interrupted`` true, an arm that never finished an
    epoch null). Started again, it keeps the arms in ``out`` that have finished, and goes on with the one that
    has a checkpoint.

    Raises:
        ValueError: another process writes ``out``; it holds other settings, damaged files, or an arm of
            another machine.
        ArmFailed: an arm ended without a result. OSError: ``out`` cannot be written.
    """
    if interrupts is None:
        interrupts = ArmInterrupts()
        with signals_taken(interrupts.take):
            return compare(
                config,
                out,
                controls=controls,
                rates=rates,
                quiet=quiet,
                pictures=pictures,
                interrupts=interrupts,
                resuming=resuming,
            )
    given = {arm: with_rate(config, arm, rates or {}) for arm in (*ARMS, *controls)}
    with sole_writer(out) as lock:
        return _compare(config, given, out, resuming or Resuming(), quiet, pictures, interrupts, lock)


def _compare(
    config: RunConfig,
    given: Mapping[str, RunConfig],
    out: Path,
    resuming: Resuming,
    quiet: bool,
    pictures: bool,
    interrupts: ArmInterrupts,
    lock: int,
) -> dict[str, Any]:
    config_path = out / CONFIG
    names = {arm: arm_name(arm) for arm in given}
    arms: dict[str, dict[str, Any] | None] = dict.fromkeys(names.values())
    environment: dict[str, Any] = {}
    if config_path.is_file():
        check_settings(out, read_json(config_path), config)
    begun = [name for name in names.values() if (out / name).exists()]
    for arm, name in names.items():  # all of them before any is trained
        kept = _finished_arm(out / name, arm, given[arm])
        if kept is not None:
            arms[name], environment = kept["result"], kept["environment"]
            remove_states(resuming.folder(name, out / name))
    write_json(config_path, config.to_json())
    for arm, name in names.items():
        if interrupts.seen:
            break
        if arms[name] is not None:
            continue
        checkpoints = resuming.folder(name, out / name)
        if name in begun:
            with sole_writer(out / name):  # `dynaprune train` may be writing there
                _clear(out / name, checkpoints)
        try:
            found = run_in_process(
                config_path, given[arm], arm, out / name, resuming, interrupts, quiet, lock
            )
        except ArmFailed as error:
            if error.code == CANNOT_START:
                _forget(out, config_path, name, checkpoints)
            raise
        if found is not None:
            arms[name], environment = found["result"], found["environment"]
    _check_same_data(out, arms)
    report = build_report(config.to_json(), environment, arms)
    write_csv_lines(out / "history.csv", [out / name / "history.csv" for name in arms])
    write_json(out / "report.json", report)
    drawn: list[str] = []
    if pictures and any(arms.values()):
        from dynaprune.experiment.pictures import draw_all

        drawn = draw_all(out, report)
    write_markdown(out / "report.md", report, drawn)
    return report
