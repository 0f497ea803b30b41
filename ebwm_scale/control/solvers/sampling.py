"""Solvers that compare drawn candidates: random, CEM, iCEM and MPPI.

CEM: Rubinstein 1999. iCEM: arXiv 2008.06389. MPPI: arXiv 1509.01149, here with a temperature in
units of the costs' own spread, so that it does not depend on their scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ebwm_scale.control.solvers.draws import Draws, first_draws
from ebwm_scale.control.solvers.problem import Problem

LEAST = 4  # candidates of an iteration


@dataclass(frozen=True)
class RandomShooting:
    """The best of `budget` candidates from anywhere; all in one iteration."""

    def __call__(self, problem: Problem) -> None:
        problem.evaluate(problem.uniform(max(1, problem.left)))
        problem.end_iteration()


@dataclass(frozen=True)
class CrossEntropy:
    """CEM.

    iterations: the budget is shared among them. elite_share: of an iteration's candidates, those
    that the next one is drawn around. momentum: the share of what the draws were.
    """

    iterations: int = 4
    elite_share: float = 0.125
    momentum: float = 0.1

    def __call__(self, problem: Problem) -> None:
        draws = first_draws(problem)
        for count in shares(problem.left, self.iterations):
            noise = torch.randn(count, *draws.noise_shape, generator=problem.generator)
            candidates = with_center(draws, draws.candidates(noise.to(_device(problem))))
            costs = problem.evaluate(candidates)
            problem.end_iteration()
            elites = candidates[costs.argsort(stable=True)[: _num_elites(count, self.elite_share)]]
            draws = draws.fitted(elites, _equal(elites), self.momentum, keep_width=False)


@dataclass(frozen=True)
class ImprovedCrossEntropy:
    """iCEM: CEM with draws that are alike from step to step, and elites that are kept.

    colour: the exponent b of the noise's power 1 / f^b over time; 0 is white. kept_share: of the
    elites, those that stand for election again.
    """

    iterations: int = 4
    elite_share: float = 0.125
    momentum: float = 0.1
    colour: float = 2.0
    kept_share: float = 0.3

    def __call__(self, problem: Problem) -> None:
        draws = first_draws(problem)
        kept: Tensor | None = None
        for count in shares(problem.left, self.iterations):
            num_kept = 0 if kept is None else min(len(kept), count - 1)
            noise = coloured_noise(
                count - num_kept, draws.noise_shape, self.colour, problem.generator
            )
            candidates = with_center(draws, draws.candidates(noise.to(_device(problem))))
            if kept is not None:
                candidates = torch.cat([candidates, kept[:num_kept]])
            costs = problem.evaluate(candidates)
            problem.end_iteration()
            order = costs.argsort(stable=True)
            elites = candidates[order[: _num_elites(count, self.elite_share)]]
            kept = elites[: max(1, round(self.kept_share * len(elites)))]
            draws = draws.fitted(elites, _equal(elites), self.momentum, keep_width=False)


@dataclass(frozen=True)
class PathIntegral:
    """MPPI. temperature: in standard deviations of an iteration's costs."""

    iterations: int = 4
    temperature: float = 0.3

    def __call__(self, problem: Problem) -> None:
        draws = first_draws(problem)
        for count in shares(problem.left, self.iterations):
            noise = torch.randn(count, *draws.noise_shape, generator=problem.generator)
            candidates = with_center(draws, draws.candidates(noise.to(_device(problem))))
            costs = problem.evaluate(candidates)
            problem.end_iteration()
            draws = draws.fitted(candidates, self._weights(costs), 0.0, keep_width=True)

    def _weights(self, costs: Tensor) -> Tensor:
        """(N,) of sum 1; candidates without a finite cost have none."""
        costs = costs.double()
        finite = costs.isfinite()
        if not bool(finite.any()):
            return torch.full_like(costs, 1 / len(costs))
        spread = costs[finite].std(correction=0).clamp(min=1e-12)
        scaled = -(costs - costs[finite].min()) / (self.temperature * spread)
        return scaled.softmax(0)


def shares(budget: int, iterations: int) -> list[int]:
    """How many candidates each iteration has: about equal, none below LEAST, at most `budget`."""
    count = max(1, min(iterations, budget // LEAST))
    size, rest = divmod(max(1, budget), count)
    return [size + (number < rest) for number in range(count)]


def coloured_noise(
    count: int, shape: tuple[int, ...], exponent: float, generator: torch.Generator
) -> Tensor:
    """N(0, 1) numbers (count, *shape) whose power over time, shape[0], falls as 1 / f^exponent.

    Source: Timmer and König 1995, as iCEM uses it; frequency 0 has the power of the lowest one.
    """
    white = torch.randn(count, *shape, generator=generator)
    num_steps = shape[0]
    if exponent == 0 or num_steps < 2:
        return white
    frequencies = torch.fft.rfftfreq(num_steps)
    frequencies[0] = frequencies[1]
    scale = frequencies.pow(-exponent / 2)
    # The power of all frequencies sums to that of white noise: inner ones stand for two.
    power = scale.square()
    doubled = power.clone()
    doubled[1 : (num_steps + 1) // 2] *= 2
    scale = scale * (num_steps / doubled.sum()).sqrt()
    spectrum = torch.fft.rfft(white, dim=1)
    scale = scale.view(1, -1, *[1] * (white.dim() - 2))
    return torch.fft.irfft(spectrum * scale, n=num_steps, dim=1)


def with_center(draws: Draws, candidates: Tensor) -> Tensor:
    """Candidates, the last of them the middle of the draws.

    Last, so that among equals a drawn one wins: who sees no difference acts at random.
    """
    if len(candidates) == 1:
        return candidates
    return torch.cat([candidates[:-1], draws.center()[None].to(candidates)])


def _num_elites(count: int, share: float) -> int:
    return min(count, max(2, round(count * share)))


def _equal(elites: Tensor) -> Tensor:
    return torch.full((len(elites),), 1 / len(elites), device=elites.device)


def _device(problem: Problem) -> torch.device:
    return problem.spec.observe.device
