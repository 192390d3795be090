"""Drop and grow: which blocks change places, what stays as it was, and the removals that come after it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynaprune
from dynaprune.pruning.decide.drop_and_grow import DropAndGrow
from dynaprune.pruning.decide.growth import growth_fraction
from tests.pruning.attached import (
    adam,
    assert_equal,
    batch,
    dense_weights,
    loss_of,
    mlp,
    sparse_layers,
    train,
)
from tests.pruning.attached import settings as attached_settings
from tests.pruning.rewire_reference import Masked, probed, swap

TOTAL, INTERVAL = 48, 3
UNTIL = 36  # 75% of it; the last event is one interval before


def settings(**changes: Any) -> dynaprune.PruningConfig:
    """Half of the blocks live; 30% of these change places at first, at every third step."""
    given = {"initial_sparsity": 0.5, "target_sparsity": 0.5, "rewire": 0.3, "total_steps": TOTAL}
    return attached_settings(**{**given, "interval": INTERVAL, **changes})


def masks(model: nn.Module) -> list[Tensor]:
    return [layer.layout.mask.clone() for layer in sparse_layers(model)]


class Images(nn.Module):
    """Convolutions, one of them strided and one in groups with a ragged edge, before a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first = nn.Conv2d(3, 24, 3, padding=1)
        self.second = nn.Conv2d(24, 32, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(32, 16, (1, 3), padding=(0, 1), groups=2)
        self.wide, self.last = nn.Linear(16, 40), nn.Linear(40, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 3, 4, 4)
        x = self.grouped(self.second(self.first(x).relu()).relu()).relu()
        return self.last(self.wide(x.mean((2, 3))).relu())


def flat() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 4))


def rows_of_48(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(12, 48, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return x, x[:, :4].argmax(1)


@pytest.mark.parametrize("score", ["second_moment", "magnitude"])
@pytest.mark.parametrize("growth", ["gradient", "random"])
@pytest.mark.parametrize("build", [flat, Images])
def test_masks_are_those_of_dense_tensors_swapped_one_block_at_a_time(
    build: Callable[[], nn.Module], growth: str, score: str
) -> None:
    def made(network: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)

    model = build().double()
    config = settings(
        rewire_growth=growth,
        rewire_score=None if score == "second_moment" else score,
        sparse_learning_rate=1.0,
        seed=3,
    )
    prepared = dynaprune.prepare(model, config)
    dense = dynaprune.swap_back(copy.deepcopy(model))
    layers = dict(prepared.model.named_modules())
    known = [
        Masked.of(name, dense.get_submodule(name), layers[name].layout.mask) for name in prepared.swapped
    ]
    optimizer, dense_optimizer = made(model), made(dense)
    dynaprune.attach(prepared, optimizer)
    swapped = 0
    for step in range(1, TOTAL + 1):
        x, y = rows_of_48(step)
        for network, by in ((model, optimizer), (dense, dense_optimizer)):
            by.zero_grad()
            nn.functional.cross_entropy(network(x), y).backward()
            if network is dense:
                probes = {each.name: probed(each) for each in known}
                for each in known:
                    each.observe()
            by.step()
        if step % INTERVAL == 0 and step < UNTIL:
            for each in known:
                swapped += swap(
                    each,
                    probes[each.name],
                    dense_optimizer,
                    step,
                    0.15 * (1 + math.cos(math.pi * step / UNTIL)),
                    INTERVAL,
                    growth=growth,
                    kind=score,
                    seed=3,
                )
        for each in known:
            mask = layers[each.name].layout.mask
            assert {(r, c) for r, c in mask.nonzero().tolist()} == each.live, f"{each.name}, step {step}"
            found = layers[each.name].to_dense_shape(layers[each.name].values)
            expected = each.layer.weight.detach()
            assert (found - expected).norm() <= 1e-11 * expected.norm(), f"{each.name}, step {step}"
    assert swapped > 30


def test_the_number_of_blocks_stays_and_every_row_keeps_one() -> None:
    model = mlp()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings())
    counts, before, events = [m.sum(1) for m in masks(model)], masks(model), []
    for step in range(1, TOTAL + 1):
        train(model, optimizer, 1, step)
        now = masks(model)
        if any(not torch.equal(a, b) for a, b in zip(before, now, strict=True)):
            events.append(step)
        for layer, count, mask in zip(sparse_layers(model), counts, now, strict=True):
            assert int(mask.sum()) == int(count.sum()) == layer.layout.capacity == layer.values.shape[0]
            assert bool(mask.any(1).all())
        before = now
    assert set(events) <= set(range(INTERVAL, UNTIL, INTERVAL)) and len(events) > 6
    assert pruner.compactions == 0 and pruner.target_reached and pruner.structure_final
    report = pruner.report()
    assert report["blocks_swapped"] > 20 and report["blocks_removed"] == report["blocks_regrown"] == 0
    assert report["removed_untested"] == report["trials"]["count"] == 0 and len(report["history"]) == 1
    assert all(layer.tap is None and not layer.probe for layer in sparse_layers(model))


def test_the_share_is_a_cosine_that_ends() -> None:
    model = mlp()
    optimizer = adam(model)
    pruner = dynaprune.attach(
        model, optimizer, settings(rewire=0.2, rewire_until=0.5, rewire_growth="random")
    )
    swapped = [0]
    for step in range(1, TOTAL + 1):
        train(model, optimizer, 1, step)
        swapped.append(pruner.ledger.swapped)
    each = [swapped[step] - swapped[step - 1] for step in range(1, TOTAL + 1)]
    expected = [
        sum(math.floor(growth_fraction(step, 24, 0.2) * live + 1e-9) for live in (16, 32))
        if step % INTERVAL == 0 and step < 24
        else 0
        for step in range(1, TOTAL + 1)
    ]
    assert each == expected and max(each) == each[2] and swapped[-1] > 20
    assert pruner.policy.ended(21) and not pruner.policy.ended(20)


def test_what_stays_keeps_its_weights_and_its_optimizer_state() -> None:
    model = mlp()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings())
    train(model, optimizer, INTERVAL - 1)
    layers = pruner.layers
    optimizer.zero_grad()
    loss_of(model, 7).backward()
    seen: dict[str, Any] = {}

    # The pruner's own hook ran first: put one in front of it.
    def before_the_event(*_: Any) -> None:
        for name, layer in layers.items():
            state = optimizer.state[layer.values]
            tensors = {"values": layer.values.detach(), "m": state["exp_avg"], "v": state["exp_avg_sq"]}
            seen[name] = layer.layout.mask.clone(), {k: layer.to_dense_shape(t) for k, t in tensors.items()}

    hook = optimizer.register_step_post_hook(before_the_event)
    optimizer._optimizer_step_post_hooks.move_to_end(hook.id, last=False)
    optimizer.step()
    assert pruner.ledger.swapped > 0
    for name, layer in layers.items():
        mask, dense = seen[name]
        state = optimizer.state[layer.values]
        now = layer.layout.mask
        stayed, born = mask & now, now & ~mask
        assert born.any() and stayed.any()
        tensors = {"values": layer.values.detach(), "m": state["exp_avg"], "v": state["exp_avg_sq"]}
        for key, tensor in tensors.items():
            after = layer.to_blocks(layer.to_dense_shape(tensor))
            was = layer.to_blocks(dense[key])
            assert torch.equal(after[stayed.view(-1)], was[stayed.view(-1)]), key
            new = after[born.view(-1)]
            if key == "v":
                torch.testing.assert_close(new, was[stayed.view(-1)].mean().expand_as(new))
            else:
                assert not new.any(), key


def test_an_average_that_follows_is_the_dense_average() -> None:
    model = mlp()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings())
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    pruner.follow(average)
    layers = pruner.layers
    dense = {name: layer.to_dense_shape(layer.values) for name, layer in layers.items()}
    for step in range(TOTAL):
        was = {name: layer.layout.mask.clone() for name, layer in layers.items()}
        train(model, optimizer, 1, step)
        for name, parameter in model.named_parameters():
            average[name].lerp_(parameter.detach(), 0.1)
        for name, layer in layers.items():
            stayed = (was[name] & layer.layout.mask).repeat_interleave(8, 0).repeat_interleave(8, 1)
            dense[name] = 0.9 * dense[name] * stayed + 0.1 * layer.to_dense_shape(layer.values)
            torch.testing.assert_close(layer.to_dense_shape(average[f"{name}.values"]), dense[name])
    assert pruner.ledger.swapped > 40


@pytest.mark.parametrize("compiled", [False, True])
def test_a_planted_outlier_among_the_inputs_gets_no_advantage(compiled: bool) -> None:
    """One block of inputs is a hundred times larger, noise that has nothing to do with the classes."""

    def born_on_the_outlier(by_inputs: bool) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        config = settings(initial_sparsity=0.8, target_sparsity=0.8, block_size=8, sparse_learning_rate=1.0)
        pruner = dynaprune.attach(model, optimizer, config)
        layer: Any = model[0]
        layer.enable_tap_(inputs=by_inputs)
        before = layer.layout.mask.clone()
        run: Any = torch.compile(model, backend="aot_eager") if compiled else model
        for step in range(INTERVAL):
            x = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
            y = x[:, :4].argmax(1)
            x[:, 40:48] *= 100
            optimizer.zero_grad()
            nn.functional.cross_entropy(run(x), y).backward()
            optimizer.step()
        born = pruner.layers["0"].layout.mask & ~before
        assert int(born.sum()) == 3
        return float(born[:, 5].sum()) / 3

    assert born_on_the_outlier(by_inputs=False) == 1.0
    assert born_on_the_outlier(by_inputs=True) < 1.0


def test_the_share_of_blocks_that_ever_lived_only_grows() -> None:
    model = mlp()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings(rewire_growth="random"))
    lived, shares = masks(model), []
    for step in range(TOTAL):
        train(model, optimizer, 1, step)
        lived = [a | b for a, b in zip(lived, masks(model), strict=True)]
        shares.append(pruner.report()["blocks_ever_lived"]["share"])
    told = pruner.report()["blocks_ever_lived"]
    assert told["layers"] == {"0": float(lived[0].float().mean()), "2": float(lived[1].float().mean())}
    assert told["share"] == shares[-1] == sum(int(m.sum()) for m in lived) / 96 > 0.75
    assert shares[0] == 0.5 and shares == sorted(shares)
    whole = mlp()
    assert dynaprune.attach(whole, adam(whole), attached_settings()).report()["blocks_ever_lived"] == {
        "share": 1.0,
        "layers": {"0": 1.0, "2": 1.0},
    }


@pytest.mark.parametrize("tested", [False, True])
def test_removals_come_after_rewiring_and_only_these_are_tested(tested: bool) -> None:
    model = mlp()
    optimizer = adam(model)
    x, y = batch(99, rows=512)
    calls: list[int] = []

    def trial() -> Tensor:
        calls.append(pruner.steps)
        return nn.functional.cross_entropy(model(x), y, reduction="none")

    config = settings(target_sparsity=0.75, total_steps=120)
    pruner = dynaprune.attach(model, optimizer, config, trial=trial if tested else None)
    live = []
    for step in range(120):
        train(model, optimizer, 1, step)
        live.append(sum(int(mask.sum()) for mask in masks(model)))
    assert set(live[:90]) == {48} and live[-1] == 24 and pruner.target_reached
    report = pruner.report()
    removed = [report[f"removed_{why}"] for why in ("passed", "forced", "untested")]
    assert sum(removed) == report["blocks_removed"] == 24 and (removed[2] == 0) == tested
    assert report["blocks_swapped"] > 40 and report["blocks_regrown"] == 0
    assert report["blocks_total"] == 96 and report["blocks_never_present"] == 48
    assert (min(calls) > 90) if tested else not calls
    assert not any(layer.probe for layer in sparse_layers(model))
    first = next(i for i, count in enumerate(live) if count < 48) + 1
    assert 90 < first <= 108, "removals end at 60% of what rewiring leaves"
    assert [row["step"] for row in report["history"]][:2] == [0, first]


def test_gradients_are_measured_in_the_steps_before_an_event_only() -> None:
    model = mlp()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings(target_sparsity=0.75, total_steps=120))
    probed_steps = []
    for step in range(1, 121):
        if any(bool(layer.probe) for layer in sparse_layers(model)):
            probed_steps.append(step)
        train(model, optimizer, 1, step)
    assert probed_steps == list(range(INTERVAL, 90, INTERVAL))
    assert pruner.report()["target_reached"]


@pytest.mark.parametrize("stop", [8, 9, 40])
@pytest.mark.parametrize("growth", ["gradient", "random"])
def test_a_resumed_training_goes_on_bit_for_bit(growth: str, stop: int) -> None:
    def start(seed: int = 0) -> dict[str, Any]:
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        config = settings(target_sparsity=0.75, rewire_growth=growth, seed=seed, observe_every=None)
        return {"model": model, "optimizer": optimizer, "pruner": dynaprune.attach(model, optimizer, config)}

    whole, resumed = start(), start()
    train(whole["model"], whole["optimizer"], stop)
    saved = copy.deepcopy({name: part.state_dict() for name, part in whole.items()})
    train(whole["model"], whole["optimizer"], TOTAL - stop, stop)
    for name, state in saved.items():
        resumed[name].load_state_dict(state)
    train(resumed["model"], resumed["optimizer"], TOTAL - stop, stop)
    assert_equal(dense_weights(resumed["model"]), dense_weights(whole["model"]))
    reports = [each["pruner"].report() for each in (whole, resumed)]
    for report in reports:
        del report["observing"], report["trials"]
    assert reports[0] == reports[1]


def test_a_compiled_model_is_not_compiled_anew_by_swaps() -> None:
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    model = mlp()
    given: Any = torch.compile(model, backend=backend, fullgraph=True)
    optimizer = adam(model)
    config = settings(neurons=True)
    pruner = dynaprune.attach(given, optimizer, config, example_inputs=batch(0)[0])
    compiled = 0
    for step in range(UNTIL - INTERVAL):
        assert not pruner.nothing_left()
        optimizer.zero_grad()
        loss_of(given, step).backward()
        optimizer.step()
        compiled = len(graphs) if step == 1 else compiled
    assert pruner.ledger.swapped > 40 and len(graphs) == compiled <= 2, "one more as tokens are counted"
    torch._dynamo.reset()


def test_neurons_that_nobody_reads_are_cut_once_rewiring_has_ended() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = adam(model)
    config = settings(initial_sparsity=0.8, target_sparsity=0.8, rewire=0.9, neurons=True, seed=1)
    pruner = dynaprune.attach(model, optimizer, config, example_inputs=batch(0)[0])
    width = model[0].layout.out_features
    ever_unread: set[int] = set()
    for step in range(TOTAL):
        before = model[2].layout.mask.any(0)
        train(model, optimizer, 1, step)
        if step + 1 < UNTIL - INTERVAL:
            assert pruner.ledger.neurons == 0
            ever_unread |= set((~model[2].layout.mask.any(0)).nonzero().flatten().tolist())
            unread = 8 * int((~before).sum())
    report = pruner.report()
    assert report["neurons_removed"] == unread == 8 and len(ever_unread) > 1, "others came to life again"
    assert bool(model[2].layout.mask.any(0).all())
    assert model[0].layout.out_features == width - 8 and report["blocks_removed_with_neurons"] > 0


def test_edge_blocks_change_the_share_of_weights_but_not_the_target() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings(rewire=0.9, rewire_growth="random"))
    for step in range(TOTAL):
        x = torch.randn(16, 33, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
        optimizer.step()
    report = pruner.report()
    densities = [row["sparsity"] for row in report["history"]]
    assert len(set(densities)) > 1 and report["target_reached"] and report["blocks_removed"] == 0


def test_settings_that_do_not_fit() -> None:
    def refused(said: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=said):
            settings(**changes)

    refused(r"rewire in \[0, 1\), got 1.0", rewire=1.0)
    refused("rewire_growth to be one of gradient, random, got 'luck'", rewire_growth="luck")
    refused("rewire_score to be one of magnitude, random, got 'taylor'", rewire_score="taylor")
    refused(r"rewire_until in \(0, 1\), got 1", rewire_until=1)
    refused("rewire or regrow, got 0.3 and 0.2", target_sparsity=0.75, regrow=0.2)
    refused(r"end <= 0.9, got start 0.05 and end 0.95", end=0.95)
    refused("rewire=0 with units='neurons'", units="neurons", initial_sparsity=0.0, neurons=True)
    assert settings(end=0.9).rewiring.span(0.05, 0.9) == (0.75, 0.9)
    assert settings().rewiring.span(0.05, 0.5) == (0.75, 0.9)
    assert settings(rewire_until=0.3).rewiring.span(0.05, 0.5) == (0.3, 0.5)
    with pytest.raises(ValueError, match=r"0 <= start < end <= 0\.6, got start 0\.05 and end 0\.9"):
        settings(rewire=0.0, end=0.9)
    with pytest.raises(ValueError, match="fewer than the 36 steps of rewiring, got 36"):
        model = mlp()
        dynaprune.attach(model, adam(model), settings(interval=36))
    with pytest.raises(ValueError, match="total_steps beside rewire"):
        model = mlp()
        dynaprune.attach(model, adam(model), settings(total_steps=None))
    with pytest.raises(ValueError, match=r"blocks that are missing beside rewire=0.3.*regrow"):
        model = mlp()
        dynaprune.attach(model, adam(model), settings(initial_sparsity=0.0))


def test_the_old_name_of_the_component_goes_on() -> None:
    old = dynaprune.PruningConfig(regrowth=dynaprune.Regrowth(0.2), total_steps=10)
    assert old == dynaprune.PruningConfig(rewiring=dynaprune.Rewiring(regrow=0.2), total_steps=10)
    assert old.regrow == old.regrowth.regrow == 0.2 and old.regrowth == dynaprune.Regrowth(0.2)
    with pytest.raises(TypeError, match="expected regrowth as a Rewiring, got float"):
        dynaprune.PruningConfig(regrowth=0.2)


def test_the_default_interval_is_a_hundred_steps_or_twenty_events() -> None:
    for steps, interval in ((100, 3), (1000, 37), (100_000, 100)):
        model = mlp()
        pruner = dynaprune.attach(model, adam(model), settings(interval=None, total_steps=steps))
        assert isinstance(pruner.policy, DropAndGrow) and pruner.policy.interval == interval
