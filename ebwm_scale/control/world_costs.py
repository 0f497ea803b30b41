"""What an imagined future costs: how far it is from a goal, how much reward it lacks, and how
unlikely its model finds it.

    goal frame   mean squared distance of an imagined frame from it, in the model's space:
                 reached "mean": over all of them, so that arriving early pays; "last": of the
                 last one; "any": of the nearest one
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
    """A frame to reach: states (P, dimension) in the model's space."""

    states: Tensor
    reached: str = "mean"

    def __post_init__(self):
        if self.reached not in REACHED:
            raise UserError(f"reached is {self.reached}: must be one of {', '.join(REACHED)}")

    def cost(self, states: Tensor, actions: Tensor) -> Tensor:
        distances = (states - self.states.to(states)).square().mean((-2, -1))
        if self.reached == "last":
            return distances[:, -1]
        if self.reached == "any":
            return distances.amin(1)
        return distances.mean(1)

    def pull(self, states: Tensor, actions: Tensor) -> Tensor:
        return self.cost(states, actions) * self.states.numel() / 2


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
