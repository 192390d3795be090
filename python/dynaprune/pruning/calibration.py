"""Losses of a calibration sample that leave no trace in the model, its random state or its training."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from dynaprune.pruning.paired_test import MIN_SAMPLES

Losses = Tensor | tuple[Tensor, Tensor | None]

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


class CalibrationTrial:
    """The trial's losses: `trial()` evaluates the model on samples drawn by its own generator.

    `redraw()` draws the samples of the next event; all calls until the next `redraw()` see the same samples
    in the same batches and order, as a paired test needs. Draw from data the scores do not come from: a part
    of the *training* set held out for this, never the test set. Where the data set has fewer than `samples`
    items, all are used and `trial.samples` says how many.

    Args:
        model: the model that trains.
        dataset: map-style data set (`len`, `[]`).
        loss: `loss(model, batch)` returns one loss per *independent* sample [b], floating point (a text's
            token losses averaged per text), or (losses [b], classes [b]) for the check by class, or (losses,
            None).
        samples: samples per event; fewer than 1,024 raise the level the test really has (docs/trial.md).
        batch_size: samples per forward pass, as a rule that of training or larger, since norm layers
            normalise by these batches. The batches are of equal size, plus or minus one.
        seed: of the sampling; independent of every global generator.
        collate: makes a batch of a list of items; default `torch.utils.data.default_collate`.
        cache: keep the event's batches (on the CPU) instead of fetching them again for each call.
        move: makes of a collated batch what `loss` gets; default: its tensors on the model's device.
        context: makes a context manager for each evaluation; what training computes in, autocast for example:
            `lambda: torch.autocast("cuda", torch.bfloat16)`.

    `isolates_itself` tells the pruner that the calls already run in `calibration_mode`. `in_training_mode`
    says that the model gives losses in that mode only, as `try_batch` found out.
    """

    isolates_itself = True

    def __init__(
        self,
        model: nn.Module,
        dataset: Any,
        loss: Callable[[nn.Module, Any], Losses],
        samples: int = 1024,
        batch_size: int = 256,
        seed: int = 0,
        collate: Callable[[list[Any]], Any] | None = None,
        cache: bool = True,
        move: Callable[[Any], Any] | None = None,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected the model as an nn.Module, got {type(model).__name__}")
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise TypeError(
                f"expected a map-style data set (length, items by index), got {type(dataset).__name__}"
            )
        if not callable(loss):
            raise TypeError(f"expected loss as a callable loss(model, batch), got {type(loss).__name__}")
        if not (callable(context) and (move is None or callable(move))):
            raise TypeError(
                f"expected move(batch) and context() as callables, got {type(move).__name__} and "
                f"{type(context).__name__}"
            )
        if len(dataset) < MIN_SAMPLES or samples < MIN_SAMPLES or batch_size < 1:
            raise ValueError(
                f"expected a data set and samples of at least {MIN_SAMPLES} and a batch_size of at least 1, "
                f"got {len(dataset)}, {samples} and {batch_size}"
            )
        if not 0 <= seed < 2**32:
            raise ValueError(f"expected a seed in [0, 2**32), got {seed}")
        self.model = model
        self.dataset = dataset
        self.loss = loss
        self.samples = min(samples, len(dataset))
        self.batch_size = batch_size
        self.seed = seed
        self.collate = torch.utils.data.default_collate if collate is None else collate
        self.cache = cache
        self.move = self._to_device if move is None else move
        self.context = context
        self.draws = 0
        self.in_training_mode = False
        self._batches: list[list[int]] = []
        self._cached: list[Any] | None = None

    def redraw(self) -> None:
        """Draw the samples of the next event, without replacement."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.draws)
        chosen = torch.randperm(len(self.dataset), generator=generator)[: self.samples]
        batches = -(-self.samples // self.batch_size)
        self._batches = [part.tolist() for part in chosen.tensor_split(batches)]
        self._cached = None
        self.draws += 1

    def try_batch(self) -> None:
        """Find out whether one batch gives usable losses, in evaluation or else in training mode.

        No draw is consumed, and the model and the random states stay as they are.

        Raises:
            ValueError: neither mode does, with what the loss got and what it should return.
        """
        count = min(self.samples, self.batch_size)
        failures = []
        for training in (False, True):
            batch: Any = None
            try:
                with calibration_mode(self.model, seed=self.seed, training=training), self.context():
                    batch = self.move(self.collate([self.dataset[i] for i in range(count)]))
                    _check_batch(*_split(self.loss(self.model, batch)), count)
            except Exception as error:
                mode = "training" if training else "evaluation"
                failures.append((f"in {mode} mode {type(error).__name__}: {error}", error))
            else:
                self.in_training_mode = training
                return
        raise ValueError(
            "the trial cannot be evaluated: expected loss(model, batch) to return one floating-point loss "
            f"per sample, shape ({count},), for a batch that is {_outline(batch)} (where training computes "
            "under autocast, give the trial context=lambda: torch.autocast(...)); "
            + "; ".join(said for said, _ in failures)
        ) from failures[0][1]

    def __call__(self) -> tuple[Tensor, Tensor | None]:
        """Losses [samples] float64 on the model's device, classes [samples] int64 or None, as last drawn.

        Raises ValueError when the loss is not one floating-point figure per sample.
        """
        if not self._batches:
            self.redraw()
        losses: list[Tensor] = []
        classes: list[Tensor] = []
        seed = self.seed * 1_000_003 + self.draws
        with calibration_mode(self.model, seed=seed, training=self.in_training_mode), self.context():
            for expected, batch in self._fetch():
                found, label = _split(self.loss(self.model, self.move(batch)))
                _check_batch(found, label, expected)
                losses.append(found.double())
                if label is not None:
                    classes.append(label.to(torch.int64))
        if classes and len(classes) != len(losses):
            raise ValueError(
                f"expected classes from every batch or from none, got {len(classes)} of {len(losses)}"
            )
        return torch.cat(losses), torch.cat(classes) if classes else None

    def state_dict(self) -> dict[str, int]:
        """What a resumed run needs to draw what this one would have drawn: plain numbers."""
        return {"seed": self.seed, "draws": self.draws}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue the sampling of a saved run; the samples of an event under way are drawn again."""
        if set(state) != {"seed", "draws"}:
            raise ValueError(f"expected the keys ['draws', 'seed'], got {sorted(state)}")
        self.seed, self.draws = int(state["seed"]), int(state["draws"])
        self._batches, self._cached = [], None
        if self.draws > 0:
            self.draws -= 1
            self.redraw()

    def _to_device(self, batch: Any) -> Any:
        return _moved(batch, _device(self.model))

    def _fetch(self) -> Iterator[tuple[int, Any]]:
        if self._cached is not None:
            yield from zip(map(len, self._batches), self._cached, strict=True)
            return
        kept: list[Any] = []
        for indices in self._batches:
            batch = self.collate([self.dataset[i] for i in indices])
            if self.cache:
                kept.append(batch)
            yield len(indices), batch
        if self.cache:
            self._cached = kept


def _split(found: Any) -> tuple[Any, Any]:
    return found if isinstance(found, tuple) and len(found) == 2 else (found, None)


def _check_batch(losses: Any, classes: Any, expected: int) -> None:
    if not isinstance(losses, Tensor) or losses.shape != (expected,) or not losses.is_floating_point():
        raise ValueError(
            f"expected loss(model, batch) to return one floating-point loss per independent sample, shape "
            f"({expected},): reduction='none', averaged over the positions of a sequence; "
            f"got {_described(losses)}"
        )
    if classes is None:
        return
    if not isinstance(classes, Tensor) or classes.shape != (expected,) or classes.is_floating_point():
        raise ValueError(
            f"expected one integer class per sample, shape ({expected},), or None; got {_described(classes)}"
        )


def _described(value: Any) -> str:
    return (
        f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    )


def _outline(value: Any) -> str:
    """Kinds and shapes of a batch, in a line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_outline(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        shown = ", ".join(map(_outline, value[:4])) + (", ..." if len(value) > 4 else "")
        return f"a {type(value).__name__} of ({shown})"
    return _described(value)


def _device(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _moved(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor in it on `device`; other values as they are."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        items = {key: _moved(value, device) for key, value in batch.items()}
        return type(batch)(items) if type(batch) is dict else items
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_moved(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(_moved(value, device) for value in batch)
    return batch


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
