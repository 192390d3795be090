"""Memory, state and FLOPs as they are measured."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from dynaprune.experiment import metrics
from dynaprune.experiment.run_config import RunConfig
from dynaprune.experiment.steps import TrainState, evaluate, make_optimizer, make_schedule
from dynaprune.experiment.tasks import accuracy_and_f1, get_task
from dynaprune.experiment.tasks.data import mlp

CPU = torch.device("cpu")


def _state(batch: int = 8) -> tuple[TrainState, torch.Tensor, torch.Tensor]:
    config = RunConfig(task="digits", batch_size=batch)
    model = mlp([6, 16, 16, 10], 0.0)
    state = TrainState(config, get_task("digits"), model, make_optimizer(model, config)[0], CPU)
    return state, torch.randn(batch, 6), torch.randint(0, 10, (batch,))


def test_state_is_weights_gradients_and_both_moments() -> None:
    state, inputs, targets = _state()
    before = metrics.training_state_bytes(state.model, state.optimizer)
    numbers = 6 * 16 + 16 + 16 * 16 + 16 + 16 * 10 + 10
    assert before == {"weights": 4 * numbers, "gradients": 0, "optimizer": 0, "total": 4 * numbers}
    state.step(inputs, targets)
    after = metrics.training_state_bytes(state.model, state.optimizer)
    steps = 6 * 4
    assert after["gradients"] == 4 * numbers and after["optimizer"] == 8 * numbers + steps
    assert after["total"] == 16 * numbers + steps


def test_flops_of_a_step_are_those_of_its_matrix_products() -> None:
    """Forward 2 MNK per layer, as much again for the weights' gradient, and for the input's but in the first
    layer."""
    state, inputs, targets = _state(batch=8)
    state.step(inputs, targets, count_flops=True)
    products = [6 * 16, 16 * 16, 16 * 10]
    assert state.flops_per_step(0) == 2 * 8 * (3 * sum(products) - products[0])
    assert state.step_seconds == [] and state.flops_total == state.flops_per_step(0)
    state.step(inputs[:4], targets[:4])
    assert len(state.step_seconds) == 1 and state.flops_total == 1.5 * state.flops_per_step(0)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_attention_counts_its_products_fused_or_not(dropout: float) -> None:
    """Queries by keys and weights by values, forward; twice that backward, and the fused kernel computes the
    first of them anew."""
    q, k, v = (torch.randn(2, 4, 20, 16, requires_grad=True) for _ in range(3))
    attention = torch.nn.functional.scaled_dot_product_attention

    def run() -> None:
        attention(q, k, v, dropout_p=dropout).sum().backward()

    product = 2 * (2 * 4) * 20 * 20 * 16
    _, flops = metrics.flops_of(run)
    assert flops == (6 if dropout else 7) * product


LAYERS: dict[str, tuple[nn.Module, tuple[torch.Tensor, ...], int]] = {
    "LSTM": (nn.LSTM(16, 8), (torch.randn(5, 3, 16),), 15 * 32 * (16 + 8)),
    "LSTM in both directions, of two layers": (
        nn.LSTM(16, 8, 2, bidirectional=True, batch_first=True),
        (torch.randn(5, 3, 16),),
        15 * 2 * 32 * (16 + 8 + 16 + 8),
    ),
    "LSTM in float64": (nn.LSTM(16, 8).double(), (torch.randn(5, 3, 16).double(),), 15 * 32 * (16 + 8)),
    "GRU": (nn.GRU(16, 8), (torch.randn(5, 3, 16),), 15 * 24 * (16 + 8)),
    "LSTMCell": (nn.LSTMCell(16, 8), (torch.randn(3, 16),), 3 * 32 * (16 + 8)),
    "Bilinear": (nn.Bilinear(4, 5, 6), (torch.randn(3, 4), torch.randn(3, 5)), 3 * 4 * 5 * 6),
    "ConvTranspose2d": (nn.ConvTranspose2d(4, 8, 3), (torch.randn(1, 4, 6, 6),), 36 * 4 * 8 * 9),
    "Conv3d": (nn.Conv3d(4, 8, 3), (torch.randn(1, 4, 5, 5, 5),), 27 * 4 * 8 * 27),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_stay_whole_count_their_products(name: str) -> None:
    layer, inputs, products = LAYERS[name]
    with torch.no_grad():
        assert metrics.flops_of(lambda: layer(*inputs))[1] == 2 * products

    def step() -> None:
        outputs = layer(*(x.clone().requires_grad_() for x in inputs))
        (outputs[0] if isinstance(outputs, tuple) else outputs).sum().backward()

    counted = metrics.flops_of(step)[1]
    if name.startswith("LSTMCell") or name in ("GRU", "LSTM in float64"):
        # Unfused: the first state is a constant, whose gradient nobody asks for.
        assert 2 * 2 * products < counted <= 2 * 3 * products
    else:
        operands = 3 if name == "Bilinear" else 2  # one product for the gradient of each
        assert counted == 2 * (1 + operands) * products


def test_stacked_experts_count_every_row_once() -> None:
    x, weights = torch.randn(10, 16, requires_grad=True), torch.randn(2, 16, 8, requires_grad=True)
    ends = torch.tensor([4, 10], dtype=torch.int32)

    def step() -> None:
        y = torch._grouped_mm(x.bfloat16(), weights.bfloat16(), offs=ends)
        y.backward(torch.ones(10, 8, dtype=torch.bfloat16))

    assert metrics.flops_of(step)[1] == 2 * 3 * 10 * 16 * 8


def test_counting_flops_does_not_change_the_step() -> None:
    weights = []
    for count in (False, True):
        torch.manual_seed(0)
        state, inputs, targets = _state()
        for _ in range(3):
            state.step(inputs, targets, count_flops=count)
        weights.append(torch.cat([p.detach().flatten() for p in state.model.parameters()]))
    assert torch.equal(*weights)


def test_evaluation_leaves_the_mode_and_averages_over_samples() -> None:
    task = get_task("digits")
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 10)).train()
    data = torch.utils.data.TensorDataset(torch.randn(300, 6), torch.randint(0, 10, (300,)))
    loss, scores = evaluate(task, model, data, CPU)
    assert model.training
    outputs = model[1](data.tensors[0]).detach()
    assert loss == pytest.approx(float(nn.functional.cross_entropy(outputs, data.tensors[1])), rel=1e-6)
    assert scores["accuracy"] == float((outputs.argmax(1) == data.tensors[1]).double().mean())


def test_accuracy_and_f1() -> None:
    truth, guess = [0, 0, 1, 1, 1], [0, 1, 1, 1, 0]
    scores = accuracy_and_f1("binary")(truth, guess)
    assert scores == {"accuracy": pytest.approx(0.6), "f1": pytest.approx(2 * 2 / (2 * 2 + 1 + 1))}
    assert accuracy_and_f1("macro")(truth, guess)["f1"] == pytest.approx((0.5 + 2 / 3) / 2)


def test_the_rate_rises_over_the_warmup_and_falls_to_zero() -> None:
    for name, middle in (("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)):
        config = RunConfig(task="digits", lr=0.1, schedule=name, warmup_steps=4)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], config.lr)
        schedule = make_schedule(optimizer, config, total_steps=24)
        rates = []
        for _ in range(24):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        assert rates[:4] == pytest.approx([0.02, 0.04, 0.06, 0.08]) and rates[4] == pytest.approx(0.1)
        assert rates[14] == pytest.approx(0.1 * middle) and max(rates) <= 0.1 + 1e-9
        assert rates[-1] == pytest.approx({"constant": 0.1, "linear": 0.005, "cosine": 0.0006156}[name], 1e-3)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak can be reset on Linux only")
def test_the_peak_is_that_since_the_reset() -> None:
    size = 256 * 2**20
    gone = torch.ones(size // 4)
    del gone
    with metrics.memory_peak_from_now(CPU) as peak:
        idle = peak()
        held = torch.ones(size // 4)
        del held
        used = peak()
    assert idle is not None and used is not None
    assert metrics.peak_memory_bytes(CPU) == used
    assert used - idle > 0.9 * size
    with metrics.memory_peak_from_now(CPU) as peak:
        again = peak()
    assert again is not None and again < used - 0.9 * size


def test_the_environment_names_versions_processor_and_threads() -> None:
    found = metrics.environment(CPU)
    assert found["versions"]["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    assert found["cpu"] and found["device"] == "cpu" and found["cuda"] is None
