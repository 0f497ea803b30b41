"""A term of the loss that asks the energy how good a state is (`refinement.level_weight`).

The loss asks the energy for its slope, where steps begin. Nothing in it asks for the level of the
energy, so of two predictions the one of lower energy need not be the better one. Added to the loss
is

    weight x mean over states x_1 .. x_N and over rows of (E(x_i) - c_i)^2

with c_i the loss of the state x_i that i steps lead to, without a gradient. So E learns the loss
that is to be expected of a state, whose slope is the one to descend. The energies of x_1 .. x_(N-1)
are there anyway: further steps start there. That of x_N, by which thinking chooses among several
starts, costs the predicted stream once more, with a first order alone. What a step starts from
without a graph has no term, nor have noise and zeros, whose level says nothing. Rows that see each
other (a group, whose targets need not all be scored) have one energy and one loss, their means.

With the graph through all steps the term's gradient reaches the steps before too, as if c_i were
constant.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ebwm_kernels.vocabulary.softmax_cross_entropy import LEAST_COUNT
from ebwm_scale.config.schema import RefinementConfig
from ebwm_scale.model.states import EmbeddingState, Targets, VocabularyState
from ebwm_scale.refinement.step_plan import StepPlan


class EnergyLevel:
    """Of one tile, with its targets. plan: of all steps. `at_start` and `at_end` tell of which of
    a step's two ends the level is asked.
    """

    def __init__(
        self,
        config: RefinementConfig,
        plan: Sequence[StepPlan],
        space: VocabularyState | EmbeddingState,
        targets: Targets,
        *,
        group_size: int,
    ):
        self.space = space
        self.targets = targets
        self.group_size = group_size
        num_terms = sum(self.at_start(step) + self.at_end(step) for step in plan)
        self.weight = config.level_weight / max(1, num_terms)

    @staticmethod
    def at_start(step: StepPlan) -> bool:
        """Where the energy is measured anyway."""
        return step.index > 0 and step.needs_graph

    @staticmethod
    def at_end(step: StepPlan) -> bool:
        """Of the last step, where no other begins."""
        return step.is_last and step.needs_graph

    @torch.no_grad()
    def costs(self, x: Tensor) -> Tensor:
        """c (b, s) of states x (b, s, size); 0 where a position is not scored."""
        return self.space.loss(x, self.targets.values, reduction="none")

    def of_state(self, energy: Tensor, costs: Tensor) -> Tensor:
        """What a state adds to the loss: a scalar with graph. energy, costs: (b, s)."""
        scored = self._of_groups(self.space.scored(self.targets.values).to(costs.dtype)).sum(-1)
        cost = self._of_groups(costs).sum(-1) / scored.clamp(min=1)
        level = self._of_groups(energy.to(costs.dtype)).mean(-1)
        total = (scored * (level - cost).square()).sum()
        return self.weight * total / self.targets.count.clamp(min=LEAST_COUNT)

    def _of_groups(self, rows: Tensor) -> Tensor:
        """(b, s) as (b, s / P, P)."""
        return rows.unflatten(1, (-1, self.group_size))
