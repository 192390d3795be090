"""The final tables on the screen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dynaprune.experiment.report_text import table_rows
from dynaprune.experiment.summary_text import control_rows, difference_rows

__all__ = ["print_report", "print_summary"]


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=110)


def print_report(report: dict[str, Any], out: Path) -> None:
    """Baseline, pruned and their ratio, then where the files are."""
    console = _console()
    title = f"{report['task']}, seed {report['seed']}" + (" (interrupted)" if report["interrupted"] else "")
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in ("baseline", "pruned"):
        table.add_column(name, justify="right")
    table.add_column("ratio", justify="right", style="bold")
    for row in table_rows(report):
        table.add_row(*row)
    console.print(table)
    for mark in report["marks"]:
        console.print(mark, style="bold")
    for name in ("report.md", "report.json", "history.csv", "curves.png", "density.png", "masks.png"):
        if (out / name).is_file():
            console.print(f"  {out / name}", highlight=False, soft_wrap=True)


def print_summary(summary: dict[str, Any], out: Path) -> None:
    """Paired differences with their intervals, the promises with their worst run, then where the files
    are."""
    console = _console()
    table = Table(
        title=f"{summary['task']}, {summary['runs']} of {summary['runs_planned']} runs", title_justify="left"
    )
    for name in ("", "baseline", "pruned", "difference", "95 % interval", "over test rows"):
        table.add_column(name, justify="right" if name else "left")
    for *row, _ in difference_rows(summary):
        table.add_row(*row)
    console.print(table)
    if rows := control_rows(summary):
        table = Table()
        for name in ("control", "FLOPs", "time", "", "control", "pruned", "difference", "95 % interval"):
            table.add_column(name, justify="left" if name == "" else "right")
        for cells in rows:
            table.add_row(*cells[:8])
        console.print(table)
    promises = Table()
    for name in ("", "mean", "least", "most", "worst in"):
        promises.add_column(name, justify="right" if name else "left")
    for promise in summary["promises"].values():
        values = [f"{promise[k]:.3f}" for k in ("mean", "min", "max")]
        promises.add_row(promise["label"], *values, promise["worst_run"])
    console.print(promises)
    reached = (
        "in every run"
        if summary["target_reached_in_all"]
        else f"not in {', '.join(summary['target_missed_in'])}"
    )
    console.print(f"  target reached: {reached}", highlight=False)
    for name in ("summary.md", "summary.json"):
        console.print(f"  {out / name}", highlight=False, soft_wrap=True)
