"""The score of a group of neurons: what a gate on all that its readers get from it would do to the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynaprune
from dynaprune.neurons.example_inputs import ExampleInputs
from dynaprune.neurons.groups import NeuronGroup, NeuronMap, find_groups
from dynaprune.nn import BlockSparseLayer, swap_layers
from dynaprune.pruning.edit.group_scores import GroupScores
from dynaprune.pruning.edit.input_gates import input_gates
from dynaprune.pruning.observe.scores import make_score

WIDE = torch.float64


def gates_by_autograd(model: nn.Module, x: Tensor, groups: list[NeuronGroup]) -> Tensor:
    """``dL/dgate`` of one gate per group, on the inputs of all its readers."""
    gates = torch.ones(len(groups), dtype=x.dtype, requires_grad=True)
    handles = []
    for number, group in enumerate(groups):
        for member in group.readers:

            def gate(
                module: nn.Module, args: tuple[Tensor], number: int = number, index: Any = member.index
            ) -> Any:
                dim = 1 if args[0].dim() == 4 else args[0].dim() - 1
                factor = torch.ones(args[0].shape[dim], dtype=x.dtype).index_put((index,), gates[number])
                return args[0] * factor.view(-1, *[1] * (args[0].dim() - 1 - dim))

            handles.append(model.get_submodule(member.name).register_forward_pre_hook(gate))
    loss_of(model, x).backward()
    for handle in handles:
        handle.remove()
    assert gates.grad is not None
    return gates.grad


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    y = y.flatten(1)
    return nn.functional.cross_entropy(y, torch.arange(len(y)) % y.shape[1])


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(40, 24), (5, 40)),
    "positions": (lambda: nn.Linear(40, 24), (5, 3, 40)),
    "convolution": (lambda: nn.Conv2d(20, 24, 3), (2, 20, 6, 6)),
    "two groups": (lambda: nn.Conv2d(32, 16, 3, groups=2), (2, 32, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(16, 32, 3, groups=16), (2, 16, 6, 6)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("sparse", [False, True])
def test_column_sums_are_the_derivative_by_a_gate_on_an_input(kind: str, sparse: bool) -> None:
    if sparse and kind == "depthwise":
        pytest.skip("a depthwise convolution has no blocks")
    torch.manual_seed(0)
    build, shape = LAYERS[kind]
    model = nn.Sequential(build()).to(WIDE)
    x = torch.randn(shape, dtype=WIDE)
    if sparse:
        swap_layers(model, 8, include=["0"])
        layout = model.get_submodule("0").layout
        gone = torch.rand(layout.mask.shape) < 0.3
        layout.suspend_(gone)  # their values stay, and so may their gradients: they must not count
    layer = model.get_submodule("0")
    assert isinstance(layer, BlockSparseLayer) == sparse
    dim = x.dim() - 1 if kind in ("linear", "positions") else 1
    gate = torch.ones(x.shape[dim], dtype=WIDE, requires_grad=True)
    y = model(x * gate.view(-1, *[1] * (x.dim() - 1 - dim)))
    assert input_gates(layer) is None
    (y.square().sum() / 7).backward()
    assert gate.grad is not None
    found = input_gates(layer)
    assert found is not None and found.dtype == WIDE
    torch.testing.assert_close(found, gate.grad)


class Joined(nn.Module):
    """A stream with two makers, norms, a depthwise convolution, and three kinds of readers, one flattened."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.stem, self.norm = nn.Conv2d(16, 32, 3, padding=1), norm(32)
        self.depth = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.inner, self.outer = nn.Conv2d(32, 48, 1), nn.Conv2d(48, 32, 3, padding=1)
        self.inner_norm = norm(48)
        self.side, self.head = nn.Linear(32, 16), nn.Linear(32 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depth(self.norm(self.stem(x)).relu())
        x = x + self.outer(self.inner_norm(self.inner(x)).relu())
        return self.head(x.flatten(1)) + self.side(x.mean((2, 3))).sum(1, keepdim=True)


def joined() -> tuple[nn.Module, Tensor, NeuronMap]:
    model = Joined().to(WIDE)
    swap_layers(model, 8, exclude=["side", "head"])
    x = torch.randn(12, 16, 4, 4, dtype=WIDE)
    neuron_map = find_groups(model, ExampleInputs.of(x))
    names = {m.name for group in neuron_map.groups for m in group.readers}
    assert names == {"inner", "outer", "side", "head"}, "dense readers are among them"
    return model, x, neuron_map


def test_a_groups_sum_over_all_readers_is_squared_once() -> None:
    model, x, neuron_map = joined()
    expected = gates_by_autograd(model, x, neuron_map.groups)
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss_of(model, x).backward()
    for name, wanted in {
        "second_moment": expected.square(),
        "taylor": expected.abs(),
        "movement": -expected,
    }.items():
        groups, score = GroupScores(), make_score(name)
        groups.watch(model, neuron_map, [optimizer])
        groups.observe(model, 0, score, step=1)
        torch.testing.assert_close(
            torch.tensor(groups.scores(score), dtype=WIDE),
            wanted,
            rtol=1e-5,
            atol=1e-6 * float(wanted.abs().max()),
        )
        assert groups.unseen() == {}


def test_the_mean_over_steps_has_its_bias_corrected() -> None:
    model, x, neuron_map = joined()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    groups, score = GroupScores(), make_score("second_moment", decay=0.5)
    groups.watch(model, neuron_map, [optimizer])
    squares = []
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, x + step).backward()
        groups.observe(model, 0, score, step=1)
        alone = GroupScores()
        alone.watch(model, neuron_map, [optimizer])
        alone.observe(model, 0, score, step=1)
        squares.append(torch.tensor(alone.scores(score), dtype=WIDE))
        optimizer.step()
    wanted = (squares[0] + 2 * squares[1] + 4 * squares[2]) / 7
    torch.testing.assert_close(torch.tensor(groups.scores(score), dtype=WIDE), wanted, rtol=1e-5, atol=0)


def test_rows_before_a_batch_norm_say_nothing_and_columns_do() -> None:
    """The fault that this score mends: by scale invariance the sum over a row is rounding."""
    model, x, neuron_map = joined()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    groups, score = GroupScores(), make_score("second_moment")
    groups.watch(model, neuron_map, [optimizer])
    loss_of(model, x).backward()
    groups.observe(model, 0, score, step=1)
    layer = model.get_submodule("inner")
    rows = (layer.weight * layer.weight.grad).sum((1, 2, 3)).square()
    of_inner = [s for s, g in zip(groups.scores(score), neuron_map.groups, strict=True) if g.name == "inner"]
    assert len(of_inner) == 6 and min(s for s in of_inner if s is not None) > 1e4 * float(rows.detach().sum())


def optimizers_of(model: nn.Module, which: str) -> list[torch.optim.Optimizer]:
    head = [p for n, p in model.named_parameters() if n.startswith(("head", "side"))]
    ids = {id(p) for p in head}
    body = [p for p in model.parameters() if id(p) not in ids]
    parts = {"one": [body + head], "body first": [body, head], "head first": [head, body]}[which]
    return [torch.optim.SGD(part, 0.05) for part in parts]


def pruned(which: str, every: int | None) -> Any:
    """The pruner after a few steps without an event."""
    model = Joined().to(WIDE)
    optimizers = optimizers_of(model, which)
    config = dynaprune.PruningConfig(
        target_sparsity=None, block_size=8, interval=1000, observe_every=every, exclude=["side", "head"]
    )
    example = torch.randn(3, 16, 4, 4, dtype=WIDE)
    pruner = dynaprune.attach(model, optimizers, config, trial=lambda: torch.ones(64), example_inputs=example)
    for step in range(7):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(
            model, torch.randn(12, 16, 4, 4, dtype=WIDE, generator=torch.Generator().manual_seed(step))
        ).backward()
        for optimizer in optimizers:
            optimizer.step()
    return pruner


@pytest.mark.parametrize("every", [1, 2, 3, None])
@pytest.mark.parametrize("which", ["body first", "head first"])
def test_readers_of_several_optimizers_are_added_up_before_the_square(which: str, every: int | None) -> None:
    wanted, found = pruned("one", every), pruned(which, every)
    assert not any(each.structure.groups.waiting(step) for each in (wanted, found) for step in range(9))
    scores = [torch.tensor(each.structure.groups.scores(each.score), dtype=WIDE) for each in (wanted, found)]
    assert len(scores[0]) == 10
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-5, atol=0)
    assert found.report()["neurons_ranked_by_blocks"] == {}


def test_readers_without_a_gradient_are_named() -> None:
    model = Joined().to(WIDE)
    model.head.weight.requires_grad_(False)
    config = dynaprune.PruningConfig(
        target_sparsity=None, block_size=8, interval=1000, observe_every=1, exclude=["side", "head"]
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    pruner = dynaprune.attach(model, optimizer, config, trial=lambda: torch.ones(64))
    loss_of(model, torch.randn(12, 16, 4, 4, dtype=WIDE)).backward()
    optimizer.step()
    scores = pruner.structure.groups.scores(pruner.score)
    assert [s is None for s in scores] == [g.name == "stem" for g in pruner.tracer.current.groups]
    assert pruner.report()["neurons_ranked_by_blocks"] == {"stem": "'head', which reads them, is frozen"}


def test_readers_that_no_optimizer_holds_are_named() -> None:
    model, _, neuron_map = joined()
    body = optimizers_of(model, "body first")[:1]
    groups = GroupScores()
    groups.watch(model, neuron_map, body)
    assert groups.unseen()["stem"] == "no optimizer of the pruner holds 'side', which reads them"


def test_a_scaled_gradient_and_one_that_is_not_finite() -> None:
    model, x, neuron_map = joined()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    score = make_score("second_moment")
    loss_of(model, x).backward()

    def scores(groups: GroupScores, scale: Any = None) -> list[float | None]:
        groups.watch(model, neuron_map, [optimizer])
        groups.observe(model, 0, score, step=1, scale=scale)
        return groups.scores(score)

    watched = GroupScores()
    wanted = scores(watched)
    for p in model.parameters():
        p.grad *= 2.0**10
    assert scores(GroupScores(), torch.tensor(2.0**10)) == pytest.approx(wanted, rel=1e-5)
    model.head.weight.grad.fill_(torch.inf)
    after = scores(watched, torch.tensor(2.0**10))
    for group, old, new in zip(neuron_map.groups, wanted, after, strict=True):
        assert new == pytest.approx(old, rel=1e-5), f"{group.name}: left out, or the same once more"


def test_the_figures_follow_a_cut_and_a_saved_state() -> None:
    """Groups are numbered anew after a cut; those that stay keep what was seen of them."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4)).to(
        WIDE
    )
    x = torch.randn(32, 16, dtype=WIDE)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    config = dynaprune.PruningConfig(target_sparsity=0.5, block_size=8, total_steps=8, interval=4, start=0.0)
    pruner = dynaprune.attach(model, optimizer, config, trial=lambda: 1 + torch.rand(64, generator=None))
    seen: list[Any] = []
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()
    before = pruner.structure.groups.scores(pruner.score)
    groups = pruner.tracer.current.groups
    assert len(groups) == 10 and None not in before
    state = pruner.structure.groups.state_dict()
    assert set(state) == {"0", "2"} and state["0"]["value"].shape == (64,)
    again = GroupScores()
    again.load_state_dict(state)
    again.watch(model, pruner.tracer.current, [optimizer])
    assert again.scores(pruner.score) == before
    gone = torch.zeros(64, dtype=torch.bool)
    gone[groups[3].neurons] = True
    del seen
    plan: Any = type("Plan", (), {"layers": {"0": (gone, torch.zeros(16, dtype=torch.bool))}})()
    again.cut(plan)
    assert torch.equal(again.state_dict()["0"]["value"], state["0"]["value"][~gone])
