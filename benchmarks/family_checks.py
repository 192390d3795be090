"""What one family goes through in ``benchmarks.families``: every step compared with a dense reference."""

from __future__ import annotations

import copy
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import dynaprune
from benchmarks.family_models import Family
from dynaprune.neurons.groups import widths_of
from dynaprune.nn import BlockSparseLayer, swap_back
from dynaprune.pruning.edit import apply

BATCH, CALIBRATION, STEPS, TWIN_STEPS = 8, 32, 30, 12
TARGET, BLOCK = 0.6, 8
# Relative to the norm of the outputs, or of a weight's change in a step. float32 networks of a few
# layers differ by a few 1e-6 where only the order of sums changes; a small change is rounded with its weight.
SAME_FUNCTION, SAME_TRAINING = 1e-4, {torch.float64: 1e-6, torch.float32: 2e-2}
NO_CHANGE = 1e-5


class Outcome(NamedTuple):
    """What became of a family; ``reason`` of a refusal or of what went wrong.

    ``cut``: which layers lost outputs. ``not_cut``: why others kept theirs.
    """

    verdict: str
    reason: str
    swapped: float = 0.0
    sparsity: float = 0.0
    neurons: int = 0
    cut: str = ""
    not_cut: str = ""


class Rows(Dataset[tuple[dict[str, Tensor], Tensor]]):
    """Fixed random inputs, and targets of the shape of the model's outputs."""

    def __init__(self, family: Family, model: nn.Module, count: int) -> None:
        self.inputs = family.inputs(count)
        with torch.no_grad():
            shape = outputs(model, {key: value[:2] for key, value in self.inputs.items()}).shape[1:]
        self.targets = torch.randn(count, *shape)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        return {key: value[index] for key, value in self.inputs.items()}, self.targets[index]

    def double(self) -> Rows:
        """The same rows in float64."""
        twin = copy.copy(self)
        twin.inputs = {k: v.double() if v.is_floating_point() else v for k, v in self.inputs.items()}
        twin.targets = self.targets.double()
        return twin

    def batch(self, step: int) -> tuple[dict[str, Tensor], Tensor]:
        """``BATCH`` rows, others at each step."""
        rows = torch.arange(step * BATCH, (step + 1) * BATCH) % len(self)
        return {key: value[rows] for key, value in self.inputs.items()}, self.targets[rows]


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The first tensor of what the model returns: the logits."""
    found = model(**inputs)
    if isinstance(found, Tensor):
        return found
    return found["logits"] if "logits" in found else next(iter(found.values()))


def losses(model: nn.Module, batch: tuple[dict[str, Tensor], Tensor]) -> Tensor:
    """One loss per sample."""
    inputs, targets = batch
    return (outputs(model, inputs) - targets).square().flatten(1).mean(1)


def evaluated(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Outputs in evaluation mode; the mode stays as it was."""
    training = model.training
    model.eval()
    with torch.no_grad():
        found = outputs(model, inputs)
    model.train(training)
    return found


def distance(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected; infinite where one is not finite."""
    error = (found - expected).double().norm() / expected.double().norm().clamp_min(1e-30)
    return float(error) if bool(torch.isfinite(error)) else float("inf")


def settings(**changes: Any) -> dynaprune.PruningConfig:
    chosen: dict[str, Any] = {
        "target_sparsity": TARGET,
        "block_size": BLOCK,
        "total_steps": STEPS,
        "interval": 3,
        "end": 0.6,
        "observe_every": 1,
        "absolute_tolerance": 1.0,
        "allowance": 100.0,
        "classes": 2,
    }
    return dynaprune.PruningConfig(**{**chosen, **changes})


class Wrong(Exception):
    """An output that differs from the reference, or a sparsity that is not reached."""


def check(what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raise :class:`Wrong` where two outputs are further apart than ``tolerance``."""
    if found.shape != expected.shape or not distance(found, expected) <= tolerance:
        apart = "shapes" if found.shape != expected.shape else f"{distance(found, expected):.1e} apart"
        raise Wrong(f"{what}: {apart}")


def examine(family: Family) -> Outcome:
    """Attach, train with events, compare, save, load, copy and compile."""
    torch.manual_seed(0)
    model = family.build().train()
    rows = Rows(family, model, CALIBRATION)
    dense = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    trial = dynaprune.CalibrationTrial(model, rows, losses, samples=CALIBRATION, seed=1)
    example = rows.batch(0)[0]
    before = evaluated(model, example)
    try:
        pruner = dynaprune.attach(model, optimizer, settings(), trial=trial)
    except (TypeError, ValueError) as error:
        return Outcome("refused", str(error))
    check("outputs after attach", evaluated(model, example), before, SAME_FUNCTION)
    swapped = swapped_share(model, dense)
    with cuts_compared(model, example):
        for step in range(STEPS):
            optimizer.zero_grad()
            losses(model, rows.batch(step)).mean().backward()
            optimizer.step()
    if pruner.sparsity < TARGET:
        raise Wrong(f"sparsity after training: {pruner.sparsity:.4f}, expected at least {TARGET}")
    pruner.detach()
    cut = outputs_cut(widths_of(dense), widths_of(model))
    after_training(family, model, example)
    if family.in_float64:
        dense, rows = dense.double(), rows.double()
    follows_masked_twin(dense, rows)
    not_cut = "; ".join(sorted({f"{reason}" for reason in pruner.tracer.refused.values()}))
    return Outcome("works", "", swapped, round(pruner.sparsity, 4), pruner.ledger.neurons, cut, not_cut)


def swapped_share(model: nn.Module, dense: nn.Module) -> float:
    """Weights in block-sparse layers over all weights of at least two dimensions but embeddings."""
    sparse = sum(
        m.layout.out_features * m.weight.shape[1:].numel()
        for m in model.modules()
        if isinstance(m, BlockSparseLayer)
    )
    embedded = {id(m.weight) for m in dense.modules() if isinstance(m, nn.Embedding)}
    weights = sum(p.numel() for p in dense.parameters() if p.dim() > 1 and id(p) not in embedded)
    return round(sparse / weights, 4)


def outputs_cut(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]) -> str:
    """Outputs that layers with weights lost, of those they had: ``layers.*.fc1 16 of 128``.

    Layers count together whose names differ in their place in a list only. Norms are left out.
    """
    lost: dict[str, list[int]] = {}
    for name, (outputs, inputs) in before.items():
        if inputs:
            counts = lost.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), [0, 0])
            counts[0] += outputs - after[name][0]
            counts[1] += outputs
    return "; ".join(f"{name} {gone} of {had}" for name, (gone, had) in lost.items() if gone)


@contextmanager
def cuts_compared(model: nn.Module, example: dict[str, Tensor]) -> Iterator[None]:
    """While inside: every cut of neurons leaves the outputs as they were."""
    original: Callable[..., Any] = apply._cut

    def compared(*arguments: Any) -> Any:
        before = evaluated(model, example)
        result = original(*arguments)
        check("outputs after a cut of neurons", evaluated(model, example), before, SAME_FUNCTION)
        return result

    apply._cut = compared
    try:
        yield
    finally:
        apply._cut = original


def after_training(family: Family, model: nn.Module, example: dict[str, Tensor]) -> None:
    """Copies, the plain form, a saved and loaded model and a compiled one compute the same."""
    expected = evaluated(model, example)
    twin = copy.deepcopy(model)
    check("a deep copy", evaluated(twin, example), expected, SAME_FUNCTION)
    check("plain layers", evaluated(swap_back(twin), example), expected, SAME_FUNCTION)
    with tempfile.TemporaryDirectory() as folder:
        dynaprune.save(model, Path(folder) / "model.safetensors")
        loaded = dynaprune.load(family.build, Path(folder) / "model.safetensors")
    check("save and load", evaluated(loaded, example), expected, SAME_FUNCTION)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    check("torch.compile", evaluated(compiled, example), expected, SAME_FUNCTION)


def follows_masked_twin(dense: nn.Module, rows: Rows) -> None:
    """Without cuts: a step with live masks is a step of the dense network with masks multiplied in.

    Every step starts where the one before it left the model. Training itself may amplify what is rounded:
    MobileNet V2 in float64 goes apart by a factor of 60 a step.
    """
    model, twin = copy.deepcopy(dense), copy.deepcopy(dense)
    optimizer, other = torch.optim.SGD(model.parameters(), 1e-2), torch.optim.SGD(twin.parameters(), 1e-2)
    pruner = dynaprune.attach(model, optimizer, settings(neurons=False, total_steps=TWIN_STEPS, interval=2))
    tolerance = SAME_TRAINING[next(dense.parameters()).dtype]
    example = rows.batch(0)[0]
    for step in range(TWIN_STEPS):
        start = {name: twin.get_submodule(name).weight.detach().clone() for name in pruner.layers}
        for network, stepping in ((model, optimizer), (twin, other)):
            torch.manual_seed(step)  # both drop the same paths
            stepping.zero_grad()
            losses(network, rows.batch(step)).mean().backward()
            stepping.step()
        for name, layer in pruner.layers.items():
            weight = twin.get_submodule(name).weight.detach()  # type: ignore[operator, union-attr]
            live = layer.to_dense_shape(torch.ones_like(layer.values))
            weight.mul_(live)
            before = start[name] * live
            mine, theirs = dense_weight(layer) - before, weight - before
            if max(mine.norm(), theirs.norm()) > NO_CHANGE * before.norm():
                check(f"the change of {name} in a step, beside the masked twin's", mine, theirs, tolerance)
        check("outputs of the masked twin", evaluated(model, example), evaluated(twin, example), tolerance)
        adopt(twin, model)
    pruner.detach()


def dense_weight(layer: BlockSparseLayer) -> Tensor:
    """The layer's weight with zeros where blocks are dead."""
    return layer.to_dense_shape(layer.values.detach())


def adopt(twin: nn.Module, model: nn.Module) -> None:
    """Give ``twin``, which is dense, the weights and buffers of ``model``."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, module in model.named_modules():
        if isinstance(module, BlockSparseLayer):
            state[f"{name}.weight"] = dense_weight(module)
    with torch.no_grad():
        for name, tensor in [*twin.named_parameters(), *twin.named_buffers()]:
            tensor.copy_(state[name])


def quietly(family: Family) -> Outcome:
    """:func:`examine` with everything that goes wrong as an outcome."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return examine(family)
        except Wrong as error:
            return Outcome("wrong", str(error))
        except Exception as error:
            return Outcome("error", f"{type(error).__name__}: {error}")
