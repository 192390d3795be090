"""Recalibrated batch norms: right for the changed network, and nothing else of it moves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from dynaprune import recalibrate_batch_norm
from dynaprune.experiment.tasks.resnet import CifarResNet
from dynaprune.nn import BlockSparseLayer, swap_layers


def batches(count: int = 4, samples: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Images whose class is the colour that they have more of, and the classes."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(count):
        labels = torch.randint(3, (samples,), generator=generator)
        pixels = torch.randint(0, 150, (samples, 3, 8, 8), generator=generator)
        pixels[torch.arange(samples), labels] += 15
        found.append((pixels.to(torch.uint8), labels))
    return found


def network(dropout: float = 0.0) -> CifarResNet:
    return CifarResNet((16, 32), (1, 1), classes=3, dropout=dropout)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[Tensor]:
    model.train()
    losses, data = [], batches()
    for step in range(steps):
        x, y = data[step % len(data)]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@torch.no_grad()
def loss_of(model: nn.Module) -> float:
    """Mean loss in the mode that the model is in."""
    return float(torch.stack([F.cross_entropy(model(x), y) for x, y in batches()]).mean())


def inputs() -> list[Tensor]:
    return [x for x, _ in batches()]


def test_statistics_are_those_of_torch_update_bn() -> None:
    model = network()
    train(model, torch.optim.Adam(model.parameters(), lr=5e-3), 8)
    twin = copy.deepcopy(model)
    update_bn(inputs(), twin)
    assert recalibrate_batch_norm(model.eval(), inputs()) == 6
    mine, other = model.state_dict(), twin.state_dict()
    for name, value in other.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-5, atol=1e-6)


def test_evaluation_is_repaired_after_a_removal() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    swap_layers(model, 8)
    train(model, optimizer, 40)
    before = loss_of(model.eval())
    for layer in model.modules():
        if isinstance(layer, BlockSparseLayer):
            layout = layer.layout
            dead = torch.zeros(layout.blocks, dtype=torch.bool)
            dead[torch.randperm(layout.blocks)[: layout.blocks // 2]] = True
            layout.release_(dead.view(layout.rows, layout.columns))
    stale = loss_of(model)
    assert recalibrate_batch_norm(model, inputs()) == 6
    repaired = loss_of(model)
    by_batch = loss_of(copy.deepcopy(model).train())
    assert stale > 2 * before
    assert abs(repaired - by_batch) < 0.1 * (stale - by_batch)


def test_nothing_but_statistics_moves_and_training_goes_on_bit_for_bit() -> None:
    def run(recalibrated: bool) -> tuple[CifarResNet, list[Tensor]]:
        torch.manual_seed(1)
        model = network(dropout=0.5)
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        losses = train(model, optimizer, 3)
        if recalibrated:
            modes = [m.training for m in model.modules()]
            state = {k: v.clone() for k, v in model.state_dict().items()}
            random = torch.get_rng_state()
            held = {name: buffer for name, buffer in model.named_buffers()}
            recalibrate_batch_norm(model, inputs())
            assert torch.equal(random, torch.get_rng_state())
            assert modes == [m.training for m in model.modules()]
            assert all(buffer is held[name] for name, buffer in model.named_buffers())
            changed = {k for k, v in model.state_dict().items() if not torch.equal(v, state[k])}
            norms = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
            assert {f"{n}.running_{s}" for n in norms for s in ("mean", "var")} <= changed
            assert all("running" in name or "num_batches" in name for name in changed)
            assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}
        return model, losses + train(model, optimizer, 4)

    (plain, expected), (model, losses) = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(losses, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_frozen_and_unreached_norms_keep_their_statistics() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.live, self.spare = (nn.BatchNorm1d(4) for _ in range(3))
            self.untracked = nn.BatchNorm1d(4, track_running_stats=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.untracked(self.live(self.frozen(x)))

    model = Partly()
    model.frozen.eval()
    assert recalibrate_batch_norm(model, [torch.randn(64, 4) * 3 + 1]) == 1
    for norm in (model.frozen, model.spare):
        assert not norm.running_mean.any() and bool((norm.running_var == 1).all())  # type: ignore[union-attr]
    assert bool((model.live.running_mean.abs() > 0.5).all())  # type: ignore[union-attr]


def test_batches_in_another_form_and_networks_without_norms() -> None:
    model = network()
    seen: list[Any] = []

    def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
        seen.append(batch)
        return model(batch[0])

    assert recalibrate_batch_norm(model, iter(batches()), forward) == 6 and len(seen) == 4
    drawn = iter(batches())
    assert recalibrate_batch_norm(nn.Sequential(nn.Linear(4, 4)), drawn) == 0
    assert len(list(drawn)) == 4


def test_a_compiled_network_is_not_compiled_anew() -> None:
    compiled: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        compiled.append(graph.print_readable(print_output=False))
        return graph.forward

    model = network()
    fast = torch.compile(model, backend=backend)
    fast(inputs()[0])
    count = len(compiled)
    assert count > 0 and recalibrate_batch_norm(fast, inputs()) == 6 and len(compiled) == count


def test_no_batch_and_a_failing_forward_leave_the_model_as_it_was() -> None:
    model = network()
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="at least one batch"):
        recalibrate_batch_norm(model, [])
    with pytest.raises(RuntimeError):
        recalibrate_batch_norm(model, [inputs()[0], torch.zeros(2, 5, 8, 8)])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}
