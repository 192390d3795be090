"""The losses of one event's samples, as far as they have been evaluated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dynaprune.pruning.decide.significance import check_losses
from dynaprune.pruning.decide.trial import Losses


class EventSamples:
    """Losses with the candidates and without them, part by part.

    Attributes:
        parts: samples of each part; empty until they are known.
        within: losses as the model stands, of samples where they are finite.
        classes: of the same samples; None where the trial has none.
        left_out: samples whose loss is not finite as the model stands.
        evaluations: calls that gave losses. evaluated: losses that they gave.
    """

    def __init__(self, evaluate: Callable[[int | None], Losses]) -> None:
        """Evaluate by ``evaluate(size)``, where it has parts by ``evaluate.part(size, first, last)``."""
        parts = getattr(evaluate, "parts", None)
        self.parts: tuple[int, ...] = tuple(parts()) if callable(parts) else ()
        self._evaluate: Any = evaluate
        self._in_parts = len(self.parts) > 1
        self.within = torch.empty(0)
        self.classes: Tensor | None = None
        self.left_out = self.evaluations = self.evaluated = 0
        self._finite: list[Tensor] = []

    @property
    def total(self) -> int:
        """Samples of the event."""
        return sum(self.parts)

    @property
    def unknown(self) -> int:
        """Samples whose losses as the model stands are not known yet."""
        return sum(self.parts[len(self._finite) :])

    def extend(self, last: int | None) -> None:
        """Know the losses as the model stands of the parts before ``last``, or of all.

        Raises:
            TypeError, ValueError: losses or classes of a wrong type or shape.
        """
        known = len(self._finite)
        last = max(len(self.parts), 1) if last is None else last
        if last <= known:
            return
        losses, classes = losses_and_classes(self._call(None, known, last))
        check_losses(losses, classes)
        finite = losses.detach().isfinite()
        sizes = self.parts[known:last] if self._in_parts else (losses.numel(),)
        if sum(sizes) != losses.numel():
            raise ValueError(
                f"expected the {sum(sizes)} losses of the parts {known} to {last}, got {losses.numel()}"
            )
        if not self._in_parts:
            self.parts = sizes
        self.left_out += losses.numel() - int(finite.sum())
        self._finite.extend(finite.split(list(sizes)))
        kept = None if classes is None else classes[finite.to(classes.device)]
        if known and (kept is None) != (self.classes is None):
            raise ValueError("expected classes from every part of a trial or from none, got some")
        self.within = torch.cat([self.within, losses[finite]]) if known else losses[finite]
        self.classes = kept if self.classes is None or kept is None else torch.cat([self.classes, kept])

    def without(self, size: int, first: int, last: int) -> Tensor:
        """Losses without the candidates, of the samples of these parts that have a finite one with them."""
        losses, _ = losses_and_classes(self._call(size, first, last))
        check_losses(losses, None)
        finite = torch.cat(self._finite[first:last])
        # Another number is refused where the two are compared.
        return losses[finite.to(losses.device)] if losses.numel() == finite.numel() else losses

    def first(self, last: int) -> tuple[Tensor, Tensor | None]:
        """Losses as the model stands and classes, of the parts before ``last``."""
        count = sum(int(finite.sum()) for finite in self._finite[:last])
        return self.within[:count], None if self.classes is None else self.classes[:count]

    def _call(self, size: int | None, first: int, last: int) -> Losses:
        found: Losses = self._evaluate.part(size, first, last) if self._in_parts else self._evaluate(size)
        self.evaluations += 1
        losses = found[0] if isinstance(found, tuple) and found else found
        self.evaluated += losses.numel() if isinstance(losses, Tensor) else 0
        return found


def losses_and_classes(evaluation: Losses) -> tuple[Tensor, Tensor | None]:
    """What a trial returned, apart; TypeError for something else."""
    if isinstance(evaluation, Tensor):
        return evaluation, None
    if isinstance(evaluation, tuple) and len(evaluation) == 2:
        return evaluation
    got = type(evaluation).__name__
    raise TypeError(f"expected a trial to return losses [n] or (losses [n], classes [n] or None), got {got}")
