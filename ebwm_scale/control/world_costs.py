"""What an imagined future costs: how far it is from a goal, how much reward it lacks, and how
unlikely its model finds it.

    goal frame   mean squared distance of an imagined frame from it, in the model's space:
                 reached "mean": over all of them, so that arriving early pays; "last": of the
                 last one; "any": of the nearest one
                 distance "frame": cell by cell, which says nothing of how far a thing has to go
                 where it does not yet overlap with its place in the goal; "moved" adds the Cramér
                 distances of the profiles along the grid's rows and columns, which grow with the
                 way that things have to go
    reward       minus the sum of the rewards that a readout expects (reward_readout.py)
    energies     energy_weight times the mean energy of the imagined frames

Lower is better. Distances and rewards are differentiable in the imagined states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ebwm_scale.core.errors import UserError
from ebwm_scale.inference.imagination import Imagined

REACHED = ("mean", "last", "any")
DISTANCES = ("frame", "moved")


class Goal(Protocol):
    """What a future is held against."""

    def cost(self, states: Tensor, actions: Tensor) -> Tensor:
        """Costs (N,) of futures: states (N, H, P, dimension) under actions (N, H, ..)."""
        ...

    def pull(self, states: Tensor, actions: Tensor) -> Tensor:
        """The same in the units of energies times their step size: half a squared distance,
        summed over a frame.
        """
        ...


@dataclass(frozen=True)
class FrameGoal:
    """A frame to reach: states (P, dimension) in the model's space.

    reached, distance: see above. grid: rows and columns of the patches, which "moved" needs.
    """

    states: Tensor
    reached: str = "mean"
    distance: str = "frame"
    grid: tuple[int, int] | None = None

    def __post_init__(self):
        if self.distance not in DISTANCES:
            raise UserError(f"distance is {self.distance}: must be one of {', '.join(DISTANCES)}")
        if self.distance == "moved" and self.grid is None:
            raise UserError(
                "distance is moved, and frames of this run are one vector each, without a grid of "
                "patches: take frame"
            )
        if self.reached not in REACHED:
            raise UserError(f"reached is {self.reached}: must be one of {', '.join(REACHED)}")

    def cost(self, states: Tensor, actions: Tensor) -> Tensor:
        distances = self.distances(states)
        if self.reached == "last":
            return distances[:, -1]
        if self.reached == "any":
            return distances.amin(1)
        return distances.mean(1)

    def pull(self, states: Tensor, actions: Tensor) -> Tensor:
        return self.cost(states, actions) * self.states.numel() / 2

    def distances(self, states: Tensor) -> Tensor:
        """(..) of frames (.., P, dimension), differentiable."""
        difference = states - self.states.to(states)
        distances = difference.square().mean((-2, -1))
        if self.distance == "frame" or self.grid is None:
            return distances
        # Summed across, the profile along rows and along columns; from there on what lies before
        # each row or column. Where a thing is on its way to its place, these sums differ.
        cells = difference.unflatten(-2, self.grid)
        for across in (-2, -3):
            before = cells.sum(across).cumsum(-2)
            distances = distances + before.square().mean((-2, -1))
        return distances


@dataclass(frozen=True)
class CostConfig:
    """energy_weight: of the futures' energies beside the goal; baselines have none."""

    energy_weight: float = 0.0


def future_costs(
    futures: Imagined, actions: Tensor, goal: Goal, config: CostConfig = CostConfig()
) -> Tensor:
    """Costs (N,) of N futures under their actions (N, H, ..); what is not finite costs infinity."""
    costs = goal.cost(futures.states, actions)
    if config.energy_weight:
        if futures.energies is None:
            raise UserError(
                f"the energies' weight is {config.energy_weight}, and this model has no energy: "
                "leave it at 0"
            )
        costs = costs + config.energy_weight * futures.energies.mean(1)
    return torch.where(costs.isfinite(), costs, torch.inf)
