"""The memory of a training step by kind, beside sums that are worked out by hand."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dynaprune import BlockSparseConv2d, BlockSparseLinear, attach, memory_of_step
from dynaprune.pruning.memory import MemoryByKind
from dynaprune_kernels import _extension
from dynaprune_kernels.backends.cpu import scratch_bytes
from tests.pruning.attached import adam, batch, loss_of, mlp, settings, sparse_layers

COMPILED = pytest.mark.skipif(not _extension.load().loaded, reason=str(_extension.load().reason))


def _convnet() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)),
    )


class _Transformer(nn.Module):
    """One encoder layer over 8 tokens of 32, and a classifier; the positions go through a module alone."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 8, 32))
        self.dropout = nn.Dropout(0.1)
        self.encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.classify = nn.Linear(32 * 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.encoder(x + self.dropout(self.positions)).flatten(1))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (16, 32)),
    "convolutions": (_convnet, (4, 3, 10, 9)),
    "transformer": (_Transformer, (6, 8, 32)),
}


class _Training:
    """A model, its optimizer and one batch; a step keeps its loss."""

    def __init__(self, model: nn.Module, shape: tuple[int, ...]) -> None:
        self.model, self.optimizer = model, torch.optim.AdamW(model.parameters(), lr=1e-3)
        self.x, self.y = torch.randn(shape), torch.randint(0, 4, shape[:1])
        self.losses: list[float] = []

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        self.optimizer.step()
        self.losses.append(float(loss.detach()))


def _training(name: str) -> _Training:
    torch.manual_seed(0)
    build, shape = NETS[name]
    return _Training(build(), shape)


def _saved_bytes(training: _Training) -> int:
    """What the forward pass saves for backward, each storage once, without parameters, buffers and inputs."""
    model = training.model
    others = [*model.parameters(), *model.buffers(), training.x, training.y]
    for layer in sparse_layers(model):
        others += [layer.layout.index, layer.probe]
    known = {each.untyped_storage().data_ptr() for each in others}
    saved: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = nn.functional.cross_entropy(model(training.x), training.y)
        total = sum(size for _, size in saved.values())
    del loss
    return total


def _swap(model: nn.Module) -> nn.Module:
    """Every layer that can, with a checkerboard of live blocks."""
    for module in list(model.modules()):
        kind: Any = {nn.Linear: BlockSparseLinear, nn.Conv2d: BlockSparseConv2d}.get(type(module))
        if kind is not None and min(module.weight.shape[:2]) >= 16:
            rows, columns = module.weight.shape[0] // 16, module.weight[0].numel() // 16
            live = (torch.arange(rows).view(-1, 1) + torch.arange(columns)) % 2 == 0
            kind.from_dense(module, 16, mask=live)
    return model


@pytest.mark.parametrize("sparse", [False, pytest.param(True, marks=COMPILED)])
@pytest.mark.parametrize("name", ["mlp", "convolutions", "transformer"])
def test_weights_gradients_and_state_are_exact_and_activations_are_what_backward_needs(
    name: str, sparse: bool
) -> None:
    training = _training(name)
    if sparse:
        if name == "transformer":  # its encoder reads the weights itself
            training.model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 32))
            training.model.append(nn.Flatten()).append(nn.Linear(32 * 8, 4))
        _swap(training.model)
        training.optimizer = torch.optim.AdamW(training.model.parameters(), lr=1e-3)
    parameters = list(training.model.parameters())
    numbers = sum(each.numel() for each in parameters)
    training.step()
    found = memory_of_step(training.model, training.optimizer, training.step).most
    assert (found.weights, found.gradients) == (4 * numbers, 4 * numbers)
    assert found.optimizer == 2 * 4 * numbers + 4 * len(parameters)  # a step count for each
    assert found.buffers == sum(each.nbytes for each in training.model.buffers())
    assert found.inputs == training.x.nbytes
    index = 0
    for layer in sparse_layers(training.model):
        layout = layer.layout
        index += layout.mask.nbytes + layout.slot_of_block.nbytes + layout.index.nbytes + 1
    assert found.index == index and (index > 0) == sparse
    assert found.pruner == 0
    # Beside what is saved there is the output of a module that the next one reads and nobody saves, and at
    # the end the model's output [rows, 4] and the loss.
    saved, largest = _saved_bytes(training), 4 * max(each.numel() for each in _outputs(training))
    assert saved + 16 * len(training.x) + 4 <= found.activations <= saved + largest + 16 * len(training.x) + 4


def _outputs(training: _Training) -> list[Tensor]:
    """The outputs of all modules in one forward pass."""
    found: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda *given: found.append(given[2]))
        for module in training.model.modules()
    ]
    training.model(training.x)
    for hook in hooks:
        hook.remove()
    return [each for each in found if isinstance(each, Tensor)]


def test_the_peak_of_an_mlp_by_hand() -> None:
    """SGD keeps no state. The most is there when the first layer's weight and bias have their gradients, and
    its dy is still there; activations are at their most when the second ReLU has read its input."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    x, y = batch(0)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    found = memory_of_step(model, optimizer, step)
    row, loss = 4 * 16 * 64, 4
    first, others = 4 * (32 * 64 + 64), 4 * (64 * 64 + 64 + 64 * 4 + 4)
    assert found.most.weights == found.most.gradients == first + others
    assert found.most.activations == 3 * row
    assert found.training_state == 2 * (first + others)
    scratch = found.at_peak.scratch  # of what ran in this process before
    assert found.at_peak == MemoryByKind(
        weights=first + others,
        gradients=others,
        activations=2 * loss,  # and the gradient that backward begins with
        temporaries=first + row,
        inputs=x.nbytes,
        scratch=scratch,
    )
    assert found.peak == 2 * (first + others) + row + 2 * loss + x.nbytes + scratch


@pytest.mark.parametrize("name", NETS)
def test_a_measured_step_is_like_any_other(name: str) -> None:
    reached = []
    for measured in (False, True):
        training = _training(name)
        for number in range(4):
            if measured and number in (0, 2):
                memory_of_step(training.model, training.optimizer, training.step)
            else:
                training.step()
        state = [v for each in training.optimizer.state.values() for v in each.values()]
        tensors = [*training.model.state_dict().values(), *state, torch.get_rng_state()]
        reached.append((training.losses, tensors))
    assert reached[0][0] == reached[1][0]
    assert all(torch.equal(a, b) for a, b in zip(reached[0][1], reached[1][1], strict=True))


def test_nothing_is_left_behind() -> None:
    training = _training("transformer")
    resize, shown = torch.UntypedStorage.resize_, warnings.formatwarning
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory_of_step(training.model, training.optimizer, training.step)
    assert torch.UntypedStorage.resize_ is resize and warnings.formatwarning is shown
    for parameter in training.model.parameters():
        assert not parameter._backward_hooks and not parameter._post_accumulate_grad_hooks
    assert not training.model._forward_pre_hooks
    assert not nn.modules.module._global_forward_pre_hooks and not nn.modules.module._global_forward_hooks

    def fails() -> None:
        training.model(training.x)
        raise KeyError("data")

    with pytest.raises(KeyError, match="data"):
        memory_of_step(training.model, training.optimizer, fails)
    assert torch.UntypedStorage.resize_ is resize and not training.model._forward_pre_hooks
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


def test_a_parameter_may_change_its_shape_afterwards_and_the_model_can_go() -> None:
    training = _training("mlp")
    memory_of_step(training.model, training.optimizer, training.step)
    first, last = training.model[2], training.model[4]  # type: ignore[index]
    first.weight.data, first.bias.data = first.weight.data[:32].clone(), first.bias.data[:32].clone()
    last.weight.data = last.weight.data[:, :32].clone()
    training.optimizer = torch.optim.SGD(training.model.parameters(), lr=0.1)
    training.step()
    parameters = [weakref.ref(each) for each in training.model.parameters()]
    del first, last, training
    gc.collect()
    assert not any(each() is not None for each in parameters)


def test_a_step_may_call_the_model_often_and_recompute_it() -> None:
    training = _training("mlp")
    training.step()
    whole = memory_of_step(training.model, training.optimizer, training.step)
    model, optimizer = training.model, training.optimizer

    def in_parts() -> None:
        optimizer.zero_grad(set_to_none=True)
        for x, y in zip(training.x.chunk(4), training.y.chunk(4), strict=True):
            nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    in_four = memory_of_step(model, optimizer, in_parts)
    assert in_four.most.activations < whole.most.activations / 3
    assert in_four.most.gradients > whole.most.gradients
    assert in_four.training_state == whole.training_state

    def recomputed() -> None:
        optimizer.zero_grad(set_to_none=True)
        output = checkpoint(model[:4], training.x, use_reentrant=False)
        nn.functional.cross_entropy(model[4](output), training.y).backward()
        optimizer.step()

    assert memory_of_step(model, optimizer, recomputed).training_state == whole.training_state

    def twice() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(training.x) + model(-training.x), training.y).backward()
        optimizer.step()

    assert memory_of_step(model, optimizer, twice).most.activations > whole.most.activations


def test_the_first_step_has_no_state_before_its_end() -> None:
    training = _training("mlp")
    first = memory_of_step(training.model, training.optimizer, training.step)
    second = memory_of_step(training.model, training.optimizer, training.step)
    assert first.most.optimizer == second.most.optimizer > 0
    assert first.peak <= second.peak


@COMPILED
def test_scratch_memory_counts_at_the_peak() -> None:
    training = _training("convolutions")
    training.step()
    before = memory_of_step(training.model, training.optimizer, training.step)
    _swap(training.model)
    training.optimizer = torch.optim.AdamW(training.model.parameters(), lr=1e-3)
    training.step()
    found = memory_of_step(training.model, training.optimizer, training.step)
    held, _ = scratch_bytes()
    assert found.at_peak.scratch >= held > 0
    assert found.at_peak.scratch >= before.at_peak.scratch
    assert found.peak == found.at_peak.total


@COMPILED
def test_what_block_sparse_ops_allocate_inside_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense backend builds the whole weight [64, 64] in every op."""
    training = _training("mlp")
    _swap(training.model)
    training.optimizer = torch.optim.SGD(training.model.parameters(), lr=0.1)
    sparse = memory_of_step(training.model, training.optimizer, training.step)
    monkeypatch.setenv("DYNAPRUNE_BACKEND", "dense")
    dense = memory_of_step(training.model, training.optimizer, training.step)
    assert dense.most.activations - sparse.most.activations >= 4 * 64 * 64 / 2
    assert dense.at_peak.weights == sparse.at_peak.weights


def test_statistics_of_the_pruner_stand_apart_and_pruning_goes_on_the_same() -> None:
    reached = []
    for measured in (False, True):
        model = mlp()
        optimizer = adam(model)
        pruner = attach(model, optimizer, settings(regrow=0.1), example_inputs=batch(0)[0])

        def step(number: int, model: nn.Module = model, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad(set_to_none=True)
            loss_of(model, number).backward()
            optimizer.step()

        for number in range(12):
            if not measured:
                step(number)
                continue
            sizes = [
                tensor.nbytes
                for state in pruner.structure.layers.values()
                for tensor in (*state.statistics.values(), state.layer.tap, state.protected_until)
                if tensor is not None
            ]
            found = memory_of_step(model, optimizer, lambda number=number: step(number), pruner=pruner)
            assert found.most.pruner == sum(sizes)
        layers = sparse_layers(model)
        reached.append([*model.state_dict().values(), *(layer.layout.mask for layer in layers)])
        assert pruner.structure_version > 1
    assert all(torch.equal(a, b) for a, b in zip(*reached, strict=True))


def test_a_layer_whose_dense_weight_is_read() -> None:
    training = _training("mlp")
    _swap(training.model)
    layer = sparse_layers(training.model)[0]

    def step() -> None:
        training.optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(training.model(training.x), training.y)
        (loss + layer.weight.square().sum()).backward()

    twin = copy.deepcopy(training.model)
    found = memory_of_step(training.model, training.optimizer, step)
    assert found.most.activations >= 4 * layer.weight.numel()
    assert [p.shape for p in twin.parameters()] == [p.shape for p in training.model.parameters()]


def test_a_model_without_parameters_is_refused() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with pytest.raises(ValueError, match="expected a model with parameters"):
        memory_of_step(nn.ReLU(), optimizer, lambda: None)
