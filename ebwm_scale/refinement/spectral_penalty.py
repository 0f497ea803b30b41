"""A penalty on steps that do not shrink (`refinement.spectral_penalty`).

Near where steps end a step is about d -> J d for a small change d (evaluation/step_spectrum.py).
The moves of the steps are such changes, each the image of the one before: the steps are themselves
a power iteration for the eigenvalue of J of the largest absolute value. So the ratio

    r_i = |move of step i| / |move of step i - 1|         the latter without a gradient

comes at no cost, and its gradient needs no derivative beyond the second; that of a Hessian-vector
product would need the third. Added to the loss is

    weight x mean over pairs of steps and over rows of max(0, r_i - bound)^2

once for the state and once for a workspace, of steps that have a graph. Rows that see each other
(the cells of a group) have one ratio. A move of the state is taken in front of its map: x moves by
W d, of d (B, S, D), where W is linear. What a step forgets (`refinement.decay`) is a part of its
move, but for the share of the initial state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ebwm_scale.config.schema import RefinementConfig
from ebwm_scale.refinement.step_plan import StepPlan


class SpectralPenalty:
    """Of one tile, whose steps are told in their order.

    num_groups: of the whole batch, so that parts of it add up; without groups its rows.
    """

    def __init__(
        self,
        config: RefinementConfig,
        plan: Sequence[StepPlan],
        *,
        num_groups: int,
        group_size: int,
    ):
        self.bound = config.spectral_bound
        self.decay = config.decay
        self.group_size = group_size
        num_pairs = sum(step.needs_graph for step in plan[1:])
        self.weight = config.spectral_penalty / (max(1, num_pairs) * num_groups)
        self.added: Tensor | None = None  # by the steps before, in front of the map
        self.lengths: list[Tensor] = []  # of the moves of the step before

    def of_step(
        self,
        step: StepPlan,
        motion: Tensor,
        factor: Tensor | float,
        workspace_move: Tensor | None,
    ) -> Tensor | None:
        """What the step adds to the loss, a scalar with graph; None for the first step, or without
        a graph.

        motion (B, s, D): what moves the state in front of its map. factor: on alpha, a number or
        (B, s, 1). workspace_move (B, s, width).
        """
        with torch.set_grad_enabled(step.needs_graph):
            moves = [self._move(step, motion, factor)]
            if workspace_move is not None:
                moves.append(workspace_move)
            lengths = [self._length(move) for move in moves]
            before = self.lengths
            self.lengths = [length.detach() for length in lengths]
            if not before or not step.needs_graph:
                return None
            total = lengths[0].new_zeros(())
            for length, earlier in zip(lengths, before):
                # A row that did not move has no ratio.
                ratio = torch.where(earlier > 0, length / earlier.clamp(min=1e-30), 0)
                total = total + (ratio - self.bound).clamp(min=0).square().sum()
            return self.weight * total

    def _move(self, step: StepPlan, motion: Tensor, factor: Tensor | float) -> Tensor:
        """In front of the map, with what the step forgets of what was added there."""
        if not self.decay:
            return motion
        forgotten = self.decay * factor
        move = motion if self.added is None else motion - forgotten * self.added
        added = move if self.added is None else self.added + move
        self.added = added if step.keep_graph else added.detach()
        return move

    def _length(self, move: Tensor) -> Tensor:
        """(B, s / P): over all numbers of a row or group; its slope at 0 is 0."""
        of_groups = move.unflatten(1, (-1, self.group_size)).flatten(2)
        return torch.linalg.vector_norm(of_groups, dim=-1)
