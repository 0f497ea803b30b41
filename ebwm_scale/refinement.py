"""The refinement loop: a prediction starts as noise and descends the energy; the loss sees every step, or the last.

    x_0 ~ N(0, 1)
    for i in 0 .. N - 1:
        e       = enter(x_i)                                the state's own linear map
        E, g    = energy(e, context), dE/de                 the inner gradient
        x_(i+1) = descend(x_i, g, alpha)                    x - alpha * dE/dx
        loss_i  = criterion(x_(i+1), target)                back-propagated here, unless the graph is full (term_gradients.py)
    loss = mean of loss_i, or loss_(N-1)                    its gradient goes through g: a double backward

Three independent choices (design: EBWM arXiv 2406.08862, EBT arXiv 2507.02092):
    graph   detach: each step on its own;  truncate: only the last step has a graph;  full: back-propagate through all steps
    loss    every: the mean over steps;    last: the last step's
    update  of the state, see model/states.py
S1 = detach + every; S2 = truncate + last; the paper's Algorithm 1 = full + last.
"""
from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Callable, Protocol, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .config import RefinementConfig
from .model.energy import Context
from .term_gradients import TermGradients

MIN_STEP_SIZE = 1e-4


class Draws(Protocol):
    """The random numbers of one refinement, wherever they come from (training: draws.py; parity: recorded ones)."""

    def initial(self) -> Tensor:
        """x_0 (B, S, size)."""

    def step_size_factor(self) -> Tensor | float:
        """Factor on alpha: a number or (B, S, 1)."""

    def langevin(self, step: int) -> Tensor | None:
        """(B, S, size) added to the state before a step, or None."""


@dataclass
class Refinement:
    """loss: scalar with graph (None without targets); the rest is detached. energy_per_step[i] is before step i, loss_per_step after."""
    loss: Tensor | None
    loss_per_step: list[Tensor]
    energy_per_step: list[Tensor]
    state: Tensor | None


@dataclass(frozen=True)
class StepRecord:
    """One step in full, for inspection: energy (B, S), gradient dE/d embed(x) (B, S, D), next state (B, S, size)."""
    energy: Tensor
    gradient: Tensor
    state: Tensor


def refine(world_model, observed: Tensor, targets: Tensor | None, *, rules: RefinementConfig, landscapes: Sequence[int], draws: Draws,
           training: bool, keep_state: bool = False, record: Callable[[StepRecord], None] | None = None) -> Refinement:
    """Refine one candidate per position of the observed embeddings (B, S, D); `landscapes` has one landscape index per step.

    targets: token ids (B, S) or embeddings (B, S, size), or None (inference). keep_state: return the final state.
    training False builds no second-order graph. The returned loss is exact for every combination of graph, loss and update.
    """
    network, state = world_model.network, world_model.state
    step_size = world_model.step_size.squeeze(0).clamp(min=MIN_STEP_SIZE) * draws.step_size_factor()
    terms = None                # where no graph leads from step to step, each step's loss is back-propagated at once
    if training and rules.graph != "full" and targets is not None and torch.is_grad_enabled():
        terms = TermGradients(world_model.parameters())
        step_size, state = terms.cut(step_size), state.cut(terms.cut)
    seen = observed if terms is None else terms.cut(observed)

    def has_graph(i: int) -> bool:
        every = rules.graph == "full" or (rules.graph == "detach" and rules.loss == "every")
        return training and (every or i == num_steps - 1) and i < num_steps

    def context_of(landscape: int) -> int:
        return 0 if network.shares_context else landscape

    def weight_of(i: int) -> float:
        """Of step i's loss in the total."""
        return 1 / num_steps if rules.loss == "every" else float(i == num_steps - 1)

    num_steps = len(landscapes)
    readers = Counter(context_of(landscape) for i, landscape in enumerate(landscapes) if has_graph(i))
    contexts: dict[int, Context] = {}       # one per landscape, or one for all: the observed stream is never encoded twice
    losses, energies, x, entered = [], [], draws.initial(), None
    for i, landscape in enumerate(landscapes):
        last, key = i == num_steps - 1, context_of(landscape)
        langevin = draws.langevin(i)
        if langevin is not None:
            x = x + langevin

        if key not in contexts:
            with torch.set_grad_enabled(readers[key] > 0):
                shared = terms is not None and readers[key] > 1
                context = network.encode(observed if shared else seen, landscape)
                contexts[key] = context.cut(terms.cut) if shared else context
        with torch.set_grad_enabled(has_graph(i)):
            entered, x = entered or state.enter(x), None    # nobody holds x, the largest tensor of all: entered has what is needed
            embedded = world_model.predicted_rows(entered.embedded, seen)
        energy, gradient = energy_and_gradient(network, embedded, contexts[key], landscape, create_graph=has_graph(i),
                                               mode=rules.checkpoint)
        with torch.set_grad_enabled(has_graph(i) or has_graph(i + 1)):
            alpha = step_size if has_graph(i) else step_size.detach()
            connected = has_graph(i) and rules.graph == "full"
            x, entered, loss = state.descend(entered, gradient, alpha, targets, connected=connected, go_on=not last,
                                             keep_state=record is not None or (keep_state if last else rules.noise > 0),
                                             loss_weight=weight_of(i) if has_graph(i) else 0.0)
        if terms is not None and has_graph(i):
            terms.add(loss * weight_of(i))
        losses.append(loss if connected or loss is None else loss.detach())
        energies.append(energy.detach().mean())
        if record is not None:
            record(StepRecord(energy.detach(), gradient.detach(), x.detach()))

    total = None
    if targets is not None:
        total = losses[-1] if rules.loss == "last" else torch.stack(losses).mean()
        total = total if terms is None else terms.total(total)
    return Refinement(total, [] if targets is None else [loss.detach() for loss in losses], energies, None if x is None else x.detach())


def energy_and_gradient(network, embedded: Tensor, context: Context, landscape: int, *, create_graph: bool,
                        mode: str = "none") -> tuple[Tensor, Tensor]:
    """E (B, S) and g = d(sum E)/d embedded (B, S, D). With create_graph both are differentiable with respect to everything.

    mode: "none", or activation checkpointing of the whole "step" or of each "block".
    """
    if not create_graph:
        embedded = embedded.detach().requires_grad_()

    def compute(embedded: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            energy = network.energy(embedded, context, landscape, checkpoint_blocks=create_graph and mode == "block")
            gradient, = torch.autograd.grad(energy.sum(), embedded, create_graph=create_graph)
        return energy, gradient

    if create_graph and mode == "step":
        return checkpoint(compute, embedded, context, use_reentrant=False)
    return compute(embedded, context)
