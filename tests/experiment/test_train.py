"""One arm's training: what is kept as the best, and what an interrupt does."""

from __future__ import annotations

import signal
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from dynaprune.experiment.arm import Arm, Outcome
from dynaprune.experiment.epochs import train_epochs
from dynaprune.experiment.interrupts import StopRequest, signals_taken
from dynaprune.experiment.network import DenseNetwork
from dynaprune.experiment.run_config import RunConfig
from dynaprune.experiment.steps import (
    TrainState,
    closing_steps,
    evaluate,
    full_batches,
    make_optimizer,
    time_in_turn,
)
from dynaprune.experiment.tasks import Task, TaskData
from dynaprune.experiment.tasks.data import mlp, training_batches
from dynaprune.pruning.early_stopping import EarlyStopping

CPU = torch.device("cpu")


def _data(rows: int = 40) -> TaskData:
    inputs = torch.randn(rows, 6)
    part = TensorDataset(inputs, (inputs[:, 0] > 0).long())
    return TaskData(part, part, part, classes=2)


def _build(data: TaskData, dropout: float) -> nn.Module:
    return mlp([6, 12, 2], dropout)


TASK = Task(name="small", title="", load=lambda split: _data(), build_model=_build)


class _Shrinking(DenseNetwork):
    """Cuts hidden neurons at given steps: every cut changes shapes, and from the last one on weights are
    useless."""

    def __init__(self, model: nn.Sequential, widths: dict[int, int], reached: int, spoil: int) -> None:
        super().__init__(model)
        self.widths, self.reached, self.spoil, self.step = widths, reached, spoil, 0

    def version(self) -> int:
        return sum(step <= self.step for step in self.widths)

    def target_reached(self) -> bool:
        return self.step >= self.reached

    def final_standing(self) -> int:
        return 2 if self.target_reached() else 0

    def parameters_active(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def after_step(self, step: int) -> None:
        self.step = step
        with torch.no_grad():
            if width := self.widths.get(step):
                first, last = self.model[0], self.model[2]  # type: ignore[index]
                first.weight.data, first.bias.data = first.weight[:width].clone(), first.bias[:width].clone()
                last.weight.data = last.weight[:, :width].clone()
                first.weight.grad = first.bias.grad = last.weight.grad = None
            if step >= self.spoil:
                self.model[2].weight.fill_(1e3)  # type: ignore[index, operator, union-attr]


def _trained(
    tmp_path: Path, structure: dict[str, Any], **settings: Any
) -> tuple[Outcome, TrainState, TaskData]:
    data = _data()
    config = RunConfig(task="digits", batch_size=8, **settings)
    torch.manual_seed(1)
    model = _build(data, 0.0)
    assert isinstance(model, nn.Sequential)
    state = TrainState(config, TASK, model, torch.optim.SGD(model.parameters(), 0.05), CPU)
    shrinking = _Shrinking(model, **structure)
    stopping = EarlyStopping(config.patience)
    arm = Arm("pruned", state, data, shrinking, torch.Generator().manual_seed(0), stopping)
    return train_epochs(arm, StopRequest(), tmp_path, quiet=True), state, data


def test_the_best_weights_are_kept_with_their_structure(tmp_path: Path) -> None:
    """5 steps an epoch. Width 8 from epoch 2, where the target is reached; 4 and ruined weights from epoch 5
    on."""
    done, state, data = _trained(
        tmp_path, {"widths": {8: 8, 23: 4}, "reached": 8, "spoil": 23}, epochs=20, patience=3
    )
    assert done.best_epoch == 4
    assert done.kept is not None
    model, facts = done.kept
    assert [tuple(p.shape) for p in model.parameters()] == [(8, 6), (8,), (2, 8), (2,)]
    assert facts["parameters_active"] == 8 * 7 + 2 * 9
    assert [tuple(p.shape) for p in state.model.parameters()] == [(4, 6), (4,), (2, 4), (2,)]
    loss = evaluate(TASK, model, data.validation, CPU)[0]
    assert loss == pytest.approx(done.history[3]["validation_loss"], rel=1e-6) and loss < 1
    assert done.ended == "stopped early" and len(done.history) == 5 + 3
    assert [row["best"] for row in done.history[:5]] == [False, True, True, True, False]


def test_flops_are_measured_again_at_every_change(tmp_path: Path) -> None:
    done, state, _ = _trained(tmp_path, {"widths": {8: 8, 23: 4}, "reached": 99, "spoil": 99}, epochs=6)
    per_sample = [2 * (3 * (6 * h + 2 * h) - 6 * h) for h in (12, 8, 4)]
    assert state.flops_per_sample == per_sample
    assert state.flops_total == 8 * (8 * per_sample[0] + 15 * per_sample[1] + 7 * per_sample[2])
    # The first step of a structure counts FLOPs, the next one is timed or measures memory.
    assert done.steps == 30 and len(state.step_seconds) == 30 - 3 - 3


def test_a_run_cut_before_the_target_keeps_its_last_weights(tmp_path: Path) -> None:
    done, state, _ = _trained(tmp_path, {"widths": {8: 8}, "reached": 99, "spoil": 99}, epochs=3)
    assert done.best_epoch is None and done.kept is not None and done.ended == "ran all epochs"
    for a, b in zip(done.kept[0].parameters(), state.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_arm_sees_the_batches_that_its_order_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs, augmented by the same generator."""
    plain = _data()
    data = replace(plain, augment=lambda inputs, g: inputs + torch.rand(inputs.shape, generator=g))
    wanted, order = [], torch.Generator().manual_seed(4)
    for _ in range(2):
        wanted += [inputs for inputs, _ in training_batches(data, 8, order)]
    seen = []
    real = TrainState.step

    def step(self: TrainState, inputs: torch.Tensor, *given: Any, **named: Any) -> Any:
        seen.append(inputs)
        return real(self, inputs, *given, **named)

    monkeypatch.setattr(TrainState, "step", step)
    model = _build(data, 0.0)
    config = RunConfig(task="digits", batch_size=8, epochs=2)
    state = TrainState(config, TASK, model, torch.optim.SGD(model.parameters(), 0.05), CPU)
    generator = torch.Generator().manual_seed(4)
    arm = Arm("baseline", state, data, DenseNetwork(model), generator, EarlyStopping(5))
    train_epochs(arm, StopRequest(), tmp_path, quiet=True)
    assert len(seen) == 10 and all(torch.equal(a, b) for a, b in zip(seen, wanted, strict=True))
    assert torch.equal(generator.get_state(), order.get_state())


def test_a_request_to_stop_ends_the_epoch_after_its_step_and_handlers_come_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    data = _data()
    model = _build(data, 0.0)
    state = TrainState(
        RunConfig(task="digits", batch_size=8), TASK, model, torch.optim.SGD(model.parameters(), 0.05), CPU
    )

    class _Raising(DenseNetwork):
        def after_step(self, step: int) -> None:
            if step == 7:
                signal.raise_signal(signal.SIGINT)

    stop = StopRequest()
    with signals_taken(stop.take):
        arm = Arm("baseline", state, data, _Raising(model), torch.Generator(), EarlyStopping(5))
        done = train_epochs(arm, stop, tmp_path, quiet=True)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (done.steps, done.ended, len(done.history)) == (7, "interrupted", 2)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_closing_steps_and_the_twin_are_timed_in_full_batches() -> None:
    data = _data(rows=44)
    config = RunConfig(task="digits", batch_size=8)
    model = _build(data, 0.0)
    state = TrainState(config, TASK, model, make_optimizer(model, config)[0], CPU)
    source = full_batches(data, config, CPU, torch.Generator())
    assert all(len(targets) == 8 for _, targets in (next(source) for _ in range(12)))
    closed = closing_steps(state, source)
    assert len(state.step_seconds) == 20
    assert closed["step_seconds_last"] == statistics.median(state.step_seconds)
    timed = time_in_turn(state, data, source)
    assert len(state.step_seconds) == 40 and timed["step_seconds_dense"] > 0
