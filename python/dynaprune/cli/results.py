"""``dynaprune table`` and ``dynaprune time``: what they tell of finished runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynaprune.cli.options import fail
from dynaprune.saving.durable import cannot_write


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
        fail(f"--format must be one of {', '.join(formats)}, got {format!r}")
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        fail(f"--out must be a file in a folder that exists, got {out}")
    if chart is not None and (chart.suffix != ".png" or chart.is_dir() or not chart.parent.is_dir()):
        fail(f"--chart must be a .png file in a folder that exists, got {chart}")
    try:
        results = read_results(runs)
        text = formats[format](results)
    except ValueError as error:
        fail(error)
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


def time_command(
    run: Annotated[Path, typer.Argument(help="the folder of a comparison", metavar="RUN")],
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress")] = False,
) -> None:
    """Measure the step times of the finished arms in RUN, each structure in turn with the baseline's network,
    on a machine that does nothing else; writes times.json, which table and its chart then show."""
    from dynaprune.experiment.time_arms import write_times

    try:
        typer.echo(f"wrote {write_times(run, quiet=quiet)}")
    except ValueError as error:
        fail(error)
    except OSError as error:
        typer.echo(f"error: {cannot_write(error)}", err=True)
        raise typer.Exit(1) from None
