"""What keeps a target from being reached is said, and refusals name the cause."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import dynaprune
from tests.pruning.attached import STEPS, adam, loss_of, mlp, settings, train


@pytest.mark.parametrize("end", ["finalize", "detach"])
def test_an_end_before_the_target_is_said_once_with_numbers(end: str) -> None:
    model = mlp()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings())
    train(model, optimizer, 4)
    with pytest.warns(RuntimeWarning, match="SGD has taken 8 steps"):
        train(model, torch.optim.SGD(model.parameters(), 0.01), STEPS - 4)
    with pytest.warns(
        RuntimeWarning, match=rf"short of the target's 75.0%, after 4 of {STEPS} .* \(20 of SGD\)"
    ):
        getattr(pruner, end)()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.detach()


def test_half_of_the_steps_by_accumulation_are_said() -> None:
    model = mlp()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings(end=0.6))
    for step in range(STEPS):
        loss_of(model, step).backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert not pruner.target_reached
    with pytest.warns(RuntimeWarning, match=f"after {STEPS // 2} of {STEPS} optimizer steps"):
        pruner.finalize()


@pytest.mark.parametrize("changes", [{}, {"neurons": True}, {"regrow": 0.3}, {"allocation": "uniform"}])
def test_an_ordinary_training_says_nothing(changes: dict[str, Any]) -> None:
    model = mlp()
    optimizer = adam(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.filterwarnings("ignore", "block-sparse ops on cpu run on the dense backend")
        pruner = dynaprune.attach(model, optimizer, settings(**changes))
        train(model, optimizer)
        assert pruner.target_reached
        pruner.finalize()


class Still(torch.optim.SGD):
    """Leaves the weights as they are, whatever the gradients."""

    def step(self, closure: Any = None) -> None:
        return None


class TrainMode(torch.optim.Adam):
    """Steps in training mode only, as schedule-free optimizers do."""

    in_training = False

    def train(self) -> None:
        self.in_training = True

    def step(self, closure: Any = None) -> Any:
        if not self.in_training:
            raise RuntimeError("Optimizer was not in train mode when step is called")
        return super().step(closure)


def test_an_optimizer_that_wants_training_mode_is_tried_in_it() -> None:
    model = mlp()
    optimizer = TrainMode(model.parameters(), lr=1e-2)
    pruner = dynaprune.attach(model, optimizer, settings())
    assert not optimizer.in_training
    optimizer.train()
    train(model, optimizer)
    assert pruner.target_reached


class Sharpness(torch.optim.Optimizer):
    """Sharpness-aware minimisation: runs the closure, then steps another optimizer."""

    def __init__(self, parameters: Any, base: bool) -> None:
        super().__init__(parameters, {})
        if base:
            self.base_optimizer = torch.optim.SGD(self.param_groups, 0.1)

    def step(self, closure: Any = None) -> Any:
        assert closure is not None, "sharpness-aware minimisation requires a closure"


@pytest.mark.parametrize(
    ("base", "said"), [(True, "its base_optimizer"), (False, "the optimizer that it wraps")]
)
def test_sharpness_aware_minimisation_is_refused_with_what_to_attach_to(base: bool, said: str) -> None:
    model = mlp()
    with pytest.raises(ValueError, match=said):
        dynaprune.attach(model, Sharpness(model.parameters(), base), settings())


class Transposed(nn.Module):
    """A layer of another library, with a matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([Transposed(), Transposed()], r"2 layers of type \w+'s Transposed have no block-sparse form"),
        ([nn.Conv3d(8, 8, 3)], "1 layers of type torch's Conv3d"),
        ([nn.ConvTranspose2d(16, 16, 3), nn.Linear(8, 8)], "1 layers of type torch's ConvTranspose2d"),
        ([nn.Bilinear(8, 8, 8)], "torch's Bilinear"),
    ],
)
def test_a_model_without_prunable_layers_is_told_what_it_has(layers: list[nn.Module], said: str) -> None:
    model = nn.Sequential(*layers)
    with pytest.raises(ValueError, match=said):
        dynaprune.attach(model, torch.optim.AdamW(model.parameters()), settings())


def test_gpt2s_layers_are_named() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))
    with pytest.raises(ValueError, match="8 layers of type transformers's Conv1D have no block-sparse form"):
        dynaprune.attach(model, torch.optim.AdamW(model.parameters()), settings())


@pytest.mark.parametrize(
    ("factor", "named"), [(float("nan"), "not finite"), (float("inf"), "not finite"), (0.0, "all zero")]
)
def test_gradients_that_stop_being_usable_stop_the_pruning_until_they_are_again(
    factor: float, named: str
) -> None:
    model = mlp()
    optimizer = Still(model.parameters())
    pruner = dynaprune.attach(model, optimizer, settings(total_steps=100, interval=2, end=0.6))

    def run(first: int, last: int, times: float) -> None:
        for step in range(first, last):
            optimizer.zero_grad()
            (loss_of(model, step) * times).backward()
            optimizer.step()

    run(0, 6, 1.0)
    with pytest.warns(RuntimeWarning, match=f"are {named} in 8 observations up to step 14") as said:
        run(6, 30, factor)
    assert len([each for each in said if "nothing is removed" in str(each.message)]) == 1
    stopped = pruner.sparsity
    assert pruner.report()["observing"]["gradients_are"] == named
    with pytest.warns(RuntimeWarning, match="usable again at step 31: pruning goes on"):
        run(30, 70, 1.0)
    assert pruner.report()["observing"]["gradients_are"] == "usable"
    assert pruner.sparsity > stopped and pruner.target_reached


@pytest.mark.parametrize("factor", [float("nan"), 0.0])
def test_single_steps_without_usable_gradients_are_normal(factor: float) -> None:
    model = mlp()
    optimizer = Still(model.parameters())
    pruner = dynaprune.attach(model, optimizer, settings())
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.filterwarnings("ignore", "block-sparse ops on cpu run on the dense backend")
        for step in range(STEPS):
            optimizer.zero_grad()
            (loss_of(model, step) * (factor if step % 4 == 3 else 1.0)).backward()
            optimizer.step()
    assert pruner.target_reached
