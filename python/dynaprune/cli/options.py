"""What the commands that train share: their options, and how these become the settings of a run."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from dynaprune.experiment.run_config import Resuming, RunConfig, Setting, TaskOptions, resolve, settings
from dynaprune.experiment.tasks import get_task, task_names

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


def takes_settings(command: Callable[..., None]) -> Callable[..., None]:
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


def fail(message: object) -> NoReturn:
    typer.echo(f"error: {' '.join(str(message).split())}", err=True)
    raise typer.Exit(2)


def resolved(task: str, given: dict[str, Any]) -> RunConfig:
    if given.pop("paper"):
        if given["preset"] not in (None, "paper"):
            fail(f"give --paper or --preset {given['preset']}, not both")
        given["preset"] = "paper"
    options = {name: given.pop(name) for name in TaskOptions.__annotations__}
    try:
        if given["data"] is not None and not get_task(task).uses_data_folder:
            typer.echo(f"note: {task} comes with scikit-learn, --data is not used", err=True)
        return resolve(task, options=options, **given)
    except (ValueError, TypeError, ImportError) as error:
        fail(error)


def take_resuming(given: dict[str, Any]) -> Resuming:
    """Takes the settings that no result depends on out of ``given``."""
    try:
        return Resuming.given(**{each.name: given.pop(each.name) for each in dataclasses.fields(Resuming)})
    except ValueError as error:
        fail(error)


def _numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        fail(f"{option} takes numbers with commas between them (0.5,1,2), got {text!r}")


def run_pilot(
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


def no_pilot(rates: str | None, multipliers: str | None) -> None:
    if rates is not None or multipliers is not None:
        fail("--pilot-rates and --pilot-multipliers go with --pilot")
