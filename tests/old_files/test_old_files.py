"""Files that earlier versions wrote: each goes on loading, strictly, and gives what it gave."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import dynaprune
from dynaprune.nn import BlockSparseLayer
from tests.integrations import test_lightning as lightning_cases
from tests.integrations import trainer_cases
from tests.old_files import write
from tests.pruning.attached import STEPS, batch, train
from tests.saving.checkpoint_cases import network, outputs, swapped

FOLDERS = sorted(path.parent for path in Path(__file__).parent.glob("*/expected.safetensors"))


@pytest.fixture(params=FOLDERS, ids=[folder.name for folder in FOLDERS])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def expected(folder: Path, name: str) -> Tensor:
    return load_file(folder / "expected.safetensors")[name]


def assert_gives(found: Tensor, wanted: Tensor) -> None:
    """Equal but for what another processor rounds differently in a handful of layers."""
    assert found.shape == wanted.shape
    error = (found - wanted).double().norm() / wanted.double().norm()
    assert error < 64 * torch.finfo(wanted.dtype).eps


def test_there_is_a_folder() -> None:
    assert "dec5832" in [folder.name for folder in FOLDERS]


def test_a_saved_model(folder: Path) -> None:
    model = dynaprune.load(network, folder / "cut.safetensors")
    assert model[7].out_features == 48 and isinstance(model[3], BlockSparseLayer)  # type: ignore[index]
    assert_gives(outputs(model, write.image()), expected(folder, "cut"))


def test_a_state_dict(folder: Path) -> None:
    model = swapped()
    state = torch.load(folder / "state_dict.pt", weights_only=True)
    found = model.load_state_dict(state, strict=True)
    assert not found.missing_keys and not found.unexpected_keys
    assert_gives(outputs(model, write.image()), expected(folder, "state_dict"))


def test_an_interrupted_training(folder: Path) -> None:
    parts = write.training()
    state = torch.load(folder / "training.pt", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    assert_gives(outputs(parts["model"], batch(0)[0]), expected(folder, "training"))
    parts["model"].train()
    before = parts["pruner"].sparsity
    train(parts["model"], parts["optimizer"], STEPS - write.INTERRUPTED_AT, write.INTERRUPTED_AT)
    assert parts["pruner"].steps == STEPS and parts["pruner"].sparsity > before


def test_a_checkpoint_of_the_trainer(folder: Path, tmp_path: Path) -> None:
    assert_gives(
        trainer_cases.logits(trainer_cases.loaded_model(folder / "trainer")), expected(folder, "trainer")
    )
    shutil.copytree(folder / "trainer", tmp_path / f"checkpoint-{write.TRAINER_STEP}")
    _, pruning = write.trainer_callback()
    run = trainer_cases.trainer(tmp_path, pruning, save_strategy="no")
    run.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{write.TRAINER_STEP}"))
    assert pruning.pruner is not None
    assert pruning.pruner.steps == trainer_cases.STEPS and pruning.pruner.target_reached


def test_a_checkpoint_of_lightning(folder: Path, tmp_path: Path) -> None:
    module, pruning = write.lightning_callback()
    seen: list[Tensor] = []
    run = lightning_cases.trainer(tmp_path, pruning, write.OutputsOfEachEpoch(seen))
    run.fit(module, lightning_cases.loader(), ckpt_path=str(folder / "lightning.ckpt"))
    assert pruning.pruner is not None and pruning.pruner.steps == STEPS and pruning.pruner.target_reached
    assert len(seen) == STEPS // lightning_cases.BATCHES - 1

    bare, reader = write.lightning_callback()
    lightning_cases.trainer(tmp_path, reader).test(
        bare, lightning_cases.loader(), ckpt_path=str(folder / "lightning.ckpt"), verbose=False
    )
    assert_gives(outputs(bare, batch(0)[0]), expected(folder, "lightning"))
