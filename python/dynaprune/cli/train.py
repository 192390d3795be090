"""``dynaprune train``."""

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


@takes_settings
def train_command(
    task: TaskName,
    out: Out,
    arm: Annotated[str, typer.Option(help="baseline, pruned, or a control of compare")],
    pilot: Pilot = False,
    pilot_rates: PilotRates = None,
    pilot_multipliers: PilotMultipliers = None,
    rates: Rates = None,
    quiet: Quiet = False,
    given: Any = None,
) -> None:
    """Train one arm of TASK in this process; writes arm.json, history.csv and, for the pruned arm, its
    structure.

    Started again with the same settings, an arm that was cut short goes on from its last checkpoint. With
    --pilot, --out is the folder of a comparison, as with compare; --rates takes what pilots have chosen."""
    resuming = take_resuming(given)
    config = resolved(task, given)
    from dynaprune.experiment.arm_process import ArmFailed
    from dynaprune.experiment.controls import arm_name
    from dynaprune.experiment.out_folder import arm_is_finished
    from dynaprune.experiment.rates import find_rates, read_rates, with_rate
    from dynaprune.experiment.train import exit_code, run_arm

    try:
        arm_name(arm)
        if pilot:
            run_pilot(config, [arm], out, pilot_rates, pilot_multipliers, quiet=quiet, resuming=resuming)
            return
        no_pilot(pilot_rates, pilot_multipliers)
        rates = rates or find_rates(out)
        if rates is not None:
            config = with_rate(config, arm, read_rates(rates, config, [arm]))
        if arm_is_finished(out, arm, config):
            typer.echo(f"{out / 'arm.json'} is there already: the {arm} arm has finished")
            return
    except ArmFailed as error:
        raise typer.Exit(2 if error.code == 2 else 1) from None
    except ValueError as error:
        fail(error)
    code = exit_code(lambda: run_arm(config, arm, out, quiet=quiet, resuming=resuming))
    if code in (0, 130):
        typer.echo(f"wrote {out / 'arm.json'}")
    if code:
        raise typer.Exit(code)
