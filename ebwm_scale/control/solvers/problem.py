"""What a solver is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ebwm_scale.control.actions import ActionSpec


@dataclass
class Problem:
    """Actions to be found for H steps.

    costs: (N,) of candidates (N, H, width) in the model's units, on the spec's device. budget: how
    many futures may be evaluated. start: (H, width) actions to start from, mostly the rest of the
    plan before; None: nothing is known. generator: of every draw, on the CPU.
    """

    spec: ActionSpec
    horizon: int
    costs: Callable[[Tensor], Tensor]
    budget: int
    generator: torch.Generator
    start: Tensor | None = None
    evaluations: int = 0
    best: Tensor | None = None
    best_cost: float = float("inf")
    history: list[float] = field(default_factory=list)

    def evaluate(self, candidates: Tensor) -> Tensor:
        """Costs (N,), counted; the best of all so far is kept. Of equal ones the first counts."""
        costs = self.costs(candidates)
        self.count(len(candidates))
        place = int(costs.argmin())
        if self.best is None or float(costs[place]) < self.best_cost:
            self.best = candidates[place].clone()
            self.best_cost = float(costs[place])
        return costs

    def count(self, evaluations: int) -> None:
        """Futures that were evaluated."""
        self.evaluations += evaluations

    def end_iteration(self) -> None:
        """Note the best cost so far."""
        self.history.append(self.best_cost)

    @property
    def left(self) -> int:
        """Futures that may still be evaluated."""
        return max(0, self.budget - self.evaluations)

    def uniform(self, count: int) -> Tensor:
        """Candidates (count, H, width) from anywhere between the bounds, or any ids."""
        shape = (count, self.horizon, self.spec.width)
        share = torch.rand(*shape, generator=self.generator)
        if self.spec.is_discrete:
            counts = self.spec.num_values.cpu()
            ids = (share * counts).long()
            return torch.minimum(ids, counts - 1).to(self.spec.observe.device)
        share = share.to(self.spec.low)
        return self.spec.low + share * (self.spec.high - self.spec.low)


class Solver(Protocol):
    """Searches within the problem's budget; the result is problem.best."""

    def __call__(self, problem: Problem) -> None: ...
