"""Cut neurons out of a network while it trains: later layers shrink too, and what the network computes stays.

For the pruner, in this order (every function is exact: what it cuts changes no output beyond rounding)::

    capture = InputCapture(model); capture.arm()       # or ExampleInputs.of(example_inputs)
    neuron_map = find_groups(model, capture.example)   # after attach, again after every cut: widths changed
    groups = neuron_map.groups                         # neuron_map.refused: {layer: why none may go}

    masks = blocks_of_group(model, group)              # {sparse layer: bool [R, C]}: suspend to try a group;
                                                       # passed: release_ them, and the group is dead
    report = find_cut(model, neuron_map, example, floor=0.02)
    report.kept                                        # {sparse layer: Kept(rows, columns, neurons)}: what
                                                       # is known of the layer is sliced with it
    report.neurons, report.blocks                      # neurons to cut by layer; live blocks that go along
    report.refused                                     # {layer: why dead neurons of it stay}
    carry_out(model, report.plan, optimizers)          # unless the plan is None; and for every copy:
    cut_copy(copy, report.plan, example)

The cost is one forward pass of the example inputs to find groups and two or three for a cut; without a dead
row or column ``find_cut`` runs none. No block may be suspended meanwhile.

Which groups can go without harm:

- nothing reads them: in every reader the blocks (or, in a plain layer, the weights) are dead;
- they are constant: all their producers' rows are dead, so they are ``act(bias)``, and that times the
  readers' weights moves into the readers' biases. The constant comes from a forward pass of the example
  inputs; it must be one over the whole batch and all positions, whichever statistics batch norms use.
  A reader without a bias, or one that pads with zeros, takes no constant but 0: such a group stays, with the
  reason. (No bias is added: a new Parameter would have to enter somebody else's optimizer.)

Attention loses whole heads (see ``families.attention``).

Each cut is tried on the example inputs and taken back where the outputs of the model or of a layer move by
more than rounding or the forward fails, in evaluation or in training mode (code that knows a width by heart):
what a traced graph gets wrong cannot harm.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from dynaprune.neurons.candidates import DeadUnits, above_floor, why_not
from dynaprune.neurons.carry_out import carry_out
from dynaprune.neurons.checked_cut import enter_what_passes
from dynaprune.neurons.cut_plan import CutReport
from dynaprune.neurons.example_inputs import ExampleInputs
from dynaprune.neurons.folding import NORMS, observe
from dynaprune.neurons.groups import NeuronGroup, NeuronMap
from dynaprune.neurons.twin_check import watched_layers

__all__ = ["cut_dead_neurons", "find_cut"]


def cut_dead_neurons(
    model: nn.Module,
    neuron_map: NeuronMap,
    example: ExampleInputs,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    *,
    floor: float = 0.0,
) -> CutReport:
    """:func:`find_cut`, carried out; ``neuron_map`` is stale afterwards where anything was cut.

    Args:
        optimizers: whose state is cut along.
    """
    report = find_cut(model, neuron_map, example, floor=floor)
    if report.plan is not None:
        carry_out(model, report.plan, optimizers)
    return report


def find_cut(
    model: nn.Module, neuron_map: NeuronMap, example: ExampleInputs, *, floor: float = 0.0
) -> CutReport:
    """Find every group of ``neuron_map`` that nothing reads or that is constant. The model stays as it is.

    Args:
        neuron_map: of the model as it is now.
        example: inputs that the model accepts; constants and the check of the outputs come from them.
        floor: least share of a layer's outputs that stays, in [0, 1); at least one group always does.

    Raises:
        ValueError: a floor outside [0, 1).
    """
    if not 0 <= floor < 1:
        raise ValueError(f"expected a floor in [0, 1), got {floor}")
    dead = DeadUnits(model)
    report = CutReport(refused={n: why for n, why in neuron_map.refused.items() if dead.any_output(n)})
    candidates = [c for g in neuron_map.groups if (c := dead.candidate(g)) is not None]
    candidates = above_floor(model, candidates, floor, report.refused)
    if not candidates:
        return report
    readers = {m.name for c in candidates for m in c.folded}
    before = observe(model, example, readers, layers=watched_layers(model))
    batch = before
    if readers and any(isinstance(m, NORMS) for m in model.modules()):
        batch = observe(model, example, readers, batch_statistics=True)
    fit = []
    for candidate in candidates:
        if reason := why_not(model, candidate, before, batch):
            dead.refuse(report.refused, candidate.group, reason)
        else:
            fit.append(candidate)

    def refuse(group: NeuronGroup, reason: str) -> None:
        dead.refuse(report.refused, group, reason)

    enter_what_passes(report, model, fit, example, before, refuse)
    return report
