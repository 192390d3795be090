"""What a task reports of an evaluation beside its loss: names, units, and which direction is better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "ACCURACY",
    "CHARACTER_ERRORS",
    "F1",
    "KNOWN",
    "NATS",
    "PERPLEXITY",
    "WORD_ERRORS",
    "Metric",
    "beside_the_loss",
]


@dataclass(frozen=True)
class Metric:
    """One figure of quality.

    ``name`` is its key in what an evaluation gives, ``label`` what people read. ``unit`` is "share" (0..1,
    shown in percent, its differences in points), "nats" or "number". ``is_loss``: it equals the mean loss,
    and need not be shown beside it."""

    name: str
    label: str
    unit: str = "share"
    lower_is_better: bool = False
    is_loss: bool = False

    @property
    def key(self) -> str:
        """Its key in an arm's result: of the test part."""
        return f"test_{self.name}"

    @property
    def one_sided(self) -> str:
        """Key of the one-sided bound that says how bad the difference may be (see `of_seeds`)."""
        return "high_one_sided" if self.lower_is_better else "low_one_sided"


ACCURACY = Metric("accuracy", "accuracy")
F1 = Metric("f1", "F1")
WORD_ERRORS = Metric("wer", "word error rate", lower_is_better=True)
CHARACTER_ERRORS = Metric("cer", "character error rate", lower_is_better=True)
NATS = Metric("nats", "nats per token", "nats", lower_is_better=True, is_loss=True)
PERPLEXITY = Metric("perplexity", "perplexity", "number", lower_is_better=True)

KNOWN = {metric.key: metric for metric in (ACCURACY, F1, WORD_ERRORS, CHARACTER_ERRORS, NATS, PERPLEXITY)}


def beside_the_loss(metrics: Sequence[Metric]) -> Metric:
    """The metric to show where there is room for one beside the loss."""
    return next((metric for metric in metrics if not metric.is_loss), metrics[0])
