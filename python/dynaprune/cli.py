"""The ``dynaprune`` command: ``compare``, ``train`` and ``info``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from dynaprune.run_config import RunConfig

__all__ = ["app"]

app = typer.Typer(
    name="dynaprune",
    help="Watch a network get smaller while it trains.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

TaskName = Annotated[str, typer.Argument(help="digits, titanic", metavar="TASK")]
Out = Annotated[Path, typer.Option("--out", help="new or empty folder for the results")]
Epochs = Annotated[int | None, typer.Option(help="at most this many epochs")]
Seed = Annotated[int | None, typer.Option(help="seed of split, weights and batches [default: 0]")]
Target = Annotated[
    float | None, typer.Option("--target-sparsity", help="share of prunable weights to remove, 0..1")
]
SelfPaced = Annotated[bool, typer.Option("--self-paced", help="no target: the trial alone decides how far")]
Data = Annotated[str | None, typer.Option(help="'hub' or a folder [default: DYNAPRUNE_DATA, else the hub]")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]
Paper = Annotated[
    bool, typer.Option("--paper", help="the experiment's literal settings, whatever the task prefers")
]
Block = Annotated[int | None, typer.Option("--block-size", help="edge of a block")]
Threshold = Annotated[
    float | None, typer.Option(help="the trial's probability of accepting a harmful removal")
]
Rate = Annotated[float | None, typer.Option(help="Adam's learning rate")]
Batch = Annotated[int | None, typer.Option("--batch-size", help="samples per step")]
Patience = Annotated[int | None, typer.Option(help="epochs without a better validation loss before stopping")]
Decay = Annotated[float | None, typer.Option("--weight-decay", help="L2")]
Dropout = Annotated[float | None, typer.Option(help="the baseline's dropout")]
Samples = Annotated[
    int | None, typer.Option("--calibration-samples", help="training samples per trial evaluation")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress")]


def _fail(message: object) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


def _resolve(task: str, **given: Any) -> RunConfig:
    from dynaprune.run_config import resolve
    from dynaprune.tasks import get_task

    try:
        if given.get("data") is not None and not get_task(task).uses_data_folder:
            typer.echo(f"note: {task} comes with scikit-learn, --data is not used", err=True)
        return resolve(task, **given)
    except (ValueError, TypeError) as error:
        _fail(error)


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        _fail(f"--seeds takes whole numbers with commas between them (0,1,2), got {text!r}")
    if min(seeds) < 0 or len(set(seeds)) != len(seeds):
        _fail(f"--seeds takes different numbers of at least 0, got {text!r}")
    return seeds


@app.command("compare")
def compare_command(
    task: TaskName,
    out: Out,
    epochs: Epochs = None,
    seed: Seed = None,
    target_sparsity: Target = None,
    self_paced: SelfPaced = False,
    data: Data = None,
    device: Device = "auto",
    seeds: Annotated[str | None, typer.Option(help="repeat over these seeds, for example 0,1,2")] = None,
    folds: Annotated[
        int | None, typer.Option(help="repeat over the folds of a k-fold cross-validation")
    ] = None,
    paper: Paper = False,
    block_size: Block = None,
    threshold: Threshold = None,
    lr: Rate = None,
    batch_size: Batch = None,
    patience: Patience = None,
    weight_decay: Decay = None,
    dropout: Dropout = None,
    calibration_samples: Samples = None,
    quiet: Quiet = False,
) -> None:
    """Train TASK twice on the same data, dense with dropout and pruned while it trains, and report on both.

    With --seeds or --folds: once for each, every run in its own folder, and a summary with intervals. Started
    again with the same settings, finished runs are kept."""
    config = _resolve(
        task,
        epochs=epochs,
        seed=seed,
        target_sparsity=target_sparsity,
        self_paced=self_paced,
        data=data,
        device=device,
        paper=paper,
        block_size=block_size,
        threshold=threshold,
        lr=lr,
        batch_size=batch_size,
        patience=patience,
        weight_decay=weight_decay,
        dropout=dropout,
        calibration_samples=calibration_samples,
    )
    from dynaprune import compare as comparison
    from dynaprune.terminal import print_report, print_summary

    try:
        if seeds is not None or folds is not None:
            from dynaprune.repeat import repeat

            if seeds is not None and seed is not None:
                _fail("give --seed or --seeds, not both")
            if folds is not None and folds < 2:
                _fail(f"--folds must be at least 2, got {folds}")
            if out.exists() and not out.is_dir():
                _fail(f"--out must be a folder, and {out} is a file")
            summary, interrupted = repeat(
                config, out, _seeds(seeds) if seeds else [config.seed], folds, quiet=quiet
            )
            if summary is not None:
                print_summary(summary, out)
        else:
            comparison.check_empty(out)
            report = comparison.compare(config, out, quiet=quiet)
            interrupted = report["interrupted"]
            print_report(report, out)
    except ValueError as error:
        _fail(error)
    except comparison.ArmFailed as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.code if error.code == 2 else 1) from None
    if interrupted:
        raise typer.Exit(130)


@app.command("train")
def train_command(
    task: TaskName,
    out: Out,
    arm: Annotated[str, typer.Option(help="baseline or pruned")],
    epochs: Epochs = None,
    seed: Seed = None,
    target_sparsity: Target = None,
    self_paced: SelfPaced = False,
    data: Data = None,
    device: Device = "auto",
    paper: Paper = False,
    block_size: Block = None,
    threshold: Threshold = None,
    lr: Rate = None,
    batch_size: Batch = None,
    patience: Patience = None,
    weight_decay: Decay = None,
    dropout: Dropout = None,
    calibration_samples: Samples = None,
    quiet: Quiet = False,
) -> None:
    """Train one arm of TASK in this process; writes arm.json, history.csv and, for the pruned arm, its
    structure."""
    config = _resolve(
        task,
        epochs=epochs,
        seed=seed,
        target_sparsity=target_sparsity,
        self_paced=self_paced,
        data=data,
        device=device,
        paper=paper,
        block_size=block_size,
        threshold=threshold,
        lr=lr,
        batch_size=batch_size,
        patience=patience,
        weight_decay=weight_decay,
        dropout=dropout,
        calibration_samples=calibration_samples,
    )
    from dynaprune.compare import check_empty
    from dynaprune.train import ARMS, exit_code, run_arm

    if arm not in ARMS:
        _fail(f"--arm must be one of {', '.join(ARMS)}, got {arm!r}")
    try:
        check_empty(out)
    except ValueError as error:
        _fail(error)
    code = exit_code(lambda: run_arm(config, arm, out, quiet=quiet))
    if code != 2:
        typer.echo(f"wrote {out / 'arm.json'}")
    if code:
        raise typer.Exit(code)


@app.command("info")
def info_command() -> None:
    """Tell which kernels run on this machine, and why the others do not."""
    from dynaprune_kernels import info

    sys.exit(info.main())


if __name__ == "__main__":
    app()
