"""Layers whose weight other code reads, or with behaviour of their own: they train as without pruning."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dynaprune
from dynaprune.nn import BlockSparseLayer

WIDTH = 32


class Reader(nn.Module):
    """Two layers and one whose weight a function reads: ``read(module, x)`` takes the place of ``fc(x)``."""

    def __init__(self, read: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(16, WIDTH)
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 4)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        return self.head(self.middle(self.read(self, x)).tanh())


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return grads[0] @ weight, grads[0].t() @ x


READERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "linear": lambda m, x: F.linear(x, m.fc.weight, m.fc.bias),
    "transposed": lambda m, x: F.linear(x, m.fc.weight.t()),
    "matmul": lambda m, x: x @ m.fc.weight,
    "cosine": lambda m, x: F.linear(F.normalize(x, dim=-1), F.normalize(m.fc.weight, dim=-1)),
    "concatenated": lambda m, x: F.linear(x, torch.cat([m.fc.weight[:16], m.fc.weight[16:]])),
    "einsum": lambda m, x: torch.einsum("bi,oi->bo", x, m.fc.weight),
    "fused": lambda m, x: _Fused.apply(x, m.fc.weight),
    "called and read": lambda m, x: m.fc(x) + F.linear(x, m.fc.weight.t()),
    "scaled by its norm": lambda m, x: m.fc(x) / m.fc.weight.norm(),
    "functional call": lambda m, x: torch.addmm(m.fc.bias, x, m.fc.weight.t()),
}


def settings(**changes: Any) -> dynaprune.PruningConfig:
    chosen = {"target_sparsity": 0.5, "block_size": 8, "total_steps": 40, "interval": 5, "neurons": False}
    return dynaprune.PruningConfig(**{**chosen, **changes})


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 16, generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
        optimizer.step()


@pytest.mark.parametrize("read", READERS)
def test_a_layer_whose_weight_is_read_in_the_example_is_exempt_by_name(read: str) -> None:
    model = Reader(READERS[read])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    pruner = dynaprune.attach(model, optimizer, settings(), example_inputs=torch.randn(3, 16))
    assert pruner.exempt["fc"] == "its weight is read by Reader directly"
    assert set(pruner.layers) == {"first", "middle"} and type(model.fc) is nn.Linear
    before = model.fc.weight.detach().clone()
    train(model, optimizer, 40)
    assert not torch.equal(model.fc.weight, before) and pruner.target_reached


def test_asking_for_dtype_device_or_shape_exempts_nothing() -> None:
    def read(m: Any, x: Tensor) -> Tensor:
        weight = m.fc.weight
        assert weight.requires_grad and weight.ndim == 2 and weight.numel() and not weight.is_cuda
        return m.fc(x.to(weight.dtype).to(weight.device).view(-1, weight.shape[1]))

    model = Reader(read)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    pruner = dynaprune.attach(model, optimizer, settings(), example_inputs=torch.randn(3, 16))
    assert "fc" in pruner.layers


def _doubled(layer: Any) -> None:
    plain = layer.forward
    layer.forward = lambda x: 2 * plain(x)


def _wrapped(layer: Any) -> None:
    layer._old_forward = layer.forward
    layer._hf_hook = object()
    layer.forward = functools.update_wrapper(
        functools.partial(lambda m, x: m._old_forward(x) + 1, layer), layer.forward
    )


OWN: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a forward of its own": (_doubled, "forward was replaced on the instance"),
    "accelerate's hook": (_wrapped, r"replaced on the instance \(of accelerate\)"),
    "a call of its own": (
        lambda layer: setattr(layer, "_call_impl", lambda x: nn.Module._call_impl(layer, x) * 3),
        "_call_impl was replaced",
    ),
    "a method bound to it": (
        lambda layer: setattr(layer, "forward", functools.partial(F.linear, weight=layer.weight)),
        "held by a function at fc.forward",
    ),
    "a parameter": (lambda layer: layer.register_parameter("g", nn.Parameter(torch.ones(1))), "its own: g"),
    "a buffer": (lambda layer: layer.register_buffer("mask", torch.ones(1)), "parts of its own: mask"),
    "a module": (lambda layer: layer.add_module("lora", nn.Linear(2, 2)), "parts of its own: lora"),
    "a name that we use": (lambda layer: setattr(layer, "density", 0.5), "block-sparse layer uses: density"),
    "an attribute that we use": (lambda layer: setattr(layer, "values", [1]), "layer uses: values"),
    "a state dict hook": (
        lambda layer: layer.register_state_dict_post_hook(lambda *_: None),
        "hooks on its state dict",
    ),
    "a hook before loading": (
        lambda layer: layer.register_load_state_dict_pre_hook(lambda *_: None),
        "hooks on its state dict",
    ),
    "a gradient hook": (lambda layer: layer.weight.register_hook(lambda g: g * 2), "a gradient hook"),
    "a Parameter of its own kind": (
        lambda layer: layer._parameters.__setitem__("weight", _Quantised(layer.weight.detach())),
        "its weight is a _Quantised",
    ),
}


class _Quantised(nn.Parameter):
    pass


@pytest.mark.parametrize("own", OWN)
def test_a_layer_with_behaviour_of_its_own_stays_as_it_is(own: str) -> None:
    model = Reader(lambda m, x: m.fc(x))
    change, reason = OWN[own]
    change(model.fc)
    attributes, x = dict(vars(model.fc)), torch.randn(3, 16)
    before = model(x).detach()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = dynaprune.attach(model, optimizer, settings())
    assert re.search(reason, pruner.exempt["fc"]), pruner.exempt["fc"]
    assert vars(model.fc) == attributes
    torch.testing.assert_close(model(x), before)


def test_a_class_whose_forward_was_replaced_is_not_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: F.linear(x, self.weight, self.bias) * 2)
    model = Reader(lambda m, x: m.fc(x))
    with pytest.raises(ValueError, match=r"first: nn.Linear's forward was replaced for all layers"):
        dynaprune.attach(model, torch.optim.SGD(model.parameters(), 0.1), settings())


class Elsewhere(nn.Module):
    """Layers that are reached through a list, a dict, a closure, a partial and a bound method."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList(nn.Linear(16, 16) for _ in range(5))
        self.head = nn.Linear(16, 4)
        self.plain = [self.parts[0]]
        self.named = {"second": self.parts[1]}
        third = self.parts[2]
        self.closed = lambda x: third(x).tanh()
        self.partial = functools.partial(self._call, self.parts[3])
        self.bound: Any = self.parts[4].__call__

    def _call(self, layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x).tanh()

    def forward(self, x: Tensor) -> Tensor:
        x = self.named["second"](self.plain[0](x).tanh()).tanh()
        return self.head(self.bound(self.partial(self.closed(x))))


@pytest.mark.parametrize("example", [False, True])
def test_layers_that_are_reached_in_other_ways_are_pruned_and_train(example: bool) -> None:
    model = Elsewhere()
    model.parts[1].lr_scale = 0.1
    objects, x = list(model.parts), torch.randn(3, 16)
    before = model(x).detach()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    pruner = dynaprune.attach(model, optimizer, settings(), example_inputs=x if example else None)
    assert set(pruner.layers) == {f"parts.{i}" for i in range(5)}
    assert all(one is two for one, two in zip(model.parts, objects, strict=True))
    assert isinstance(model.plain[0], BlockSparseLayer) and model.named["second"].lr_scale == 0.1
    torch.testing.assert_close(model(x), before)
    train(model, optimizer, 40)
    assert pruner.target_reached
    after = model(x).detach()
    assert pruner.finalize() is model and all(type(part) is nn.Linear for part in objects)
    torch.testing.assert_close(model(x), after)
    assert model.named["second"].lr_scale == 0.1


def test_a_function_that_holds_the_weight_keeps_its_layer_dense() -> None:
    model: Any = Reader(lambda m, x: m.fast(x))
    model.fast = functools.partial(F.linear, weight=model.fc.weight)
    weight = model.middle.weight
    model.closed = lambda x: F.linear(x, weight)
    pruner = dynaprune.attach(model, torch.optim.SGD(model.parameters(), 0.1), settings())
    assert pruner.exempt["fc"] == "its weight is held by a function at fast"
    assert pruner.exempt["middle"] == "its weight is held by a function at closed"
    assert model(torch.randn(2, 16)).shape == (2, 4)


HOOKS: dict[str, Callable[[Any, list[str]], Any]] = {
    "forward": lambda m, seen: m.register_forward_hook(lambda *_: seen.append("f")),
    "with keywords": lambda m, seen: m.register_forward_hook(lambda *_: seen.append("k"), with_kwargs=True),
    "always": lambda m, seen: m.register_forward_hook(lambda *_: seen.append("a"), always_call=True),
    "before": lambda m, seen: m.register_forward_pre_hook(lambda *_: seen.append("p")),
    "before, with keywords": lambda m, seen: m.register_forward_pre_hook(
        lambda *_: seen.append("q"), with_kwargs=True
    ),
    "backward": lambda m, seen: m.register_full_backward_hook(lambda *_: seen.append("b")),
    "before backward": lambda m, seen: m.register_full_backward_pre_hook(lambda *_: seen.append("c")),
    "before the state dict": lambda m, seen: m.register_state_dict_pre_hook(lambda *_: seen.append("s")),
    "after loading": lambda m, seen: m.register_load_state_dict_post_hook(lambda *_: seen.append("l")),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_of_every_kind_stay(hook: str) -> None:
    model = Reader(lambda m, x: m.fc(x))
    seen: list[str] = []
    handle = HOOKS[hook](model.fc, seen)

    def use() -> int:
        seen.clear()
        model(torch.randn(2, 16)).sum().backward()
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        return len(seen)

    calls = use()
    pruner = dynaprune.attach(model, torch.optim.SGD(model.parameters(), 0.1), settings())
    assert calls > 0 and "fc" in pruner.layers and use() == calls
    pruner.finalize()
    assert use() == calls
    handle.remove()
    assert use() == 0


def _asks_for_the_class(m: Any, x: Tensor) -> Tensor:
    return m.fc(x) if isinstance(m.fc, nn.Linear) else x


def _asks_for_the_exact_class(m: Any, x: Tensor) -> Tensor:
    return m.fc(x) * (2 if type(m.fc) is nn.Linear else 3)


def _counts_parameters(m: Any, x: Tensor) -> Tensor:
    return m.fc(x) * len([n for n, _ in m.named_parameters() if n.endswith("weight")])


@pytest.mark.parametrize("read", [_asks_for_the_class, _asks_for_the_exact_class, _counts_parameters])
def test_a_model_that_computes_something_else_is_put_back_bit_for_bit(
    read: Callable[[Any, Tensor], Tensor],
) -> None:
    model = Reader(read)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    train(model, optimizer, 3)
    model.fc.register_forward_hook(lambda *_: None)
    x = torch.randn(3, 16)
    twin = copy.deepcopy((model, optimizer))
    objects = {name: (p, p.data_ptr(), p.grad) for name, p in model.named_parameters()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    state, hooks = torch.get_rng_state(), list(model.fc._forward_hooks)
    with pytest.raises(ValueError, match=r"its outputs move by .*as they were"):
        dynaprune.attach(model, optimizer, settings(), example_inputs=x)
    assert torch.equal(torch.get_rng_state(), state) and list(model.fc._forward_hooks) == hooks
    assert [type(m) for m in model.modules()] == [type(m) for m in twin[0].modules()]
    for name, parameter in model.named_parameters():
        assert parameter is objects[name][0] and parameter.data_ptr() == objects[name][1]
        assert parameter.grad is objects[name][2]
        assert torch.equal(parameter, twin[0].get_parameter(name))
        assert name not in grads or torch.equal(parameter.grad, grads[name])
    for mine, theirs in zip(optimizer.state.values(), twin[1].state.values(), strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    train(model, optimizer, 3, start=3)
    train(*twin, 3, start=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin[0].parameters(), strict=True))


def test_the_message_names_the_layer_at_which_they_part() -> None:
    with pytest.raises(ValueError, match=r"'fc' is called before only|'fc' is called before, and 'middle'"):
        model = Reader(_asks_for_the_class)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        dynaprune.attach(model, optimizer, settings(), example_inputs=torch.randn(3, 16))


def test_dropout_and_draws_do_not_count_as_another_function() -> None:
    model = Reader(lambda m, x: F.dropout(m.fc(x), 0.5, True) + torch.randn(()))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, state = torch.randn(3, 16), torch.get_rng_state()
    pruner = dynaprune.attach(model, optimizer, settings(), example_inputs=x)
    assert torch.equal(torch.get_rng_state(), state) and "fc" in pruner.layers
