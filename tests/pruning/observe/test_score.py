"""Scores against their formulas, written out for one block or neuron at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dynaprune.neurons.cut_plan import Kept
from dynaprune.nn import BlockSparseConv1d, BlockSparseConv2d, BlockSparseLayer, BlockSparseLinear
from dynaprune.pruning.edit.layer_state import LayerState
from dynaprune.pruning.observe.score import Score
from dynaprune.pruning.observe.scores import SCORES, make_score
from dynaprune_kernels import BlockSaliency, block_saliency, index_check

DECAY = 0.9


def _linear(out: int = 20, inputs: int = 24) -> BlockSparseLinear:
    """float64, ragged in the outputs: 3 x 3 blocks of 8 x 8."""
    return BlockSparseLinear.from_dense(nn.Linear(inputs, out, dtype=torch.float64), 8)


def _state(layer: BlockSparseLayer | None = None) -> LayerState:
    return LayerState.of("layer", _linear() if layer is None else layer)


def _step(state: LayerState, score: Score) -> Tensor:
    """One training step without an update; the dense gradient of it."""
    layer = state.layer
    x = torch.randn(5, layer.layout.in_features, dtype=torch.float64)
    layer.values.grad = None
    layer(x).sigmoid().square().sum().backward()
    score.observe(state, block_saliency(layer.values, layer.values.grad, layer.layout))
    state.observations += 1
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
    state, score = _state(), make_score(name, decay=DECAY)
    weight = state.layer.weight
    blocks, neurons = [], []
    for _ in range(4):
        grad = _step(state, score)
        pair = torch.stack([weight, grad])
        rows = [
            torch.stack([PER_STEP[name](*block) for block in row.split(8, 2)]) for row in pair.split(8, 1)
        ]
        blocks.append(torch.stack(rows))
        neurons.append(PER_NEURON[name](weight, grad))
    torch.testing.assert_close(score.scores(state, state.mask), _mean(blocks))
    torch.testing.assert_close(score.neuron_scores(state), _mean(neurons))


def test_movement_accumulates_minus_weight_times_gradient() -> None:
    state, score = _state(), make_score("movement")
    products = [state.layer.weight * _step(state, score) for _ in range(3)]
    total = -sum(products)
    torch.testing.assert_close(score.scores(state, state.mask), _by_block(total, torch.sum))
    torch.testing.assert_close(score.neuron_scores(state), total.sum(1))


def test_magnitude_is_relative_to_the_layers_live_mean_and_needs_no_observation() -> None:
    state, score = _state(), make_score("magnitude")
    dead = torch.zeros(3, 3, dtype=torch.bool)
    dead[1, 2] = True
    state.layer.layout.release_(dead)
    square = _by_block(state.layer.weight.square(), torch.sum)
    expected = square / square[~dead].mean()
    torch.testing.assert_close(score.scores(state, state.mask)[~dead], expected[~dead])
    with torch.no_grad():
        before = score.scores(state, state.mask)
        state.layer.values.mul_(3)
    torch.testing.assert_close(score.scores(state, state.mask), before)
    neurons = state.layer.weight.square().sum(1)
    torch.testing.assert_close(score.neuron_scores(state), neurons / neurons.mean())


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
    state, score = _state(layer), make_score("activation", decay=DECAY)
    score.attach({"layer": state})
    frequencies = []
    for _ in range(3):
        out = layer(torch.randn(shape))
        frequencies.append((out > 0).float().mean(dims))
    with torch.no_grad():
        layer(torch.randn(shape))
    layer.eval()(torch.randn(shape))
    expected = _mean(frequencies)
    torch.testing.assert_close(score.neuron_scores(state), expected)
    blocks = score.scores(state, state.mask)
    assert blocks.shape == layer.layout.mask.shape
    torch.testing.assert_close(blocks[0], expected[:8].mean().expand(layer.layout.columns))
    torch.testing.assert_close(blocks[1], expected[8:].mean().expand(layer.layout.columns))
    score.detach()
    assert not layer._forward_hooks
    layer.train()


def test_random_scores_differ_by_layer_step_and_seed_and_repeat() -> None:
    state, other = _state(), LayerState.of("b", _linear())
    score, again, unlike = (make_score("random", seed=seed) for seed in (3, 3, 4))
    first = score.scores(state, state.mask)
    assert torch.equal(first, again.scores(state, state.mask))
    others = [score.scores(other, other.mask), unlike.scores(state, state.mask)]
    state.observations += 1
    others.append(score.scores(state, state.mask))
    assert not any(torch.equal(first, other) for other in others)
    assert score.neuron_scores(state).shape == (20,)


@pytest.mark.parametrize("name", sorted(PER_STEP))
def test_a_regrown_block_starts_afresh_with_its_own_bias_correction(name: str) -> None:
    state, score = _state(), make_score(name, decay=DECAY)
    for _ in range(5):
        _step(state, score)
    before = score.scores(state, state.mask)
    block = torch.zeros(3, 3, dtype=torch.bool)
    block[0, 1] = True
    state.forget(block)
    fresh = score.scores(state, state.mask)
    assert torch.isinf(fresh[0, 1])
    assert torch.equal(fresh[~block], before[~block])
    grad = _step(state, score)
    expected = PER_STEP[name](state.layer.weight[:8, 8:16], grad[:8, 8:16])
    torch.testing.assert_close(score.scores(state, state.mask)[0, 1], expected)


def test_a_block_that_is_not_live_keeps_its_statistics() -> None:
    state, score = _state(), make_score("second_moment", decay=DECAY)
    _step(state, score)
    before = score.scores(state, state.mask)
    block = torch.zeros(3, 3, dtype=torch.bool)
    block[2, 0] = True
    state.layer.layout.suspend_(block)
    _step(state, score)
    state.layer.layout.resume_()
    after = score.scores(state, state.mask)
    assert torch.equal(after[block], before[block])
    assert (after[~block] != before[~block]).all()


@pytest.mark.parametrize("name", sorted(SCORES))
def test_statistics_are_sliced_with_the_layer(name: str) -> None:
    state, score = _state(_linear(24, 24)), make_score(name, decay=DECAY)
    score.attach({"layer": state})
    for _ in range(2):
        _step(state, score)
    score.detach()
    blocks, neurons = score.scores(state, state.mask), score.neuron_scores(state)
    rows, columns = torch.tensor([0, 2]), torch.tensor([1])
    outputs = torch.tensor([*range(8), *range(16, 24)])
    smaller = BlockSparseLinear.from_dense(nn.Linear(8, 16, dtype=torch.float64), 8)
    with torch.no_grad():
        smaller.values.copy_(smaller.to_slots(state.layer.weight[outputs][:, 8:16]))
    state.keep(Kept(rows, columns, outputs))
    state.layer = smaller
    now_blocks, now_neurons = score.scores(state, state.mask), score.neuron_scores(state)
    assert now_blocks.shape == (2, 1) and now_neurons.shape == (16,)
    if name in PER_STEP or name == "movement":
        assert torch.equal(now_blocks, blocks[rows][:, columns])
    if name in PER_STEP or name in ("movement", "activation"):
        assert torch.equal(now_neurons, neurons[outputs])
    # A layer that has changed its size in another way starts afresh.
    state.layer = BlockSparseLinear.from_dense(nn.Linear(8, 8, dtype=torch.float64), 8)
    assert score.neuron_scores(state).shape == (8,)
    if name in PER_STEP:
        assert torch.isinf(score.scores(state, state.mask)).all()
        assert torch.isinf(score.neuron_scores(state)).all()


@pytest.mark.parametrize("name", sorted(SCORES))
def test_a_resumed_score_continues_bitwise(name: str) -> None:
    state, score = _state(), make_score(name, seed=1, decay=DECAY)
    score.attach({"layer": state})
    _step(state, score)
    resumed = make_score(name, seed=5)
    resumed.load_state_dict(score.state_dict())
    resumed_state = _state(state.layer)
    resumed_state.observations = state.observations
    resumed_state.statistics = {key: tensor.clone() for key, tensor in state.statistics.items()}
    torch.manual_seed(1)
    _step(state, score)
    score.detach()
    resumed.attach({"layer": resumed_state})
    torch.manual_seed(1)
    _step(resumed_state, resumed)
    resumed.detach()
    assert torch.equal(score.scores(state, state.mask), resumed.scores(resumed_state, resumed_state.mask))
    assert torch.equal(score.neuron_scores(state), resumed.neuron_scores(resumed_state))


def test_a_score_of_ones_own_needs_three_members() -> None:
    class Fewest(Score):
        """The number of live blocks in the row."""

        name = "fewest"

        def observe(self, layer: LayerState, saliency: BlockSaliency) -> None:
            pass

        def scores(self, layer: LayerState, live: Tensor) -> Tensor:
            return live.sum(1, keepdim=True).expand(live.shape).float()

    state, score = _state(), make_score(Fewest())
    live = state.mask.clone()
    live[1, 0] = False
    assert score.scores(state, live).tolist() == [[3] * 3, [2] * 3, [3] * 3]
    assert score.neuron_scores(state).tolist() == [9] * 20  # the row's blocks, 3 of 3 each
    assert not score.of_gates and score.state_dict() == {}


@pytest.mark.parametrize("name", sorted(SCORES))
def test_ranking_reads_no_value_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state, score = _state(), make_score(name)
    score.attach({"layer": state})
    monkeypatch.setattr(index_check, "readable", lambda _: False)  # as of an index on a device
    monkeypatch.setattr(Tensor, "item", _forbidden)
    monkeypatch.setattr(Tensor, "tolist", _forbidden)
    monkeypatch.setattr(Tensor, "__bool__", _forbidden)
    _step(state, score)
    state.forget(state.mask)
    score.scores(state, state.mask)
    score.neuron_scores(state)


def _forbidden(*_: object) -> None:
    raise AssertionError("a score read a value back from the device")


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"activation, gradient, magnitude.*got 'fisher'"):
        make_score("fisher")
    with pytest.raises(ValueError, match=r"decay in \[0, 1\), got 1"):
        make_score("taylor", decay=1)
    with pytest.raises(TypeError, match="got object without name, observe, scores"):
        make_score(object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gradient, got None"):
        make_score("gradient").observe(_state(), None)  # type: ignore[arg-type]
