"""What callbacks for other libraries share: layers are swapped early, a pruner follows each training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from dynaprune.pruning.attach import attach
from dynaprune.pruning.decide.trial import Losses, Trial
from dynaprune.pruning.prepared import Prepared
from dynaprune.pruning.pruner import Pruner

NO_STATE = (
    "expected a checkpoint saved while this callback was pruning, got one without a pruner's state: only "
    "such a checkpoint can be resumed"
)


class Session:
    """One model, made block-sparse once, and the pruner of its present training.

    Attributes:
        pruner: of this training, or of the last one; None before.
        standing: how final the structure was when it was looked at last, see ``Pruner.final_standing``.
    """

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self.pruner: Pruner | None = None
        self.standing = 0

    def begin(
        self,
        optimizer: Any,
        trial: Trial | Callable[[], Losses] | None,
        *,
        total_steps: int,
        batch_size: int | None,
    ) -> Pruner:
        """Attach a pruner for a training; the one before is detached."""
        if self.pruner is not None:
            self.pruner.detach()
        self.pruner = attach(self.prepared.for_training(total_steps, batch_size), optimizer, trial=trial)
        self.prepared = replace(self.prepared, compared=True)  # by the first batch of this training
        self.standing = 0
        return self.pruner

    def outranks(self) -> bool:
        """Whether no earlier model can be the best: while nothing is final, and when it becomes more so."""
        if self.pruner is None:
            return False
        now, before = self.pruner.final_standing, self.standing
        self.standing = now
        return now == 0 or now > before

    def state_dict(self) -> dict[str, Any]:
        """The pruner's state, and the standing."""
        assert self.pruner is not None
        return {"pruner": self.pruner.state_dict(), "standing": self.standing}

    def resume(self, state: dict[str, Any] | None) -> None:
        """Go on where a checkpoint left off; ValueError without a state."""
        if state is None or self.pruner is None:
            raise ValueError(NO_STATE)
        self.pruner.load_state_dict(state["pruner"])
        self.standing = state["standing"]


def check_model(model: nn.Module, given: Any, what: str) -> None:
    """Raise ValueError where ``given`` is another model than the one that a callback was made with."""
    if given is not model:
        raise ValueError(
            f"expected a {what} of the {type(model).__name__} that this callback was made with, got another "
            f"{type(given).__name__}: make the callback with the {what}'s model, and give the {what} no "
            "model_init, which builds a new one"
        )
