"""``dynaprune compare``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dynaprune.cli.options import (
    Out,
    Pilot,
    PilotMultipliers,
    PilotRates,
    Quiet,
    Rates,
    TaskName,
    fail,
    no_pilot,
    resolved,
    run_pilot,
    take_resuming,
    takes_settings,
)
from dynaprune.saving.durable import cannot_write


@takes_settings
def compare_command(
    task: TaskName,
    out: Out,
    seeds: Annotated[str | None, typer.Option(help="repeat over these seeds, for example 0,1,2")] = None,
    folds: Annotated[
        int | None, typer.Option(help="repeat over the folds of a k-fold cross-validation")
    ] = None,
    controls: Annotated[
        str | None,
        typer.Option(
            help="further arms, with commas: small,small-inner,small-time=WIDTH,short,static,"
            "gradual-early,stretch=FACTOR"
        ),
    ] = None,
    pilot: Pilot = False,
    pilot_rates: PilotRates = None,
    pilot_multipliers: PilotMultipliers = None,
    rates: Rates = None,
    quiet: Quiet = False,
    given: Any = None,
) -> None:
    """Train TASK twice on the same data, dense with dropout and pruned while it trains, and report on both.

    With --seeds or --folds: once for each, every run in its own folder, and a summary with intervals. Started
    again with the same settings, what has finished is kept, and an arm that was cut short goes on from its
    last checkpoint. With --controls: further arms, of the pruned arm's FLOPs or part of its method."""
    resuming = take_resuming(given)
    config = resolved(task, given)
    from dynaprune.experiment import compare as comparison
    from dynaprune.experiment.controls import ARMS, arm_name, check_controls
    from dynaprune.experiment.out_folder import check_unfinished
    from dynaprune.experiment.rates import find_rates, read_rates
    from dynaprune.experiment.terminal import print_report, print_summary

    further = controls.split(",") if controls else []
    try:
        check_controls(further)
        arms = [*ARMS, *further]
        if pilot:
            run_pilot(config, arms, out, pilot_rates, pilot_multipliers, quiet=quiet, resuming=resuming)
            return
        no_pilot(pilot_rates, pilot_multipliers)
        rates = rates or find_rates(out)
        if seeds is not None or folds is not None:
            from dynaprune.experiment.repeat import repeat

            if seeds is not None and given["seed"] is not None:
                fail("give --seed or --seeds, not both")
            if folds is not None and folds < 2:
                fail(f"--folds must be at least 2, got {folds}")
            if out.exists() and not out.is_dir():
                fail(f"--out must be a folder, and {out} is a file")
            summary, interrupted = repeat(
                config,
                out,
                _seeds(seeds) if seeds else [config.seed],
                folds,
                controls=further,
                rates=rates,
                quiet=quiet,
                resuming=resuming,
            )
            if summary is not None:
                print_summary(summary, out)
        else:
            check_unfinished(out, config, [arm_name(arm) for arm in arms])
            chosen = None if rates is None else read_rates(rates, config, arms)
            report = comparison.compare(
                config, out, controls=further, rates=chosen, quiet=quiet, resuming=resuming
            )
            interrupted = report["interrupted"]
            print_report(report, out)
    except ValueError as error:
        fail(error)
    except OSError as error:
        typer.echo(f"error: {cannot_write(error)}", err=True)
        raise typer.Exit(1) from None
    except comparison.ArmFailed as error:
        if not error.explained:
            typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2 if error.code == comparison.CANNOT_START else 1) from None
    if interrupted:
        raise typer.Exit(130)


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        fail(f"--seeds takes whole numbers with commas between them (0,1,2), got {text!r}")
    if min(seeds) < 0 or len(set(seeds)) != len(seeds):
        fail(f"--seeds takes different numbers of at least 0, got {text!r}")
    return seeds
