"""Derivatives of every kind, and captures, against a dense twin of the same weights: docs/torch-func.md."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd import functional as twice
from torch.func import (
    functional_call,
    functionalize,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import dynaprune
from dynaprune.nn import BlockSparseLayer, swap_back, swap_layers
from tests.pruning.attached import settings

DOCUMENT = Path(__file__).parents[2] / "docs" / "torch-func.md"
Weights = dict[str, Tensor]
Outputs = Callable[[Weights, Tensor], Tensor]


def network(seed: int = 0) -> nn.Sequential:
    """A convolution, a grouped one and a linear layer, half of whose blocks live, in float64."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(8, 16, 2),
        nn.Tanh(),
        nn.Conv2d(16, 16, 1, groups=2),
        nn.Flatten(),
        nn.Linear(16, 16),
        nn.Tanh(),
        nn.Linear(16, 3),
    ).double()
    swap_layers(model, 8, include=["0", "2", "4"])
    generator = torch.Generator().manual_seed(seed)
    for layer in model:
        if isinstance(layer, BlockSparseLayer):
            order = torch.randperm(layer.layout.blocks, generator=generator)
            layer.layout.update_((order < (layer.layout.blocks + 1) // 2).view_as(layer.layout.mask))
    return model


def weights_of(model: nn.Module) -> Weights:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def batch(seed: int = 1) -> Tensor:
    return torch.randn(3, 8, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sparse(model: nn.Module) -> Outputs:
    return lambda weights, x: functional_call(model, weights, (x,))


def dense(model: nn.Sequential) -> Outputs:
    """The same function of the same values, by torch's own layers."""
    places = {}
    for number, layer in enumerate(model):
        if isinstance(layer, BlockSparseLayer):
            count = torch.arange(1, layer.values.numel() + 1, dtype=torch.float64)
            places[str(number)] = layer.to_dense_shape(count.view_as(layer.values)).long()

    def outputs(weights: Weights, x: Tensor) -> Tensor:
        def weight(name: str) -> Tensor:
            values = weights[f"{name}.values"].flatten()
            return torch.cat([values.new_zeros(1), values])[places[name]]

        x = F.conv2d(x, weight("0"), weights["0.bias"]).tanh()
        x = F.conv2d(x, weight("2"), weights["2.bias"], groups=2).flatten(1)
        x = F.linear(x, weight("4"), weights["4.bias"]).tanh()
        return F.linear(x, weights["6.weight"], weights["6.bias"])

    return outputs


def loss(f: Outputs) -> Callable[[Weights, Tensor], Tensor]:
    return lambda weights, x: f(weights, x).sin().square().sum()


def of_one(f: Outputs, weights: Weights, x: Tensor, name: str = "2.values") -> Callable[[Tensor], Tensor]:
    """The loss as a function of the weight ``name`` alone."""
    return lambda weight: loss(f)({**weights, name: weight}, x)


def directions(weights: Weights) -> Weights:
    return {name: weight.cos() for name, weight in weights.items()}


def reached(f: Outputs, weights: Weights, x: Tensor) -> list[Tensor | None]:
    """Gradients by weights and inputs from backward."""
    leaves = [w.clone().requires_grad_() for w in (*weights.values(), x)]
    loss(f)(dict(zip(weights, leaves, strict=False)), leaves[-1]).backward()
    return [leaf.grad for leaf in leaves]


def penalty(f: Outputs, weights: Weights, x: Tensor) -> tuple[Tensor, ...]:
    leaves = [w.clone().requires_grad_() for w in (*weights.values(), x)]
    named = dict(zip(weights, leaves, strict=False))
    (by_input,) = torch.autograd.grad(loss(f)(named, leaves[-1]), leaves[-1], create_graph=True)
    return torch.autograd.grad((by_input.norm() - 1).square(), leaves, allow_unused=True)


def dual(f: Outputs, weights: Weights, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        twins = {name: forward_ad.make_dual(w, w.cos()) for name, w in weights.items()}
        return forward_ad.unpack_dual(f(twins, forward_ad.make_dual(x, x.cos()))).tangent


def dual_without_gradients(f: Outputs, weights: Weights, x: Tensor) -> Tensor:
    with torch.no_grad():
        return dual(f, weights, x)


def batched_gradients(f: Outputs, weights: Weights, x: Tensor) -> tuple[Tensor, ...]:
    leaves = [w.clone().requires_grad_() for w in weights.values()]
    y = f(dict(zip(weights, leaves, strict=True)), x)
    basis = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
    return torch.autograd.grad(y, leaves, basis, is_grads_batched=True)


def checkpointed(reentrant: bool) -> Callable[[Outputs, Weights, Tensor], Any]:
    def run(f: Outputs, weights: Weights, x: Tensor) -> Any:
        def outputs(named: Weights, rows: Tensor) -> Tensor:
            def of(*leaves: Tensor) -> Tensor:
                return f(dict(zip(named, leaves, strict=False)), leaves[-1])

            return checkpoint(of, *named.values(), rows, use_reentrant=reentrant)

        return reached(outputs, weights, x)

    return run


def saved_on_cpu(f: Outputs, weights: Weights, x: Tensor) -> Any:
    with torch.autograd.graph.save_on_cpu():
        return reached(f, weights, x)


def hessian_of_two(f: Outputs, weights: Weights, x: Tensor) -> Any:
    def of(weight: Tensor, bias: Tensor) -> Tensor:
        return loss(f)({**weights, "2.values": weight, "0.bias": bias}, x)

    return hessian(of, (0, 1))(weights["2.values"], weights["0.bias"])


Derivative = Callable[[Outputs, Weights, Tensor], Any]
DERIVATIVES: dict[str, Derivative] = {
    "torch.func.grad": lambda f, w, x: grad(loss(f), (0, 1))(w, x),
    "torch.func.vjp": lambda f, w, x: vjp(lambda v: f(v, x), w)[1](f(w, x).cos()),
    "torch.func.jacrev": lambda f, w, x: jacrev(f, (0, 1))(w, x),
    "torch.func.jvp": lambda f, w, x: jvp(f, (w, x), (directions(w), x.cos())),
    "torch.func.jacfwd": lambda f, w, x: jacfwd(f, (0, 1))(w, x),
    "torch.func.linearize": lambda f, w, x: linearize(lambda v: f(v, x), w)[1](directions(w)),
    "torch.func.hessian": hessian_of_two,
    "jacrev of jacrev": lambda f, w, x: jacrev(jacrev(of_one(f, w, x)))(w["2.values"]),
    "jacfwd of jacfwd": lambda f, w, x: jacfwd(jacfwd(of_one(f, w, x)))(w["2.values"]),
    "grad of grad of grad": lambda f, w, x: grad(
        lambda a: grad(lambda b: grad(of_one(f, w, x))(b).sin().sum())(a).sin().sum()
    )(w["2.values"]),
    "vmap over inputs": lambda f, w, x: vmap(f, (None, 0))(w, x.unsqueeze(1)),
    "vmap over inputs in another dimension": lambda f, w, x: vmap(f, (None, 2))(
        w, torch.stack([x, x.cos()], 2)
    ),
    "vmap in vmap": lambda f, w, x: vmap(vmap(f, (None, 0)), (None, 0))(w, x[:, None, None]),
    "vmap over biases": lambda f, w, x: vmap(lambda b: f({**w, "4.bias": b, "0.bias": b}, x))(
        torch.stack([w["4.bias"], w["0.bias"]])
    ),
    "vmap of grad: per-sample gradients": lambda f, w, x: vmap(grad(loss(f), (0, 1)), (None, 0))(
        w, x.unsqueeze(1)
    ),
    "vmap of jvp": lambda f, w, x: vmap(lambda t: jvp(of_one(f, w, x), (w["2.values"],), (t,))[1])(
        torch.stack([w["2.values"], w["2.values"].cos()])
    ),
    "torch.autograd.forward_ad": dual,
    "torch.autograd.forward_ad under no_grad": dual_without_gradients,
    "create_graph: a gradient penalty": penalty,
    "is_grads_batched": batched_gradients,
    "torch.autograd.functional.hessian": lambda f, w, x: twice.hessian(of_one(f, w, x), w["2.values"]),
    "torch.autograd.functional.hessian, vectorized": lambda f, w, x: twice.hessian(
        of_one(f, w, x), w["2.values"], vectorize=True
    ),
    "torch.autograd.functional.jvp, vhp and hvp": lambda f, w, x: [
        product(of_one(f, w, x), w["2.values"], w["2.values"].cos())
        for product in (twice.jvp, twice.vhp, twice.hvp)
    ],
    "checkpoint, reentrant": checkpointed(True),
    "checkpoint": checkpointed(False),
    "save_on_cpu": saved_on_cpu,
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_a_derivative_is_that_of_the_dense_twin(name: str) -> None:
    model, x = network(), batch()
    derive, weights = DERIVATIVES[name], weights_of(model)
    torch.testing.assert_close(derive(sparse(model), weights, x), derive(dense(model), weights, x))


def exported(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    batches = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batches},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).run_decompositions({}).module()


CAPTURES: dict[str, Callable[[nn.Module, Tensor], Callable[[Tensor], Any]]] = {
    "torch.export": exported,
    "torch.export, strict": lambda model, x: torch.export.export(model, (x,), strict=True).module(),
    "torch.fx.symbolic_trace": lambda model, x: torch.fx.symbolic_trace(model),
    "make_fx": lambda model, x: make_fx(model)(x),
    "torch.jit.trace": lambda model, x: torch.jit.trace(model, x),
    "torch.compile of torch.func.grad": lambda model, x: torch.compile(
        grad(lambda rows: model(rows).sin().sum()), backend="aot_eager"
    ),
    "torch.compile of per-sample gradients": lambda model, x: torch.compile(
        vmap(grad(lambda row: model(row.unsqueeze(0)).sin().sum())), backend="aot_eager"
    ),
}
PLAIN: dict[str, Callable[[nn.Module], Callable[[Tensor], Any]]] = {
    "torch.compile of torch.func.grad": lambda model: grad(lambda rows: model(rows).sin().sum()),
    "torch.compile of per-sample gradients": lambda model: grad(lambda rows: model(rows).sin().sum()),
}


@pytest.mark.parametrize("name", CAPTURES)
def test_a_capture_computes_what_the_model_does(name: str) -> None:
    torch._dynamo.reset()
    model, x = network(), batch()
    captured = CAPTURES[name](model, x)
    plain = swap_back(network())
    of = PLAIN.get(name, lambda network: network)
    for seed in (2, 3):
        torch.testing.assert_close(captured(batch(seed)), of(plain)(batch(seed)))
    if "jit" not in name and "export" not in name:  # these hold a copy of the layout
        layout = model[4].layout
        layout.update_(layout.mask & (torch.arange(layout.columns) == 0))
        torch.testing.assert_close(captured(x), of(model)(x))


def ensemble(model: nn.Module, x: Tensor) -> Any:
    stacked = stack_module_state([model, network(seed=5)])
    return vmap(lambda p, b: functional_call(model, (p, b), (x,)))(*stacked)


def gradient_of_ensemble(model: nn.Module, x: Tensor) -> Any:
    stacked = {name: torch.stack([w, w]) for name, w in weights_of(model).items()}
    return grad(lambda weights: vmap(sparse(model), (0, None))(weights, x).sum())(stacked)


def adapted(model: nn.Module, x: Tensor) -> Any:
    f, weights = loss(sparse(model)), weights_of(model)

    def after_a_step(row: Tensor) -> Tensor:
        steps = grad(f)(weights, row)
        return f({name: w - 0.1 * steps[name] for name, w in weights.items()}, row)

    return vmap(after_a_step)(x.unsqueeze(1))


class Parent(nn.Module):
    """Reads a layer's weight, as some attention does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, rows: Tensor) -> Tensor:
        return F.linear(rows, self.layer.weight)


def read_by_parent(model: nn.Sequential, x: Tensor) -> Any:
    of = Parent(model[4])
    stacked = {name: torch.stack([w, w]) for name, w in weights_of(of).items()}
    return vmap(lambda w: functional_call(of, w, (x.flatten(1)[:, :16],)))(stacked)


REFUSED: dict[str, tuple[Callable[[nn.Module, Tensor], Any], str]] = {
    "vmap over models: stack_module_state": (ensemble, "block-sparse layers do not run under vmap over"),
    "vmap over weights adapted per task": (adapted, "do not run under vmap over their values.*swap_back"),
    "grad of vmap over weights": (gradient_of_ensemble, "do not run under vmap over their values"),
    "vmap over weights that a parent reads": (read_by_parent, "do not run under vmap over their values"),
    "torch.func.functionalize": (
        lambda model, x: functionalize(model)(x),
        "do not run under torch.func.functionalize: use torch.export",
    ),
    "functionalize of grad": (
        lambda model, x: functionalize(grad(lambda rows: model(rows).sum()))(x),
        "do not run under torch.func.functionalize: use torch.export",
    ),
    "torch.fx.symbolic_trace of weights that a parent reads": (
        lambda model, x: torch.fx.symbolic_trace(Parent(model[4])),
        "read while torch.fx.symbolic_trace runs.*use torch.export",
    ),
    "make_fx of weights that a parent reads": (
        lambda model, x: make_fx(Parent(model[4]))(x.flatten(1)[:, :16]),
        "get value out of a tracing tensor",
    ),
    "torch.jit.trace of weights that a parent reads": (
        lambda model, x: torch.jit.trace(Parent(model[4]), x.flatten(1)[:, :16]),
        "its data is not allocated yet",
    ),
    "torch.jit.script": (
        lambda model, x: torch.jit.script(model),
        r"torch.jit.script cannot compile the block-sparse layer 0: use torch.export",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_what_to_do(name: str) -> None:
    attempt, said = REFUSED[name]
    model = network()
    before = model(batch())
    with pytest.raises(RuntimeError, match=said):
        attempt(model, batch())
    assert torch.equal(model(batch()), before)


def test_the_document_has_a_row_for_every_test_and_no_other() -> None:
    rows = re.findall(r"^\| `?([^`|]+?)`? \| (works|refused) \|", DOCUMENT.read_text(encoding="utf-8"), re.M)
    tested = {**dict.fromkeys([*DERIVATIVES, *CAPTURES], "works"), **dict.fromkeys(REFUSED, "refused")}
    assert dict(rows) == tested and len(rows) == len(tested)


@pytest.mark.parametrize("mode", ["forward_ad", "jvp", "grad", "jacrev"])
def test_derivatives_pass_through_a_weight_that_a_parent_reads(mode: str) -> None:
    parent, rows = Parent(network()[4]), batch().flatten(1)[:, :16]
    layer, values = parent.layer, weights_of(parent)["layer.values"]

    def of(values: Tensor) -> Tensor:
        return functional_call(parent, {"layer.values": values}, (rows,))

    def called(values: Tensor) -> Tensor:
        return functional_call(layer, {"values": values, "bias": torch.zeros_like(layer.bias)}, (rows,))

    def derive(f: Callable[[Tensor], Tensor]) -> Any:
        if mode == "forward_ad":
            with forward_ad.dual_level():
                return forward_ad.unpack_dual(f(forward_ad.make_dual(values, values.cos()))).tangent
        if mode == "jvp":
            return jvp(f, (values,), (values.cos(),))
        return jacrev(f)(values) if mode == "jacrev" else grad(lambda v: f(v).sin().sum())(values)

    torch.testing.assert_close(derive(of), derive(called))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_reads_a_weight_anew(strict: bool) -> None:
    torch._dynamo.reset()
    parent, rows = Parent(network()[4]), batch().flatten(1)[:, :16]
    program = torch.export.export(parent, (rows,), strict=strict).module()
    with torch.no_grad():
        parent.layer.values.mul_(2)
    torch.testing.assert_close(program(rows.cos()), parent(rows.cos()))


@pytest.mark.parametrize("regrow", [0.0, 0.3])
def test_an_attached_pruner_does_not_change_derivatives(regrow: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Linear(32, 2)).double()
    weights, x = weights_of(model), batch().flatten(1)[:, :16]
    of = loss(sparse(model))
    expected = vmap(grad(of), (None, 0))(weights, x.unsqueeze(1))
    pruner = dynaprune.attach(model, torch.optim.SGD(model.parameters(), 0.1), settings(regrow=regrow))
    found = vmap(grad(of), (None, 0))(weights_of(model), x.unsqueeze(1))
    for name, layer in pruner.layers.items():
        found[f"{name}.weight"] = torch.stack([layer.to_dense_shape(g) for g in found.pop(f"{name}.values")])
        assert layer.tap is None or layer.tap.grad is None
    torch.testing.assert_close(found, {name: expected[name] for name in found})
