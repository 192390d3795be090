"""The memory of one training step by kind, from torch's ``MemTracker`` and what only this project knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed._tools.mod_tracker import ModTracker
from torch.utils._pytree import tree_leaves

from dynaprune.nn import BlockSparseLayer
from dynaprune.pruning.pruner import Pruner
from dynaprune_kernels.backends.cpu import scratch_bytes
from dynaprune_kernels.layout_tensors import TENSORS

_TOTAL = "Total"
_OWN = ("dynaprune", "dynaprune_cpu", "dynaprune_cuda")


@dataclass(frozen=True)
class MemoryByKind:
    """Bytes by kind.

    Attributes:
        weights: parameters as they are stored; those of a block-sparse layer have a block per slot.
        gradients: of parameters; one that is added to an earlier one counts beside it until then.
        optimizer: the optimizer's state.
        activations: what the forward pass made and something still needs, mostly the backward pass.
        temporaries: what backward, the optimizer and the pruner made and nothing keeps; gradients of
            activations are among them, and activations that a checkpoint makes anew.
        scratch: memory of the CPU kernels of block-sparse layers, of no tensor.
        buffers: of the model.
        index: live masks, slots and index lists of block-sparse layers.
        pruner: statistics per block, neuron and group.
        inputs: what the model was called with.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    temporaries: int = 0
    scratch: int = 0
    buffers: int = 0
    index: int = 0
    pruner: int = 0
    inputs: int = 0

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class StepMemory:
    """The memory of one training step.

    Attributes:
        at_peak: by kind, at the moment when the sum was largest.
        most: of each kind the most that there was at any moment.
        training_state: bytes of weights, gradients as the optimizer takes them, and optimizer state.
    """

    at_peak: MemoryByKind
    most: MemoryByKind
    training_state: int

    @property
    def peak(self) -> int:
        """Bytes of everything at the peak."""
        return self.at_peak.total


def memory_of_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    step: Callable[[], Any],
    *,
    pruner: Pruner | None = None,
) -> StepMemory:
    """Run ``step`` once and tell the memory of its tensors by kind.

    It is a step like any other: the model is trained by it, and to the same bit as without measuring. It
    takes longer. The first step of an optimizer is not typical: its state comes into being at the end of it.

    ``torch.distributed._tools.mem_tracker.MemTracker`` sees the results of every op. Of what an op allocates
    inside it sees nothing, except here in the ops of block-sparse layers. A compiled model shows the inputs
    and outputs of its graphs.

    Args:
        model: what ``step`` trains. What it is called with counts as inputs.
        optimizer: or several, which ``step`` steps.
        step: one training step: forward, backward, optimizer.
        pruner: of the model, for the kind ``pruner``.

    Returns:
        Bytes on the device of the model's first parameter. On a GPU each tensor counts whole blocks of 512
        bytes, as the allocator hands them out.

    Raises:
        ValueError: a model without parameters.
    """
    first = next(model.parameters(), None)
    if first is None:
        raise ValueError("expected a model with parameters, got one without")
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
    index, statistics = list(_index_of(model)), [] if pruner is None else list(_statistics_of(pruner))
    tracker = _Tracker(first.device)
    tracker.track_external(*index, *statistics, *optimizers, model)
    with tracker.watching(model, optimizers):
        step()
    held = {
        "optimizer": _counted(first.device, *optimizers),
        "index": _counted(first.device, *index),
        "pruner": _counted(first.device, *statistics),
    }
    most = _most(tracker.most, held)
    state = most.weights + tracker.taken.get("Gradient", most.gradients) + most.optimizer
    return StepMemory(_by_kind(tracker.at_peak, held), most, state)


def _index_of(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        if isinstance(module, BlockSparseLayer):
            yield from (getattr(module.layout, name) for name in TENSORS)
            yield module.probe


def _statistics_of(pruner: Pruner) -> Iterator[Tensor]:
    for state in pruner.structure.layers.values():
        yield from state.statistics.values()
        for tensor in (state.probe, state.protected_until, state.never_lived, state.layer.tap):
            if tensor is not None:
                yield tensor
    yield from pruner.structure.groups.tensors()


def _counted(device: torch.device, *objects: Any) -> int:
    """Bytes of the tensors of ``objects`` on ``device``, each storage once."""
    tracker = MemTracker()
    tracker.track_external(*objects)
    return _labels(tracker.get_tracker_snapshot(), device)[_TOTAL]


def _labels(snapshot: Mapping[torch.device, Mapping[str, int]], device: torch.device) -> dict[str, int]:
    """Bytes on ``device`` by the names that MemTracker has for kinds."""
    found = {str(getattr(kind, "value", kind)): size for kind, size in snapshot.get(device, {}).items()}
    names = ("Parameter", "Gradient", "Optstate", "Activation", "Temp", "Buffer", "Other", _TOTAL)
    return {name: found.get(name, 0) for name in names}


class _NoModules(ModTracker):
    """No hooks on modules: torch's keep the graph of a step alive, so that no parameter can change its shape
    afterwards, and refuse a step that calls the model twice."""

    def __enter__(self) -> ModTracker:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


class _Tracker(MemTracker):
    """A MemTracker of one device that sees into the ops of block-sparse layers, and their scratch memory.

    Attributes:
        at_peak: bytes by label when they were most in all; ``Scratch`` is the scratch memory's.
        most: the most bytes of each label; ``Made`` is of what backward, the optimizer and the pruner made.
        taken: bytes by label when an optimizer began its step, the last one of the step.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._mod_tracker = _NoModules()
        self._on = device
        self.at_peak: dict[str, int] = {_TOTAL: -1}
        self.most: dict[str, int] = {}
        self.taken: dict[str, int] = {}

    @contextmanager
    def watching(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[None]:
        """Track what happens inside; no hook is left on ``model`` or ``optimizers`` afterwards."""
        with ExitStack() as stack:
            inputs = model.register_forward_pre_hook(self._note_inputs, with_kwargs=True)
            stack.callback(inputs.remove)
            for optimizer in optimizers:
                stack.callback(optimizer.register_step_pre_hook(self._note_gradients).remove)
            stack.enter_context(self)
            self._track_module_params_and_buffers(model, install_grad_hooks=True)
            self._look(scratch_bytes()[0])
            yield

    def _note_inputs(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        self.track_external(*(each for each in given if not each.requires_grad))

    def _note_gradients(self, *_: Any) -> None:
        self.taken = _labels(self.get_tracker_snapshot(), self._on)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        scratch_bytes(restart=True)
        if func.namespace in _OWN and (keys := _kernels_for(args)) is not None:
            with self:
                result = func.redispatch(keys, *args, **(kwargs or {}))
        else:
            result = super().__torch_dispatch__(func, types, args, kwargs)
        self._look(scratch_bytes()[1])
        return result

    def _look(self, scratch: int) -> None:
        now = {**_labels(self.get_tracker_snapshot(), self._on), "Scratch": scratch}
        now[_TOTAL] += scratch
        if now[_TOTAL] > self.at_peak[_TOTAL]:
            self.at_peak = now
        now = {**now, "Made": now["Temp"] + now["Optstate"]}
        self.most = {label: max(size, self.most.get(label, 0)) for label, size in now.items()}


def _by_kind(labels: Mapping[str, int], held: Mapping[str, int]) -> MemoryByKind:
    """MemTracker's labels as kinds. It counts the optimizer's temporaries as state, and has one label for all
    that it was only shown: ``held`` tells them apart."""
    optimizer = min(labels["Optstate"], held["optimizer"])
    index = min(labels["Other"], held["index"])
    pruner = min(labels["Other"] - index, held["pruner"])
    return MemoryByKind(
        weights=labels["Parameter"],
        gradients=labels["Gradient"],
        optimizer=optimizer,
        activations=labels["Activation"],
        temporaries=labels["Temp"] + labels["Optstate"] - optimizer,
        scratch=labels["Scratch"],
        buffers=labels["Buffer"],
        index=index,
        pruner=pruner,
        inputs=labels["Other"] - index - pruner,
    )


def _most(labels: Mapping[str, int], held: Mapping[str, int]) -> MemoryByKind:
    """The most of each kind; backward's temporaries are gone when the optimizer makes its own."""
    made = max(labels["Temp"], labels["Made"] - held["optimizer"])
    return _by_kind({**labels, "Temp": made, "Optstate": held["optimizer"]}, held)


def _kernels_for(args: Any) -> torch._C.DispatchKeySet | None:
    """Where an op with these arguments has its kernel, past everything that stands before it."""
    on = next((each.device.type for each in tree_leaves(args) if isinstance(each, Tensor)), None)
    key = {"cpu": torch._C.DispatchKey.CPU, "cuda": torch._C.DispatchKey.CUDA}.get(on or "")
    return None if key is None else torch._C.DispatchKeySet(key)
