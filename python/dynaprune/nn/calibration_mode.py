"""Evaluating a model as a trial does, and leaving no trace: modes, buffers and random states are put back."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

_CALIBRATING: WeakSet[nn.Module] = WeakSet()


def uncompiled() -> AbstractContextManager[Any]:
    """Run compiled models as they were before: hooks and traces see every layer, and nothing compiles anew
    for modes that the guards do not fit."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def calibration_mode(model: nn.Module, seed: int | None = None, *, training: bool = False) -> Iterator[None]:
    """Evaluate `model` for a trial, and put everything back.

    Inside: no gradients; every module in eval mode (all dropout variants, stochastic depth, and functional
    dropout that reads `module.training` are off), except norm layers with running statistics, which normalise
    by the statistics of the batch, as in training. A norm layer that the user froze (itself in eval while the
    model trains) keeps its running statistics. Autocast stays as it is; only its weight cache is off: a
    cast made before the weights last changed would be evaluated in their place.

    Afterwards, also when an error leaves the block:
    - each module has its own training flag again;
    - norm layers have their own statistics tensors again: they worked on copies, so neither the bits nor the
      version counters (which autograd checks) of the originals moved;
    - any other buffer whose bits changed, or that was replaced, added or deleted, is put back, in place;
    - the random states of Python, NumPy, torch on the CPU and on every accelerator in use are what they were.

    May be nested for the same model; the outermost call sets the modes. Not covered: state a module keeps
    outside its buffers (Python attributes, its own `torch.Generator`).

    Args:
        model: the module to evaluate.
        seed: seeds all these generators inside the block, so that code that draws even in eval mode draws the
            same in every evaluation; None leaves them.
        training: leave every module but the dropout layers in training mode, for models that return losses in
            that mode only (detection).
    """
    with ExitStack() as stack:
        stack.enter_context(_random_state_kept(_accelerators(model), seed))
        stack.enter_context(_buffers_kept(model))
        stack.enter_context(_training_flags_kept(model, training))
        cached = torch.is_autocast_cache_enabled()
        stack.callback(torch.set_autocast_cache_enabled, cached)
        torch.set_autocast_cache_enabled(False)
        stack.enter_context(torch.no_grad())
        yield


def calibrating() -> bool:
    """Whether some model is evaluated in :func:`calibration_mode` now."""
    return len(_CALIBRATING) > 0


def _accelerators(model: nn.Module) -> list[str]:
    """Types of the accelerators in use: CUDA once it is initialised, and every type the model lies on."""
    kinds = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}
    if torch.cuda.is_initialized():
        kinds.add("cuda")
    return sorted(
        kind for kind in kinds - {"cpu", "meta"} if hasattr(torch.get_device_module(kind), "set_rng_state")
    )


def _generators(kind: str) -> list[tuple[int, ...]]:
    """Arguments that name each generator of an accelerator: its index; MPS has one generator and no index."""
    count = torch.get_device_module(kind).device_count()
    return [()] if kind == "mps" else [(index,) for index in range(count)]


@contextmanager
def _random_state_kept(accelerators: list[str], seed: int | None) -> Iterator[None]:
    # torch.manual_seed is avoided: before CUDA is initialised it would leave the seed behind for later.
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    torch_state = torch.get_rng_state()
    states = [
        (kind, where, torch.get_device_module(kind).get_rng_state(*where))
        for kind in accelerators
        for where in _generators(kind)
    ]
    try:
        if seed is not None:
            random.seed(seed)
            if numpy is not None:
                numpy.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)
            for kind in accelerators:
                module = torch.get_device_module(kind)
                getattr(module, "manual_seed_all", module.manual_seed)(seed)
        yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        for kind, where, state in states:
            torch.get_device_module(kind).set_rng_state(state, *where)


def _is_norm(module: nn.Module) -> bool:
    """A layer that keeps running statistics: torch's batch and instance norms, and others built like them."""
    return isinstance(module, nn.modules.batchnorm._NormBase) or (
        "running_mean" in module._buffers and "running_var" in module._buffers
    )


def _is_dropout(module: nn.Module) -> bool:
    """torch's dropout layers, and those that drop paths or depth as they are named everywhere."""
    names = {"DropPath", "StochasticDepth", "DropBlock2d"}
    return isinstance(module, nn.modules.dropout._DropoutNd) or type(module).__name__ in names


@contextmanager
def _training_flags_kept(model: nn.Module, as_in_training: bool) -> Iterator[None]:
    if model in _CALIBRATING:
        yield
        return
    flags = [(module, module.training) for module in model.modules()]
    all_batch = not model.training
    _CALIBRATING.add(model)
    try:
        for module, training in flags:
            active = not _is_dropout(module) if as_in_training else _is_norm(module)
            module.training = active and (training or all_batch)
        yield
    finally:
        _CALIBRATING.discard(model)
        for module, training in flags:
            module.training = training


@dataclass
class _Snapshot:
    """One tensor registered as a buffer, and a copy of its bits."""

    tensor: Tensor
    bits: Tensor


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    registers: list[tuple[nn.Module, dict[str, Tensor | None]]] = []
    copies: dict[int, Tensor] = {}
    snapshots: dict[int, _Snapshot] = {}
    modules = list(model.modules())
    try:
        with torch.no_grad():
            for module in modules:
                registers.append((module, dict(module._buffers)))
                for name, buffer in module._buffers.items():
                    if buffer is None:
                        continue
                    if _is_norm(module):
                        module._buffers[name] = copies.setdefault(id(buffer), buffer.clone())
                    elif id(buffer) not in snapshots:
                        snapshots[id(buffer)] = _Snapshot(buffer, buffer.detach().clone())
        yield
    finally:
        for module, register in registers:
            module._buffers.clear()
            module._buffers.update(register)
        _restore(list(snapshots.values()))


def _restore(snapshots: list[_Snapshot]) -> None:
    """Write back the tensors whose bits changed; one synchronisation per device."""
    by_device: dict[torch.device, list[tuple[_Snapshot, Tensor]]] = {}
    with torch.no_grad():
        for snapshot in snapshots:
            changed = _bits_differ(snapshot.tensor, snapshot.bits)
            by_device.setdefault(changed.device, []).append((snapshot, changed))
        for pairs in by_device.values():
            flags = torch.stack([changed for _, changed in pairs]).tolist()
            for (snapshot, _), changed in zip(pairs, flags, strict=True):
                if changed:
                    if snapshot.tensor.shape != snapshot.bits.shape:
                        snapshot.tensor.resize_(snapshot.bits.shape)
                    snapshot.tensor.copy_(snapshot.bits)


def _bits_differ(tensor: Tensor, bits: Tensor) -> Tensor:
    """Whether the two differ in any bit (NaN equals itself, 0.0 differs from -0.0): bool, no dimensions."""
    if tensor.shape != bits.shape:
        return torch.ones((), dtype=torch.bool, device=bits.device)
    if tensor.layout != torch.strided or tensor.is_quantized:
        return torch.ones((), dtype=torch.bool, device=bits.device)
    left, right = (t.detach().reshape(-1).contiguous() for t in (tensor, bits))
    if left.dtype != torch.bool:
        left, right = left.view(torch.uint8), right.view(torch.uint8)
    return (left != right).any()
