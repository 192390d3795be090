"""The ``dynaprune`` command: ``compare``, ``train``, ``table``, ``time`` and ``info``."""

from __future__ import annotations

import sys

import typer

from dynaprune.cli.compare import compare_command
from dynaprune.cli.results import table_command, time_command
from dynaprune.cli.train import train_command

__all__ = ["app"]

app = typer.Typer(
    name="dynaprune",
    help="Watch a network get smaller while it trains.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("compare")(compare_command)
app.command("train")(train_command)
app.command("table")(table_command)
app.command("time")(time_command)


@app.command("info")
def info_command() -> None:
    """Tell which kernels run on this machine, and why the others do not."""
    from dynaprune_kernels import info

    sys.exit(info.main())
