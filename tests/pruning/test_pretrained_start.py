"""A trained network begins sparse: the blocks that matter stay, the others come back as they were."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import dynaprune
from dynaprune.pruning.decide.initial_masks import Grid, initial_masks, scored_order
from dynaprune.pruning.edit.apply import apply
from dynaprune.pruning.observe.block_fisher import block_fisher
from dynaprune_kernels import BlockLayout, ConvGeometry
from tests.pruning.attached import (
    STEPS,
    adam,
    assert_equal,
    batch,
    dense_weights,
    mlp,
    sparse_layers,
    train,
)
from tests.pruning.test_sparse_start import settings
from tests.rounding import agree


def calibration(model: nn.Module) -> Iterator[Tensor]:
    """The loss of each of twelve samples."""
    x, y = batch(50, next(model.parameters()).dtype, rows=12)
    for row in range(len(x)):
        yield nn.functional.cross_entropy(model(x[row : row + 1]), y[row : row + 1])


def test_what_stays_is_better_than_what_goes() -> None:
    """The blocks of the highest scores against those of the lowest, on what the scores come from."""

    def loss_with(keep: str) -> float:
        model = trained()
        layers = {name: model.get_submodule(name) for name in ("0", "2")}
        dynaprune.swap_layers(model, 8, exclude=["4"])
        for name, score in block_fisher(model, layers, calibration).items():
            limit = score.flatten().median()
            layers[name].layout.update_(score > limit if keep == "best" else score <= limit)
        with torch.no_grad():
            return float(torch.stack(list(calibration(model))).mean())

    assert loss_with("best") < loss_with("worst")


def trained() -> nn.Sequential:
    model = mlp()
    train(model, adam(model), 8)
    return model


def saved(model: nn.Module, path: Path, prefix: str = "") -> Path:
    save_file({prefix + key: t.contiguous() for key, t in model.state_dict().items()}, str(path))
    return path


def test_scores_are_mean_squares_of_the_gates() -> None:
    model = trained().double()
    twin = copy.deepcopy(model)
    prepared = dynaprune.prepare(model, settings(initial_sparsity=0.0, target_sparsity=0.5))
    layers = {name: model.get_submodule(name) for name in prepared.swapped}
    before = model[0].values.grad
    model[2].values.grad = torch.ones_like(model[2].values)
    scores = block_fisher(model, layers, calibration)  # type: ignore[arg-type]
    assert (
        torch.equal(model[2].values.grad, torch.ones_like(model[2].values)) and model[0].values.grad is before
    )
    assert all(p.requires_grad for p in model.parameters())
    expected = {name: torch.zeros_like(score) for name, score in scores.items()}
    for loss in calibration(twin):
        twin.zero_grad()
        loss.backward()
        for name in expected:
            weight = twin.get_submodule(name).weight
            gates = (weight * weight.grad).detach().unfold(0, 8, 8).unfold(1, 8, 8).sum((2, 3))
            expected[name] += gates.square() / 12
    assert all(agree(scores[name], expected[name]) for name in expected)


@pytest.mark.parametrize("shape", ["linear", "conv", "groups"])
def test_an_order_by_score_covers_rows_and_channels_first(shape: str) -> None:
    layout = {
        "linear": BlockLayout(40, 90, 8),
        "conv": BlockLayout(32, 24, 8, conv=ConvGeometry(3, 3)),
        "groups": BlockLayout(32, 40, 8, conv=ConvGeometry(3, 2, groups=2)),
    }[shape]
    grid = Grid.of(layout)
    scores = torch.rand(grid.weights.shape, dtype=torch.float64)
    order = scored_order(grid, scores)
    assert sorted(order.blocks.tolist()) == list(range(grid.blocks))
    first = torch.zeros(grid.blocks, dtype=torch.bool)
    first[order.blocks[: order.cover]] = True
    by_group = first.view(layout.groups, layout.rows // layout.groups, layout.taps, -1)
    assert bool(by_group.any(3).any(2).all()) and bool(by_group.any(2).any(1).all())
    assert order.cover <= layout.rows + layout.columns // layout.taps * layout.groups
    rest = scores.view(-1)[order.blocks[order.cover :]]
    assert torch.equal(rest, rest.sort(descending=True).values)
    assert order.scores is not None and torch.equal(order.scores, scores.view(-1)[order.blocks])


def test_global_takes_the_best_of_all_layers() -> None:
    grids = {name: Grid.of(BlockLayout(64, 64, 8)) for name in ("good", "bad")}
    scores = {"good": torch.rand(8, 8, dtype=torch.float64) + 1, "bad": torch.rand(8, 8, dtype=torch.float64)}
    orders = {name: scored_order(grid, scores[name]) for name, grid in grids.items()}
    masks = initial_masks(grids, 0.4, allocation="global", orders=orders)
    assert bool(masks["good"].all()) and int(masks["bad"].sum()) == int(0.6 * 128) - 64
    uniform = initial_masks(grids, 0.5, orders=orders)
    assert [int(mask.sum()) for mask in uniform.values()] == [32, 32]
    with pytest.raises(ValueError, match="'uniform' or 'erk' for random blocks, got 'global'"):
        initial_masks(grids, 0.5, allocation="global")


def test_the_blocks_that_matter_stay_as_they_were() -> None:
    model = trained()
    before = dense_weights(model)
    prepared = dynaprune.prepare(model, settings(), calibration=calibration)
    assert prepared.pretrained is None and sum(prepared.left_out.values()) == 48
    after = dense_weights(model)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new[new != 0], old[new != 0])


@pytest.mark.parametrize("prefix", ["", "part."])
def test_blocks_come_back_with_their_values_from_the_file(tmp_path: Path, prefix: str) -> None:
    model = trained()
    old = dense_weights(model)
    path = saved(model, tmp_path / "model.safetensors", prefix)
    config = settings(target_sparsity=0.6, regrow=0.9)
    prepared = dynaprune.prepare(model, config, calibration=calibration, checkpoint=path)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = dynaprune.attach(prepared, optimizer)
    follower = copy.deepcopy(model)
    pruner.follow(follower)
    never = [layer.layout.mask.clone() for layer in sparse_layers(model)]
    train(model, optimizer)
    assert pruner.report()["blocks_regrown"] > 0
    returned = 0
    for layer, copied, weight, began in zip(
        sparse_layers(model), sparse_layers(follower), (old[0], old[2]), never, strict=True
    ):
        new = layer.layout.mask & ~began
        returned += int(new.sum())
        assert torch.equal(
            layer.to_blocks(layer.weight)[new.flatten()], layer.to_blocks(weight)[new.flatten()]
        )
        assert torch.equal(copied.weight, layer.weight)
    assert returned > 0


def test_a_block_that_was_removed_comes_back_empty(tmp_path: Path) -> None:
    model = trained()
    path = saved(model, tmp_path / "model.safetensors")
    prepared = dynaprune.prepare(model, settings(), calibration=calibration, checkpoint=path)
    pruner = dynaprune.attach(prepared, adam(model))
    layer = sparse_layers(model)[0]
    name = next(iter(pruner.structure.layers))
    mine = torch.zeros_like(layer.layout.mask)
    mine.view(-1)[layer.layout.mask.view(-1).nonzero()[0]] = True
    apply(pruner.structure, [dynaprune.Release({name: mine})])
    apply(pruner.structure, [dynaprune.Grow({name: mine})])
    assert float(layer.to_blocks(layer.weight)[mine.flatten()].abs().max()) == 0
    other = ~layer.layout.mask & ~mine
    apply(pruner.structure, [dynaprune.Release({name: mine})])
    first = torch.zeros_like(other)
    first.view(-1)[other.view(-1).nonzero()[0]] = True
    apply(pruner.structure, [dynaprune.Grow({name: first})])
    assert float(layer.to_blocks(layer.weight)[first.flatten()].abs().max()) > 0


def test_it_resumes_and_keeps_waiting(tmp_path: Path) -> None:
    path = saved(trained(), tmp_path / "model.safetensors")

    def start(checkpoint: Path | None = path) -> tuple[nn.Module, torch.optim.Optimizer, dynaprune.Pruner]:
        model = trained()
        config = settings(target_sparsity=0.7, regrow=0.5)
        prepared = dynaprune.prepare(model, config, calibration=calibration, checkpoint=checkpoint)
        optimizer = adam(model)
        return model, optimizer, dynaprune.attach(prepared, optimizer)

    model, optimizer, pruner = start()
    train(model, optimizer, STEPS // 3)
    states = copy.deepcopy((model.state_dict(), optimizer.state_dict(), pruner.state_dict()))
    train(model, optimizer, 2 * STEPS // 3, STEPS // 3)
    again, optimizer, resumed = start()
    again.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    resumed.load_state_dict(states[2])
    train(again, optimizer, 2 * STEPS // 3, STEPS // 3)
    assert_equal(dense_weights(again), dense_weights(model))
    with pytest.warns(RuntimeWarning, match="grow back as zeros"):
        _, _, without = start(None)
    with pytest.raises(ValueError, match="expected the checkpoint whose blocks grow back"):
        without.load_state_dict(states[2])


def test_the_folder_that_the_configuration_names_is_the_default(tmp_path: Path) -> None:
    model = trained()
    saved(model, tmp_path / "model.safetensors")
    model.config = type("Config", (), {"name_or_path": str(tmp_path)})()
    prepared = dynaprune.prepare(model, settings(), calibration=calibration)
    assert prepared.pretrained is not None
    assert {weight.file for weight in prepared.pretrained.weights.values()} == {
        tmp_path / "model.safetensors"
    }


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    model = trained()
    save_file({"0.weight": model[0].weight.detach()}, str(tmp_path / "a.safetensors"))
    save_file({"2.weight": model[2].weight.detach()}, str(tmp_path / "b.safetensors"))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"0.weight": "a.safetensors", "2.weight": "b.safetensors"}}')
    prepared = dynaprune.prepare(model, settings(), calibration=calibration, checkpoint=tmp_path)
    assert prepared.pretrained is not None
    assert [each.file.name for each in prepared.pretrained.weights.values()] == [
        "a.safetensors",
        "b.safetensors",
    ]
    index.write_text('{"weight_map": []}')
    with pytest.raises(ValueError, match="expected a weight_map of file names"):
        dynaprune.prepare(trained(), settings(), calibration=calibration, checkpoint=tmp_path)


def test_a_layer_that_the_file_does_not_have_is_new_and_comes_back_empty(tmp_path: Path) -> None:
    model = trained()
    path = tmp_path / "model.safetensors"
    save_file({"0.weight": model[0].weight.detach()}, str(path))
    config = settings(target_sparsity=0.6, regrow=0.9)
    with pytest.warns(RuntimeWarning, match="as zeros: those of 2, which the checkpoint does not have"):
        prepared = dynaprune.prepare(model, config, calibration=calibration, checkpoint=path)
    optimizer = adam(model)
    pruner = dynaprune.attach(prepared, optimizer)
    assert prepared.pretrained is not None and set(prepared.pretrained.weights) == {"0"}
    waiting = {name: state.waiting is not None for name, state in pruner.structure.layers.items()}
    assert waiting == {"0": True, "2": False}
    train(model, optimizer)
    assert pruner.report()["blocks_regrown"] > 0
    other = trained()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dynaprune.prepare(other, settings(), calibration=calibration, checkpoint=path)


def test_another_file_is_refused_and_the_model_is_as_it_was(tmp_path: Path) -> None:
    def refused(match: str, checkpoint: Path, **given: Any) -> None:
        model = trained()
        before = dense_weights(model)
        with pytest.raises(ValueError, match=match):
            dynaprune.prepare(
                model, settings(), **{"calibration": calibration, **given}, checkpoint=checkpoint
            )
        assert not sparse_layers(model)
        assert_equal(dense_weights(model), before)

    refused("to be the weight of 0, .*got another one", saved(mlp(), tmp_path / "other.safetensors"))
    narrow = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    refused("got another one of shape", saved(narrow, tmp_path / "narrow.safetensors"))
    refused(
        r"expected 0\.weight in .*got no such tensor", saved(nn.LayerNorm(3), tmp_path / "norm.safetensors")
    )
    refused("expected a safetensors file, or a folder with", tmp_path / "nowhere")
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 40)
    refused("cannot read .* as safetensors", tmp_path / "broken.safetensors")
    refused(
        "yield losses, got none", saved(trained(), tmp_path / "mine.safetensors"), calibration=lambda _: []
    )


def test_a_file_that_changes_later_is_noticed(tmp_path: Path) -> None:
    model = trained()
    path = saved(model, tmp_path / "model.safetensors")
    config = settings(target_sparsity=0.6, regrow=0.9)
    prepared = dynaprune.prepare(model, config, calibration=calibration, checkpoint=path)
    optimizer = adam(model)
    dynaprune.attach(prepared, optimizer)
    saved(mlp(), path)
    with pytest.raises(ValueError, match=r"weight in .*does not agree with its checksum"):
        train(model, optimizer)


def test_wrong_arguments_are_told() -> None:
    with pytest.raises(ValueError, match="expected a checkpoint with a calibration only"):
        dynaprune.prepare(mlp(), settings(), checkpoint="model.safetensors")
    with pytest.raises(TypeError, match="calibration as a function of the model, got list"):
        dynaprune.prepare(mlp(), settings(), calibration=[1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a calibration with an initial_sparsity only"):
        dynaprune.prepare(mlp(), settings(initial_sparsity=0.0), calibration=calibration)
    sparse = mlp()
    dynaprune.prepare(sparse, settings())
    with pytest.raises(ValueError, match="expected a calibration with a model of plain layers"):
        dynaprune.prepare(sparse, settings(), calibration=calibration)
    with pytest.raises(ValueError, match="trained weights, got a model on the meta device"):
        dynaprune.prepare(mlp().to("meta"), settings(), calibration=calibration)
    for wrong in (lambda m: [3.0], lambda m: [torch.zeros(2)], lambda m: [m(batch(0)[0]).sum() * torch.inf]):
        with pytest.raises((TypeError, ValueError), match=r"expected calibration\(model\) to yield"):
            dynaprune.prepare(mlp(), settings(), calibration=wrong)  # type: ignore[arg-type]
