"""What sampling solvers draw candidates from: a normal distribution between bounds, or ids.

Both turn N(0, 1) numbers into candidates, so one solver serves both, and noise that is alike from
step to step gives ids that are so too (the Gumbel trick: the id of the largest log p + g).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ebwm_scale.control.actions import ActionSpec
from ebwm_scale.control.solvers.problem import Problem

WIDTH = 0.3  # of the first draws, of the distance between the bounds
NARROWEST = 0.02  # the same, of the last ones
FLOOR = 0.05  # the share of ids that are drawn from all alike
SURE = 0.7  # the first probability of an id to start from


class Draws(Protocol):
    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Numbers of a candidate, time first."""
        ...

    def candidates(self, noise: Tensor) -> Tensor:
        """(N, H, width) of N(0, 1) numbers (N, *noise_shape)."""
        ...

    def center(self) -> Tensor:
        """The candidate (H, width) in the middle."""
        ...

    def fitted(self, candidates: Tensor, weights: Tensor, keep: float, keep_width: bool) -> Draws:
        """Moved to candidates (N, H, width) with weights (N,) of sum 1.

        keep: the share of what it was. keep_width: only the middle moves.
        """
        ...


def first_draws(problem: Problem) -> Draws:
    """Around what there is to start from, otherwise from everywhere."""
    spec = problem.spec
    if spec.is_discrete:
        return CategoricalDraws.of(spec, problem.horizon, problem.start)
    middle = (spec.low + spec.high) / 2
    mean = middle.expand(problem.horizon, -1) if problem.start is None else problem.start
    width = WIDTH * (spec.high - spec.low)
    return NormalDraws(spec, mean, width.expand(problem.horizon, -1))


@dataclass(frozen=True)
class NormalDraws:
    """mean, std: (H, width)."""

    spec: ActionSpec
    mean: Tensor
    std: Tensor

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return tuple(self.mean.shape)

    def candidates(self, noise: Tensor) -> Tensor:
        drawn = self.mean + self.std * noise.to(self.mean)
        return drawn.clamp(self.spec.low, self.spec.high)

    def center(self) -> Tensor:
        return self.mean

    def fitted(
        self, candidates: Tensor, weights: Tensor, keep: float, keep_width: bool
    ) -> NormalDraws:
        weights = weights[:, None, None].to(self.mean)
        mean = (weights * candidates).sum(0)
        moved = keep * self.mean + (1 - keep) * mean
        if keep_width:
            return replace(self, mean=moved)
        std = (weights * (candidates - mean).square()).sum(0).sqrt()
        std = keep * self.std + (1 - keep) * std
        narrowest = NARROWEST * (self.spec.high - self.spec.low)
        return replace(self, mean=moved, std=torch.maximum(std, narrowest))


@dataclass(frozen=True)
class CategoricalDraws:
    """probabilities: (H, width, values), 0 of ids that a column does not have."""

    spec: ActionSpec
    probabilities: Tensor

    @classmethod
    def of(cls, spec: ActionSpec, horizon: int, start: Tensor | None) -> CategoricalDraws:
        everywhere = cls._uniform(spec).expand(horizon, -1, -1)
        if start is None:
            return cls(spec, everywhere)
        chosen = torch.nn.functional.one_hot(start, spec.most_values).to(everywhere)
        return cls(spec, SURE * chosen + (1 - SURE) * everywhere)

    @staticmethod
    def _uniform(spec: ActionSpec) -> Tensor:
        """(width, values)."""
        ids = torch.arange(spec.most_values, device=spec.num_values.device)
        there = (ids < spec.num_values[:, None]).float()
        return there / there.sum(-1, keepdim=True)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return tuple(self.probabilities.shape)

    def candidates(self, noise: Tensor) -> Tensor:
        share = torch.special.ndtr(noise.double()).clamp(1e-12, 1 - 1e-12)
        gumbel = -(-share.log()).log()
        return (self.probabilities.log() + gumbel.to(self.probabilities)).argmax(-1)

    def center(self) -> Tensor:
        return self.probabilities.argmax(-1)

    def fitted(
        self, candidates: Tensor, weights: Tensor, keep: float, keep_width: bool
    ) -> CategoricalDraws:
        chosen = torch.nn.functional.one_hot(candidates, self.spec.most_values)
        share = (weights[:, None, None, None].to(self.probabilities) * chosen).sum(0)
        moved = keep * self.probabilities + (1 - keep) * share
        mixed = (1 - FLOOR) * moved + FLOOR * self._uniform(self.spec)
        return replace(self, probabilities=mixed)
