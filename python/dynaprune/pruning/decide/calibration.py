"""Losses of a calibration sample that leave no trace in the model, its random state or its training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dynaprune.nn.calibration_mode import calibration_mode
from dynaprune.nn.to_device import to_device
from dynaprune.pruning.decide.significance import MIN_SAMPLES
from dynaprune.pruning.decide.trial import Losses


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
        self._cached: dict[int, Any] = {}

    def redraw(self) -> None:
        """Draw the samples of the next event, without replacement."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.draws)
        chosen = torch.randperm(len(self.dataset), generator=generator)[: self.samples]
        batches = -(-self.samples // self.batch_size)
        self._batches = [part.tolist() for part in chosen.tensor_split(batches)]
        self._cached = {}
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
        return self.part(0, len(self.parts()))

    def parts(self) -> tuple[int, ...]:
        """Samples of each batch."""
        if not self._batches:
            self.redraw()
        return tuple(map(len, self._batches))

    def part(self, first: int, last: int) -> tuple[Tensor, Tensor | None]:
        """As a call, of the batches from ``first`` up to but not including ``last``."""
        if not 0 <= first < last <= len(self.parts()):
            raise ValueError(f"expected batches among {len(self.parts())}, got {first} to {last}")
        losses: list[Tensor] = []
        classes: list[Tensor] = []
        seed = self.seed * 1_000_003 + self.draws
        with calibration_mode(self.model, seed=seed, training=self.in_training_mode), self.context():
            for expected, batch in self._fetch(first, last):
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
        self._batches, self._cached = [], {}
        if self.draws > 0:
            self.draws -= 1
            self.redraw()

    def _to_device(self, batch: Any) -> Any:
        return to_device(batch, _device(self.model))

    def _fetch(self, first: int, last: int) -> Iterator[tuple[int, Any]]:
        for number in range(first, last):
            indices = self._batches[number]
            batch = self._cached.get(number)
            if batch is None:
                batch = self.collate([self.dataset[i] for i in indices])
                if self.cache:
                    self._cached[number] = batch
            yield len(indices), batch


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
