"""Without an example: the first training batch shows whose weight is read elsewhere, and what parts."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dynaprune
from tests.pruning.test_attach_readers import (
    READERS,
    Reader,
    _asks_for_the_class,
    settings,
    train,
)

READ = "fc: its weight is read by Reader directly"


def _trained(model: nn.Module, make: Any, **options: Any) -> Any:
    optimizer = make(model.parameters())
    return dynaprune.attach(model, optimizer, settings(**options)), optimizer


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_that_is_read_is_said_once_and_trains_as_without_pruning(read: str, compiled: bool) -> None:
    if compiled and read not in ("linear", "cosine", "concatenated"):
        return
    torch._dynamo.reset()
    model = Reader(READERS[read])
    plain = copy.deepcopy(model)
    twin = torch.optim.Adam(plain.parameters(), 1e-2)
    called: Any = torch.compile(model, backend="aot_eager") if compiled else model
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    weight = model.fc.weight
    pruner = dynaprune.attach(called, optimizer, settings(interval=10))
    with pytest.warns(RuntimeWarning, match=READ) as said:
        train(called, optimizer, 9)
    assert len([w for w in said if "not pruned" in str(w.message)]) == 1
    train(plain, twin, 9)
    assert type(model.fc) is nn.Linear and model.fc.weight is weight and "fc" in pruner.exempt
    for name, parameter in model.named_parameters():
        other = plain.get_parameter(name.replace("values", "weight"))
        mine = pruner.layers[name[:-7]].weight if name.endswith(".values") else parameter
        torch.testing.assert_close(mine.detach() * 1, other.detach(), rtol=1e-3, atol=1e-5)
    assert optimizer.state[weight]["exp_avg"].shape == weight.shape
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        train(called, optimizer, 31, start=9)
    assert pruner.target_reached and set(pruner.layers) == {"first", "middle"}
    assert pruner.report()["layers"]["fc"]["exempt"] == READ.partition(": ")[2]
    assert type(pruner.finalize()) is type(called)


def test_reads_are_noticed_where_the_models_own_forward_is_not_called() -> None:
    """As in Lightning, whose training step calls parts of the module."""
    module = nn.ModuleDict({"net": Reader(READERS["linear"])})
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    pruner = dynaprune.attach(module, optimizer, settings())
    with pytest.warns(RuntimeWarning, match="net.fc: its weight is read by Reader directly"):
        train(module["net"], optimizer, 1)
    assert "net.fc" in pruner.exempt


def test_a_penalty_outside_of_the_model_keeps_its_layer_pruned_and_gets_its_gradient() -> None:
    model = Reader(lambda m, x: m.fc(x))
    plain = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(each.parameters(), 0.1) for each in (model, plain)]
    pruner = dynaprune.attach(model, optimizers[0], settings(interval=15))
    with pytest.warns(RuntimeWarning, match="layer fc is read in every training step") as said:
        for step in range(8):
            x = torch.randn(4, 16, generator=torch.Generator().manual_seed(step))
            for each, optimizer in zip((model, plain), optimizers, strict=True):
                optimizer.zero_grad()
                (each(x).square().mean() + each.fc.weight.square().sum()).backward()
                optimizer.step()
    assert len(said) == 1 and "fc" in pruner.layers
    torch.testing.assert_close(model.fc.weight.grad * 1, plain.fc.weight.grad)
    torch.testing.assert_close(model.fc.weight.detach() * 1, plain.fc.weight.detach())


@pytest.mark.parametrize("kind", ["followed", "followed tensors", "neither"])
def test_copies_made_before_the_first_step_become_dense_too(kind: str) -> None:
    model = Reader(READERS["linear"])
    pruner, optimizer = _trained(model, lambda p: torch.optim.Adam(p, 1e-2))
    average: Any = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    if kind == "followed":
        pruner.follow(average)
    elif kind == "followed tensors":
        pruner.follow(tensors)
    mean = model.fc.weight.detach().clone()
    with pytest.warns(RuntimeWarning, match=READ):
        train(model, optimizer, 1)
    if kind == "followed tensors":
        assert torch.equal(tensors["fc.weight"], mean) and "fc.layout.slot_of_block" not in tensors
        train(model, optimizer, 39, start=1)
        assert pruner.target_reached
        return
    assert type(average.module.fc) is nn.Linear
    average.update_parameters(model)
    for step in range(1, 40):
        mean = average.module.fc.weight.detach() * 0.9 + model.fc.weight.detach() * 0.1
        train(model, optimizer, 1, start=step)
        if kind == "neither":
            break
        mean = average.module.fc.weight.detach() * 0.9 + model.fc.weight.detach() * 0.1
        average.update_parameters(model)
        torch.testing.assert_close(average.module.fc.weight.detach(), mean)


def test_a_resumed_training_knows_of_the_layer() -> None:
    def start() -> Any:
        model = Reader(READERS["linear"])
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        return model, optimizer, dynaprune.attach(model, optimizer, settings())

    straight, stopped = start(), start()
    with pytest.warns(RuntimeWarning, match=READ):
        train(*straight[:2], 30)
        train(*stopped[:2], 12)
    states = copy.deepcopy([each.state_dict() for each in stopped])
    for order in ([0, 1, 2], [2, 0, 1]):
        resumed = start()
        for index in order:
            resumed[index].load_state_dict(copy.deepcopy(states[index]))
        train(*resumed[:2], 18, start=12)
        assert set(resumed[2].layers) == {"first", "middle"} and resumed[2].exempt == straight[2].exempt
        for name, parameter in straight[0].named_parameters():
            assert torch.equal(parameter, resumed[0].get_parameter(name)), name


def test_a_model_that_computes_something_else_is_made_dense_before_the_first_step() -> None:
    model = Reader(_asks_for_the_class)
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    dynaprune.attach(model, optimizer, settings())
    with pytest.raises(RuntimeError, match=r"its outputs move .*'fc' is called before"):
        train(model, optimizer, 1)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    for name, parameter in plain.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)


def test_a_model_of_which_every_weight_is_read_is_refused() -> None:
    def read(m: Any, x: Tensor) -> Tensor:
        return m.fc(x) / (m.first.weight.norm() + m.fc.weight.norm() + m.middle.weight.norm())

    model = Reader(read)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    dynaprune.attach(model, optimizer, settings())
    with pytest.raises(RuntimeError, match=r"no layer is left: .*first: its weight is read by Reader"):
        train(model, optimizer, 1)
    assert type(model.first) is nn.Linear
    with pytest.raises(ValueError, match=r"got none: first: its weight is read by Reader directly"):
        dynaprune.attach(model, optimizer, settings(), example_inputs=torch.randn(3, 16))


@pytest.mark.parametrize("way", ["accumulated", "closure", "scaled", "two optimizers", "checkpointed"])
def test_the_first_step_may_come_in_any_way(way: str) -> None:
    model = Reader(READERS["linear"])
    groups = [list(model.first.parameters()) + list(model.fc.parameters())]
    groups.append(list(model.middle.parameters()) + list(model.head.parameters()))
    if way == "two optimizers":
        optimizers = [torch.optim.SGD(group, 0.1) for group in groups]
    else:
        optimizers = [torch.optim.SGD(model.parameters(), 0.1)]
    pruner = dynaprune.attach(model, optimizers, settings())

    def backward() -> Tensor:
        x = torch.randn(8, 16)
        if way == "checkpointed":
            y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
        else:
            y = model(x)
        loss = F.cross_entropy(y, x[:, :4].argmax(1))
        loss.backward()
        return loss

    with pytest.warns(RuntimeWarning, match=READ):
        for _ in range(40):
            for each in optimizers:
                each.zero_grad()
            if way == "closure":
                optimizers[0].step(backward)
                continue
            for _ in range(2 if way == "accumulated" else 1):
                backward()
            for each in optimizers:
                each.step()
    assert pruner.target_reached and type(model.fc) is nn.Linear
