"""The ``dynaprune`` command: ``compare``, ``train``, ``table`` and ``info``."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from dynaprune.experiment.run_config import Resuming, RunConfig, Setting, TaskOptions, resolve, settings
from dynaprune.experiment.tasks import get_task, task_names
from dynaprune.saving.durable import cannot_write

__all__ = ["app"]

app = typer.Typer(
    name="dynaprune",
    help="Watch a network get smaller while it trains.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

TaskName = Annotated[str, typer.Argument(help=", ".join(task_names()), metavar="TASK")]
Out = Annotated[
    Path, typer.Option("--out", help="folder for the results: new, empty, or of the same run cut short")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress")]
Pilot = Annotated[
    bool, typer.Option("--pilot", help="choose learning rates by short trainings, for a later run")
]
PilotRates = Annotated[
    str | None,
    typer.Option(help="pilots: factors of the learning rate, with commas [default: 0.5,1,2,4]"),
]
PilotMultipliers = Annotated[
    str | None, typer.Option(help="pilots: multipliers of blocks that begin sparse [default: --sparse-rate]")
]
Rates = Annotated[
    Path | None, typer.Option(help="the pilots' learning rates [default: pilot.json in --out, if there]")
]


def _takes_settings(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with an option for every setting of a run in place of its last parameter, ``given``, which
    gets them by name."""
    names = [setting.name for setting in settings()]

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        command(given={name: arguments.pop(name) for name in names}, **arguments)

    own = inspect.signature(command, eval_str=True).parameters.values()
    parameters = [*list(own)[:-1], *map(_option, settings())]
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    )
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _option(setting: Setting) -> inspect.Parameter:
    """The setting as a parameter that typer makes an option of: None, or for a flag False, if not given."""
    flag = setting.kind is bool
    form = typer.Option(*["--" + setting.name.replace("_", "-")] if flag else [], help=setting.help)
    return inspect.Parameter(
        setting.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=False if flag else None,
        annotation=Annotated[setting.kind if flag else setting.kind | None, form],
    )


def _fail(message: object) -> NoReturn:
    typer.echo(f"error: {' '.join(str(message).split())}", err=True)
    raise typer.Exit(2)


def _resolved(task: str, given: dict[str, Any]) -> RunConfig:
    if given.pop("paper"):
        if given["preset"] not in (None, "paper"):
            _fail(f"give --paper or --preset {given['preset']}, not both")
        given["preset"] = "paper"
    options = {name: given.pop(name) for name in TaskOptions.__annotations__}
    try:
        if given["data"] is not None and not get_task(task).uses_data_folder:
            typer.echo(f"note: {task} comes with scikit-learn, --data is not used", err=True)
        return resolve(task, options=options, **given)
    except (ValueError, TypeError, ImportError) as error:
        _fail(error)


def _resuming(given: dict[str, Any]) -> Resuming:
    """Takes the settings that no result depends on out of ``given``."""
    try:
        return Resuming.given(**{each.name: given.pop(each.name) for each in dataclasses.fields(Resuming)})
    except ValueError as error:
        _fail(error)


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        _fail(f"--seeds takes whole numbers with commas between them (0,1,2), got {text!r}")
    if min(seeds) < 0 or len(set(seeds)) != len(seeds):
        _fail(f"--seeds takes different numbers of at least 0, got {text!r}")
    return seeds


def _numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        _fail(f"{option} takes numbers with commas between them (0.5,1,2), got {text!r}")


def _pilot(
    config: RunConfig,
    arms: list[str],
    out: Path,
    rates: str | None,
    multipliers: str | None,
    *,
    quiet: bool,
    resuming: Resuming,
) -> None:
    """Pilot the ``arms``; exit code 130 after an interrupt."""
    from dynaprune.experiment.pilot import Grid, pilot

    given = {
        "rates": _numbers(rates, "--pilot-rates"),
        "multipliers": _numbers(multipliers, "--pilot-multipliers"),
    }
    grid = Grid(**{name: value for name, value in given.items() if value is not None})
    if pilot(config, arms, out, grid=grid, quiet=quiet, resuming=resuming):
        raise typer.Exit(130)
    typer.echo(f"wrote {out / 'pilot.json'}")


def _no_pilot(rates: str | None, multipliers: str | None) -> None:
    if rates is not None or multipliers is not None:
        _fail("--pilot-rates and --pilot-multipliers go with --pilot")


@app.command("compare")
@_takes_settings
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
    resuming = _resuming(given)
    config = _resolved(task, given)
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
            _pilot(config, arms, out, pilot_rates, pilot_multipliers, quiet=quiet, resuming=resuming)
            return
        _no_pilot(pilot_rates, pilot_multipliers)
        rates = rates or find_rates(out)
        if seeds is not None or folds is not None:
            from dynaprune.experiment.repeat import repeat

            if seeds is not None and given["seed"] is not None:
                _fail("give --seed or --seeds, not both")
            if folds is not None and folds < 2:
                _fail(f"--folds must be at least 2, got {folds}")
            if out.exists() and not out.is_dir():
                _fail(f"--out must be a folder, and {out} is a file")
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
        _fail(error)
    except OSError as error:
        typer.echo(f"error: {cannot_write(error)}", err=True)
        raise typer.Exit(1) from None
    except comparison.ArmFailed as error:
        if not error.explained:
            typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2 if error.code == comparison.CANNOT_START else 1) from None
    if interrupted:
        raise typer.Exit(130)


@app.command("train")
@_takes_settings
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
    resuming = _resuming(given)
    config = _resolved(task, given)
    from dynaprune.experiment.arm_process import ArmFailed
    from dynaprune.experiment.controls import arm_name
    from dynaprune.experiment.out_folder import arm_is_finished
    from dynaprune.experiment.rates import find_rates, read_rates, with_rate
    from dynaprune.experiment.train import exit_code, run_arm

    try:
        arm_name(arm)
        if pilot:
            _pilot(config, [arm], out, pilot_rates, pilot_multipliers, quiet=quiet, resuming=resuming)
            return
        _no_pilot(pilot_rates, pilot_multipliers)
        rates = rates or find_rates(out)
        if rates is not None:
            config = with_rate(config, arm, read_rates(rates, config, [arm]))
        if arm_is_finished(out, arm, config):
            typer.echo(f"{out / 'arm.json'} is there already: the {arm} arm has finished")
            return
    except ArmFailed as error:
        raise typer.Exit(2 if error.code == 2 else 1) from None
    except ValueError as error:
        _fail(error)
    code = exit_code(lambda: run_arm(config, arm, out, quiet=quiet, resuming=resuming))
    if code in (0, 130):
        typer.echo(f"wrote {out / 'arm.json'}")
    if code:
        raise typer.Exit(code)


@app.command("table")
def table_command(
    runs: Annotated[list[Path], typer.Argument(help="folders that compare has written", metavar="RUNS...")],
    out: Annotated[
        Path | None, typer.Option("--out", help="write the table to this file instead of printing it")
    ] = None,
    format: Annotated[str, typer.Option("--format", help="markdown or csv")] = "markdown",
    chart: Annotated[
        Path | None, typer.Option(help="draw quality over FLOPs and over time into this PNG file")
    ] = None,
) -> None:
    """Print the table over tasks from finished runs of compare: each figure of both arms, their difference
    or ratio, and the interval of each."""
    from dynaprune.experiment.table import table_csv, table_markdown
    from dynaprune.experiment.task_results import read_results
    from dynaprune.experiment.write import write_text

    formats = {"markdown": table_markdown, "csv": table_csv}
    if format not in formats:
        _fail(f"--format must be one of {', '.join(formats)}, got {format!r}")
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        _fail(f"--out must be a file in a folder that exists, got {out}")
    if chart is not None and (chart.suffix != ".png" or chart.is_dir() or not chart.parent.is_dir()):
        _fail(f"--chart must be a .png file in a folder that exists, got {chart}")
    try:
        results = read_results(runs)
        text = formats[format](results)
    except ValueError as error:
        _fail(error)
    try:
        if out is not None:
            write_text(out, text)
        if chart is not None:
            from dynaprune.experiment.pictures.costs import write_costs

            write_costs(chart, results)
    except OSError as error:
        typer.echo(f"error: {cannot_write(error)}", err=True)
        raise typer.Exit(1) from None
    if out is None:
        typer.echo(text, nl=False)
    for written in (out, chart):
        if written is not None:
            typer.echo(f"wrote {written}", err=out is None)


@app.command("info")
def info_command() -> None:
    """Tell which kernels run on this machine, and why the others do not."""
    from dynaprune_kernels import info

    sys.exit(info.main())
