"""Planning down the gradient of the energy, in imagined states and actions together.

    x = imagined under a                                      of each of several starts
    for each round, a few times:
        J      = U(x, a) + w pull(x)                          joint_energy.py; pull: to the goal
        x     <- x - eta dJ/dx
        a     <- a - beta m / max |m|                         m: dJ/da, averaged over a few steps
    a is evaluated by what the model imagines under it, x starts there again; the best a is kept

A step in x is a step of refinement that the goal pulls: the last frame is drawn to the goal, each
frame tells the one before it, and the actions, what would make these frames likely. A plan counts
by its imagined future alone, so states that no actions lead to cannot pass for a plan.

Numbers stay between their bounds. Ids move as probabilities p, in which the energy is
differentiable, by mirror descent: log p moves along -dJ/dp. So an id that has become unlikely comes
back as fast as it went, which steps through the softmax do not do. What is evaluated is the
likeliest id.

An evaluation is a future: one that is imagined, or one whose gradient is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ebwm_scale.control.solvers.problem import Problem

Imagine = Callable[[Tensor], Tensor]  # actions (N, H, width) -> states (N, H, P, dimension)
Gradients = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (x, a) -> dJ/dx, dJ/da


@dataclass(frozen=True)
class JointDescent:
    """The solver gradient.

    imagine: futures of actions as numbers or ids. gradients: of J in states and in actions, which
    are numbers, or probabilities (N, H, width, values). rounds, steps: of each start. state_step:
    eta. action_step: of Adam, in units of the distance between the bounds, or of logits.
    """

    imagine: Imagine
    gradients: Gradients
    rounds: int = 3
    steps: int = 8
    state_step: float = 0.5
    action_step: float = 0.2
    logit_step: float = 2.0
    sureness: float = 0.5  # the first logit of the id to start from, above the others'

    def __call__(self, problem: Problem) -> None:
        starts, rounds, steps = self.plan_of(problem.left)
        actions = self._starts(problem, starts)
        free = self._free(problem, actions)
        problem.evaluate(actions)
        problem.end_iteration()
        scaled = _Scaled(free)
        for _ in range(rounds):
            x = self.imagine(actions)
            for _ in range(steps):
                of_x, of_a = self._gradients(problem, x, free)
                problem.count(len(actions))
                x = x - self.state_step * of_x
                free = self._bounded(problem, free - self._step(problem) * scaled(of_a))
            actions = self._chosen(problem, free)
            problem.evaluate(actions)
            problem.end_iteration()

    def plan_of(self, budget: int) -> tuple[int, int, int]:
        """(starts, rounds, steps) that a budget allows.

        Of each start: its own evaluation, and in each round a future, steps and an evaluation. That
        future is the one just evaluated, and is counted once.
        """
        rounds, steps = self.rounds, self.steps
        while rounds > 1 and 1 + rounds * (steps + 1) > budget:
            rounds -= 1
        while steps > 1 and 1 + rounds * (steps + 1) > budget:
            steps -= 1
        if 1 + rounds * (steps + 1) > budget:
            return 1, 0, 0
        return budget // (1 + rounds * (steps + 1)), rounds, steps

    def _starts(self, problem: Problem, count: int) -> Tensor:
        """Candidates (count, H, width): what there is to start from, and others from anywhere."""
        actions = problem.uniform(count)
        if problem.start is not None:
            actions = torch.cat([problem.start[None].to(actions), actions[1:]])
        return actions

    def _free(self, problem: Problem, actions: Tensor) -> Tensor:
        """What is moved: the numbers, or logits (N, H, width, values)."""
        if not problem.spec.is_discrete:
            return actions
        chosen = F.one_hot(actions, problem.spec.most_values).float()
        logits = self.sureness * chosen
        return logits.masked_fill(~_there(problem), -torch.inf)

    def _gradients(self, problem: Problem, x: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
        if not problem.spec.is_discrete:
            return self.gradients(x, free)
        of_x, of_p = self.gradients(x, free.softmax(-1))
        # Adding a number to all of a column's logits changes nothing.
        there = _there(problem)
        mean = (of_p * there).sum(-1, keepdim=True) / there.sum(-1, keepdim=True)
        return of_x, (of_p - mean) * there

    def _step(self, problem: Problem) -> Tensor | float:
        if problem.spec.is_discrete:
            return self.logit_step
        return self.action_step * (problem.spec.high - problem.spec.low)

    def _bounded(self, problem: Problem, free: Tensor) -> Tensor:
        if problem.spec.is_discrete:
            return free
        return free.clamp(problem.spec.low, problem.spec.high)

    def _chosen(self, problem: Problem, free: Tensor) -> Tensor:
        return free.argmax(-1) if problem.spec.is_discrete else free


def _there(problem: Problem) -> Tensor:
    """(width, values): which ids each column has."""
    counts = problem.spec.num_values
    return torch.arange(problem.spec.most_values, device=counts.device) < counts[:, None]


class _Scaled:
    """Gradients (N, ..) averaged over the last steps, of each start in units of its largest one.

    Which is remembered for a while: where all become small, a start is near, and steps shorten.
    """

    def __init__(self, like: Tensor, kept: float = 0.5, remembered: float = 0.9):
        self.mean = torch.zeros_like(like)
        self.largest = torch.zeros_like(like.flatten(1)[:, 0])
        self.kept, self.remembered = kept, remembered
        self.count = 0

    def __call__(self, gradient: Tensor) -> Tensor:
        self.count += 1
        self.mean = self.kept * self.mean + (1 - self.kept) * gradient
        mean = self.mean / (1 - self.kept**self.count)
        largest = gradient.flatten(1).abs().amax(1)
        self.largest = torch.maximum(self.remembered * self.largest, largest)
        return mean / (self.largest + 1e-12).view(-1, *[1] * (gradient.dim() - 1))
