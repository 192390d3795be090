"""Scores against their formulas, written out for one block or neuron at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dynaprune.nn import BlockSparseConv1d, BlockSparseConv2d, BlockSparseLayer, BlockSparseLinear
from dynaprune.pruning.observe.score import SCORES, Score, make_score
from dynaprune_kernels import block_saliency, index_check

DECAY = 0.9


def _linear(out: int = 20, inputs: int = 24) -> BlockSparseLinear:
    """float64, ragged in the outputs: 3 x 3 blocks of 8 x 8."""
    return BlockSparseLinear.from_dense(nn.Linear(inputs, out, dtype=torch.float64), 8)


def _step(layer: BlockSparseLayer, score: Score, name: str = "layer") -> Tensor:
    """One training step without an update; the dense gradient of it."""
    x = torch.randn(5, layer.layout.in_features, dtype=torch.float64)
    layer.values.grad = None
    layer(x).sigmoid().square().sum().backward()
    score.observe(name, layer, block_saliency(layer.values, layer.values.grad, layer.layout))
    return layer.to_dense_shape(layer.values.grad)


def _by_block(dense: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """``reduce`` of each 8 x 8 block of a matrix."""
    rows = [torch.stack([reduce(block) for block in row.split(8, 1)]) for row in dense.split(8, 0)]
    return torch.stack(rows)


def _mean(terms: list[Tensor]) -> Tensor:
    """The weighted mean that a bias-corrected exponential mean is."""
    weights = [DECAY ** (len(terms) - 1 - i) for i in range(len(terms))]
    return sum(w * t for w, t in zip(weights, terms, strict=True)) / sum(weights)  # type: ignore[return-value]


PER_STEP: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "second_moment": lambda w, g: (w * g).sum().square(),
    "taylor": lambda w, g: (w * g).abs().sum(),
    "gradient": lambda w, g: g.square().sum(),
}
PER_NEURON: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "second_moment": lambda w, g: (w * g).sum(1).square(),
    "taylor": lambda w, g: (w * g).sum(1).abs(),
    "gradient": lambda w, g: g.square().sum(1),
}


@pytest.mark.parametrize("name", sorted(PER_STEP))
def test_exponential_means_follow_their_formula(name: str) -> None:
    layer, score = _linear(), make_score(name, decay=DECAY)
    weight = layer.weight
    blocks, neurons = [], []
    for _ in range(4):
        grad = _step(layer, score)
        pair = torch.stack([weight, grad])
        rows = [
            torch.stack([PER_STEP[name](*block) for block in row.split(8, 2)]) for row in pair.split(8, 1)
        ]
        blocks.append(torch.stack(rows))
        neurons.append(PER_NEURON[name](weight, grad))
    torch.testing.assert_close(score.scores("layer", layer), _mean(blocks))
    torch.testing.assert_close(score.neuron_scores("layer", layer), _mean(neurons))


def test_movement_accumulates_minus_weight_times_gradient() -> None:
    layer, score = _linear(), make_score("movement")
    products = [layer.weight * _step(layer, score) for _ in range(3)]
    total = -sum(products)
    torch.testing.assert_close(score.scores("layer", layer), _by_block(total, torch.sum))
    torch.testing.assert_close(score.neuron_scores("layer", layer), total.sum(1))


def test_magnitude_is_relative_to_the_layers_live_mean_and_needs_no_observation() -> None:
    layer, score = _linear(), make_score("magnitude")
    dead = torch.zeros(3, 3, dtype=torch.bool)
    dead[1, 2] = True
    layer.layout.release_(dead)
    square = _by_block(layer.weight.square(), torch.sum)
    expected = square / square[~dead].mean()
    torch.testing.assert_close(score.scores("layer", layer)[~dead], expected[~dead])
    with torch.no_grad():
        before = score.scores("layer", layer)
        layer.values.mul_(3)
    torch.testing.assert_close(score.scores("layer", layer), before)
    neurons = layer.weight.square().sum(1)
    torch.testing.assert_close(score.neuron_scores("layer", layer), neurons / neurons.mean())


@pytest.mark.parametrize(
    ("layer", "shape", "dims"),
    [
        (BlockSparseLinear.from_dense(nn.Linear(16, 12), 8), (4, 3, 16), (0, 1)),
        (BlockSparseConv2d.from_dense(nn.Conv2d(8, 12, 3), 8), (2, 8, 6, 5), (0, 2, 3)),
        (BlockSparseConv1d.from_dense(nn.Conv1d(8, 12, 3), 8), (2, 8, 9), (0, 2)),
    ],
    ids=["linear", "conv2d", "conv1d"],
)
def test_activation_frequency_of_training_forwards(
    layer: BlockSparseLayer, shape: tuple[int, ...], dims: tuple[int, ...]
) -> None:
    score = make_score("activation", decay=DECAY)
    score.attach({"layer": layer})
    frequencies = []
    for _ in range(3):
        out = layer(torch.randn(shape))
        frequencies.append((out > 0).float().mean(dims))
    with torch.no_grad():
        layer(torch.randn(shape))
    layer.eval()(torch.randn(shape))
    expected = _mean(frequencies)
    torch.testing.assert_close(score.neuron_scores("layer", layer), expected)
    blocks = score.scores("layer", layer)
    assert blocks.shape == layer.layout.mask.shape
    torch.testing.assert_close(blocks[0], expected[:8].mean().expand(layer.layout.columns))
    torch.testing.assert_close(blocks[1], expected[8:].mean().expand(layer.layout.columns))
    score.detach()
    assert not layer._forward_hooks
    layer.train()


def test_random_scores_differ_by_layer_step_and_seed_and_repeat() -> None:
    layer, saliency = _linear(), None
    score = make_score("random", seed=3)
    first = score.scores("a", layer)
    assert torch.equal(first, make_score("random", seed=3).scores("a", layer))
    others = [score.scores("b", layer), make_score("random", seed=4).scores("a", layer)]
    score.observe("a", layer, saliency)  # type: ignore[arg-type]
    others.append(score.scores("a", layer))
    assert not any(torch.equal(first, other) for other in others)
    assert score.neuron_scores("a", layer).shape == (20,)


@pytest.mark.parametrize("name", sorted(PER_STEP))
def test_a_regrown_block_starts_afresh_with_its_own_bias_correction(name: str) -> None:
    layer, score = _linear(), make_score(name, decay=DECAY)
    for _ in range(5):
        _step(layer, score)
    before = score.scores("layer", layer)
    block = torch.zeros(3, 3, dtype=torch.bool)
    block[0, 1] = True
    score.forget("layer", block)
    fresh = score.scores("layer", layer)
    assert torch.isinf(fresh[0, 1])
    assert torch.equal(fresh[~block], before[~block])
    grad = _step(layer, score)
    expected = PER_STEP[name](layer.weight[:8, 8:16], grad[:8, 8:16])
    torch.testing.assert_close(score.scores("layer", layer)[0, 1], expected)


def test_a_block_that_is_not_live_keeps_its_statistics() -> None:
    layer, score = _linear(), make_score("second_moment", decay=DECAY)
    _step(layer, score)
    before = score.scores("layer", layer)
    block = torch.zeros(3, 3, dtype=torch.bool)
    block[2, 0] = True
    layer.layout.suspend_(block)
    _step(layer, score)
    layer.layout.resume_()
    after = score.scores("layer", layer)
    assert torch.equal(after[block], before[block])
    assert (after[~block] != before[~block]).all()


@pytest.mark.parametrize("name", sorted(SCORES))
def test_statistics_are_sliced_with_the_layer(name: str) -> None:
    layer, score = _linear(24, 24), make_score(name, decay=DECAY)
    score.attach({"layer": layer})
    for _ in range(2):
        _step(layer, score)
    score.detach()
    blocks, neurons = score.scores("layer", layer), score.neuron_scores("layer", layer)
    rows, columns = torch.tensor([0, 2]), torch.tensor([1])
    outputs = torch.tensor([*range(8), *range(16, 24)])
    smaller = BlockSparseLinear.from_dense(nn.Linear(8, 16, dtype=torch.float64), 8)
    with torch.no_grad():
        smaller.values.copy_(smaller.to_slots(layer.weight[outputs][:, 8:16]))
    score.keep("layer", rows, columns, outputs)
    now_blocks, now_neurons = score.scores("layer", smaller), score.neuron_scores("layer", smaller)
    assert now_blocks.shape == (2, 1) and now_neurons.shape == (16,)
    if name in PER_STEP or name == "movement":
        assert torch.equal(now_blocks, blocks[rows][:, columns])
    if name in PER_STEP or name in ("movement", "activation"):
        assert torch.equal(now_neurons, neurons[outputs])
    score.keep("layer", torch.tensor([0]), None)
    tiny = BlockSparseLinear.from_dense(nn.Linear(8, 8, dtype=torch.float64), 8)
    assert score.neuron_scores("layer", tiny).shape == (8,)
    if name in PER_STEP:
        assert torch.equal(score.scores("layer", tiny), blocks[:1, 1:2])
        assert torch.isinf(score.neuron_scores("layer", tiny)).all()


@pytest.mark.parametrize("name", sorted(SCORES))
def test_a_resumed_score_continues_bitwise(name: str) -> None:
    layer, score = _linear(), make_score(name, seed=1, decay=DECAY)
    score.attach({"layer": layer})
    _step(layer, score)
    saved = score.state_dict()
    resumed = make_score(name, seed=5)
    resumed.load_state_dict(saved)
    torch.manual_seed(1)
    _step(layer, score)
    score.detach()
    resumed.attach({"layer": layer})
    torch.manual_seed(1)
    _step(layer, resumed)
    resumed.detach()
    assert torch.equal(score.scores("layer", layer), resumed.scores("layer", layer))
    assert torch.equal(score.neuron_scores("layer", layer), resumed.neuron_scores("layer", layer))


@pytest.mark.parametrize("name", sorted(SCORES))
def test_ranking_reads_no_value_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, score = _linear(), make_score(name)
    score.attach({"layer": layer})
    monkeypatch.setattr(index_check, "readable", lambda _: False)  # as of an index on a device
    monkeypatch.setattr(Tensor, "item", _forbidden)
    monkeypatch.setattr(Tensor, "tolist", _forbidden)
    monkeypatch.setattr(Tensor, "__bool__", _forbidden)
    _step(layer, score)
    score.forget("layer", layer.layout.mask)
    score.scores("layer", layer)
    score.neuron_scores("layer", layer)


def _forbidden(*_: object) -> None:
    raise AssertionError("a score read a value back from the device")


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"activation, gradient, magnitude.*got 'fisher'"):
        make_score("fisher")
    with pytest.raises(ValueError, match=r"decay in \[0, 1\), got 1"):
        make_score("taylor", decay=1)
    with pytest.raises(ValueError, match="'taylor', got that of 'movement'"):
        make_score("taylor").load_state_dict(make_score("movement").state_dict())
    with pytest.raises(TypeError, match="block-sparse layer, got Linear"):
        make_score("second_moment").scores("layer", nn.Linear(8, 8))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gradient, got None"):
        make_score("gradient").observe("layer", _linear(), None)  # type: ignore[arg-type]
