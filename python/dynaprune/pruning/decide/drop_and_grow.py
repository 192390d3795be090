"""The built-in policy that rewires: blocks change places within their layer, and their number stays."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dynaprune.pruning.decide.growth import GRADIENT, growth_fraction
from dynaprune.pruning.decide.policy import LayerView, Policy, View
from dynaprune.pruning.decide.swap_audit import SwapAudit
from dynaprune.pruning.decide.swap_choice import droppable, largest, least, random_keys, spread
from dynaprune.pruning.decide.trial_rules import TrialRules
from dynaprune.pruning.edit.edits import Rewire


class DropAndGrow(Policy):
    """At every event a share of each layer's live blocks goes by score, and as many begin elsewhere.

    The share is ``share / 2 * (1 + cos(pi * step / until))`` (RigL, Evci et al. 2020, arXiv:1911.11134,
    section 3). Blocks begin where the squared norm of the dense gradient, over the mean square of the inputs
    that the block reads, is largest among the dead ones, or at random. Without the division growth collapses
    onto the inputs with outlier activations (Dietrich et al. 2021, arXiv:2108.06277). A block that has begun
    is safe for one interval; a block that goes may begin again at the next event, not at the same.
    """

    audit: SwapAudit

    def __init__(
        self,
        share: float,
        until: int,
        interval: int,
        *,
        growth: str = GRADIENT,
        seed: int = 0,
        rules: TrialRules | None = None,
        audits: int = 0,
    ) -> None:
        """Rewire after every ``interval``-th step before step ``until``.

        Args:
            share: of the live blocks, at the start.
            growth: "gradient" or "random".
            seed: of random growth.
            rules: what an audited drop has to satisfy.
            audits: events whose drops are tested, though they go whatever comes of it.

        Raises:
            ValueError: no event before ``until``.
        """
        self.last = (until - 1) // interval * interval
        if self.last < 1:
            raise ValueError(
                f"expected an interval of fewer than the {until} steps of rewiring, got {interval}"
            )
        self.interval, self.until, self.share = interval, until, share
        self.swaps_by_gradient = growth == GRADIENT
        self._seed = seed
        self.audit = SwapAudit(rules or TrialRules(), audits, self.last // interval)

    def due(self, step: int) -> bool:
        return 0 < step <= self.last and step % self.interval == 0

    def ended(self, step: int) -> bool:
        return step >= self.last

    def decide(self, view: View) -> list[Rewire]:
        share = growth_fraction(view.step, self.until, self.share)
        dropped, grown, by = {}, {}, {}
        for name, layer in view.layers.items():
            scores = (layer.drop_scores or layer.scores)(layer.mask)
            may_go = droppable(scores, layer.mask, layer.protected)
            values, may_begin = self._growth(view.step, name, layer)
            wish = math.floor(share * int(layer.mask.sum()) + 1e-9)
            count = min(wish, int(may_go.sum()), int(may_begin.sum()))
            if count:
                dropped[name], by[name] = least(scores, may_go, count), scores
                grown[name] = largest(values, may_begin, count)
        if dropped and view.losses is not None and self.audit.due(view.step // self.interval):
            self.audit.run(view.step, spread(by, dropped), view.losses)
        return [Rewire(dropped, grown, view.step + self.interval + 1)] if dropped else []

    def state_dict(self) -> dict[str, Any]:
        return {"audit": self.audit.state_dict()} if self.audit.events else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "audit" in state:
            self.audit.load_state_dict(state["audit"])

    def _growth(self, step: int, name: str, layer: LayerView) -> tuple[Tensor, Tensor]:
        """What dead blocks are chosen by, and which of them may begin."""
        dead = ~layer.mask
        if not self.swaps_by_gradient:
            return random_keys(dead.shape, self._seed, step, name).to(dead.device), dead
        if layer.probe is None:
            return torch.zeros_like(dead, dtype=torch.float32), torch.zeros_like(dead)
        return layer.probe, dead & torch.isfinite(layer.probe) & (layer.probe > 0)
