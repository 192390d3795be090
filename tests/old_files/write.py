"""Write the files that later versions have to go on loading: ``python -m tests.old_files.write FOLDER``.

It runs at the commit after which ``FOLDER`` is named. There is a file of each kind: ``dynaprune.save``;
``torch.save`` of the state dicts of a swapped model and of an interrupted training; a checkpoint of the
Trainer; one of Lightning.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import dynaprune
from dynaprune import DynaPruneCallback, DynaPruneLightningCallback
from tests.integrations import test_lightning as lightning_cases
from tests.integrations import trainer_cases
from tests.pruning.attached import adam, batch, mlp, settings, train
from tests.saving.checkpoint_cases import INPUT, outputs, pruned, swapped

INTERRUPTED_AT = 11
TRAINER_STEP, LIGHTNING_STEP = 10, 8


def image() -> Tensor:
    """The input that the expected outputs belong to."""
    return torch.linspace(-1, 1, torch.Size(INPUT).numel()).sin().view(INPUT)


def training() -> dict[str, Any]:
    """A training with everything that a pruner's state has: a trial, regrowth, neurons."""
    model = mlp()
    optimizer = adam(model)
    data = torch.utils.data.TensorDataset(*batch(7, rows=300))

    def losses(net: nn.Module, parts: Any) -> Tensor:
        return nn.functional.cross_entropy(net(parts[0]), parts[1], reduction="none")

    trial = dynaprune.CalibrationTrial(model, data, losses, samples=200, seed=4)
    config = settings(regrow=0.5, neurons=True, interval=2, target_sparsity=0.9)
    return {
        "model": model,
        "optimizer": optimizer,
        "pruner": dynaprune.attach(model, optimizer, config, trial=trial),
    }


def trainer_callback() -> tuple[Any, DynaPruneCallback]:
    """The Trainer's model and its callback."""
    model = trainer_cases.bert()
    return model, DynaPruneCallback(model, trainer_cases.settings(neurons=True), samples=128)


def lightning_callback() -> tuple[Any, DynaPruneLightningCallback]:
    """Lightning's module and its callback."""
    pruning = DynaPruneLightningCallback(lightning_cases.settings(), loss=lightning_cases.losses)
    return lightning_cases.Module(), pruning


class OutputsOfEachEpoch(lightning_cases.lightning.Callback):  # type: ignore[misc, name-defined]
    """Notes what the module gives at the end of each epoch, when its checkpoint is written."""

    def __init__(self, seen: list[Tensor]) -> None:
        self.seen = seen

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(outputs(pl_module, batch(0)[0]))
        pl_module.train()


def write(folder: Path) -> None:
    """Write every file, and ``expected.safetensors`` with what the models give before they are saved."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    expected: dict[str, Tensor] = {}

    model = pruned()
    dynaprune.save(model, folder / "cut.safetensors")
    expected["cut"] = outputs(model, image())

    model = swapped()
    torch.save(model.state_dict(), folder / "state_dict.pt")
    expected["state_dict"] = outputs(model, image())

    parts = training()
    train(parts["model"], parts["optimizer"], INTERRUPTED_AT)
    torch.save({name: part.state_dict() for name, part in parts.items()}, folder / "training.pt")
    expected["training"] = outputs(parts["model"], batch(0)[0])

    with tempfile.TemporaryDirectory() as scratch:
        _, pruning = trainer_callback()
        trainer_cases.trainer(Path(scratch), pruning).train()
        made = folder / "trainer"
        left_out = shutil.ignore_patterns("training_args.bin")
        shutil.copytree(Path(scratch) / f"checkpoint-{TRAINER_STEP}", made, ignore=left_out)
    expected["trainer"] = trainer_cases.logits(trainer_cases.loaded_model(made))

    with tempfile.TemporaryDirectory() as scratch:
        module, pruning = lightning_callback()
        saving = lightning_cases.callbacks.ModelCheckpoint(dirpath=scratch, filename="{step}", save_top_k=-1)
        seen: list[Tensor] = []
        lightning_cases.trainer(Path(scratch), pruning, saving, OutputsOfEachEpoch(seen)).fit(
            module, lightning_cases.loader()
        )
        shutil.copy(Path(scratch) / f"step={LIGHTNING_STEP}.ckpt", folder / "lightning.ckpt")
    expected["lightning"] = seen[0]
    save_file(expected, folder / "expected.safetensors")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
