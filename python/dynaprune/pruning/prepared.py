"""``Prepared``: what ``prepare`` made of a model, for ``attach`` and for the optimizer in between."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from dynaprune.neurons.example_inputs import ExampleInputs
from dynaprune.pruning.config import PruningConfig
from dynaprune.pruning.edit.pretrained_blocks import PretrainedBlocks
from dynaprune.pruning.learning_rate import marked_groups


@dataclass(frozen=True, eq=False)
class Prepared:
    """A model with block-sparse layers that no pruner watches yet; ``attach`` takes it.

    Attributes:
        given: what was given to :func:`prepare`: the model, or what is around it.
        model: the model itself.
        exempt: layers that stay dense, with the reason.
        swapped: layers that became block-sparse here; one that no optimizer holds becomes dense again.
        example: inputs of the model; None takes a training batch.
        compared: whether the model was seen to compute the same as before.
        left_out: blocks that training begins without, by layer; empty where it begins dense.
        rates: by how much the values of a layer learn faster than all else, where they do.
        pretrained: where the values of the left-out blocks of a trained network are; None: they are zeros.
    """

    given: nn.Module
    model: nn.Module
    config: PruningConfig
    exempt: Mapping[str, str]
    swapped: tuple[str, ...]
    example: ExampleInputs | None
    compared: bool
    left_out: Mapping[str, int] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    pretrained: PretrainedBlocks | None = None

    def for_training(self, total_steps: int, batch_size: int | None) -> Prepared:
        """The same, with these settings where the configuration left them open."""
        return replace(self, config=self.config.for_training(total_steps, batch_size))

    def parameter_groups(
        self,
        groups: Iterable[Mapping[str, Any]] | None = None,
        *,
        lr: float | None = None,
        weight_decay: float = 0.0,
    ) -> list[dict[str, Any]]:
        """Groups for an optimizer in which the values of layers that begin sparse have a rate of their own.

        The rate is multiplied (see ``PruningConfig.sparse_learning_rate``) and the weight decay divided
        alike. Biases, norms, embeddings and whatever stays dense are as they would be.

        Args:
            groups: the optimizer's own, each with ``params``; by default one of all parameters that are
                trained. Their ``lr`` and ``weight_decay`` come before those given here.
            lr: learning rate of everything else.
            weight_decay: of everything else; the optimizer's own default does not apply.

        Raises:
            ValueError: a group to split that has no ``lr``, and none is given.
        """
        if groups is None:
            groups = [{"params": [p for p in self.model.parameters() if p.requires_grad]}]
        given = {"weight_decay": weight_decay} if lr is None else {"lr": lr, "weight_decay": weight_decay}
        values = {name: self.model.get_submodule(name).values for name in self.rates}
        return marked_groups(
            [{**given, **group} for group in groups],
            {id(values[name]): rate for name, rate in self.rates.items()},
        )
