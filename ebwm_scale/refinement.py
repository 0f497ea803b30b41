"""The refinement loop: a prediction starts as noise and descends the energy; the loss sees every step, or the last.

    x_0 ~ N(0, 1)
    for i in 0 .. N - 1:
        e       = enter(x_i)                                the state's own linear map
        E, g    = energy(e, context), dE/de                 the inner gradient
        x_(i+1) = descend(x_i, g, alpha)                    x - alpha * dE/dx
        loss_i  = criterion(x_(i+1), target)                back-propagated here, unless the graph is full (term_gradients.py)
    loss = mean of loss_i, or loss_(N-1)                    its gradient goes through g: a double backward

Rows, that is (sample, position) pairs, do not see each other's candidates. So the loop runs over tiles of rows, one after the other, and
memory depends neither on the batch, nor on the vocabulary, nor (unless the graph is full) on N:

    for each group of samples:      contexts: its observed stream, encoded once per landscape, back-propagated once
        for each tile of positions: the steps above

Three independent choices (design: EBWM arXiv 2406.08862, EBT arXiv 2507.02092):
    graph   detach: each step on its own;  truncate: only the last step has a graph;  full: back-propagate through all steps
    loss    every: the mean over steps;    last: the last step's
    update  of the state, see model/states.py
S1 = detach + every; S2 = truncate + last; the paper's Algorithm 1 = full + last.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from dataclasses import dataclass
from typing import Callable, Iterator, Protocol, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import block_sweeps
from .config import RefinementConfig
from .model.energy import Context
from .term_gradients import Cut, TermGradients

MIN_STEP_SIZE = 1e-4
TILE_BYTES = {
    "cpu": 32 * 2**20,
    "cuda": 512 * 2**20,
}  # of state (float32) in a tile: large enough for efficient products


class Draws(Protocol):
    """The random numbers of one refinement, wherever they come from (training: draws.py; parity: recorded ones)."""

    def of(self, samples: slice, positions: slice) -> "Draws":
        """The numbers of a part of the batch."""

    def initial(self) -> Tensor:
        """x_0 (B, S, size); the caller's to overwrite."""

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


def refine(
    world_model,
    observed: Tensor,
    targets: Tensor | None,
    *,
    rules: RefinementConfig,
    landscapes: Sequence[int],
    draws: Draws,
    training: bool,
    keep_state: torch.dtype | None = None,
    record: Callable[[StepRecord], None] | None = None,
) -> Refinement:
    """Refine one candidate per position of the observed embeddings (B, S, D); `landscapes` has one landscape index per step.

    targets: token ids (B, S) or embeddings (B, S, size), or None (inference). keep_state: return the final state, in this precision.
    record: called after every step with the whole batch, which is then one tile.
    training False builds no second-order graph. The returned loss is exact for every combination of graph, loss and update, and can be
    back-propagated once.
    """
    terms = (
        TermGradients() if training and targets is not None and torch.is_grad_enabled() else None
    )
    num_samples, num_positions = observed.shape[:2]
    rows = (
        num_samples * num_positions
        if record
        else tile_rows(rules, world_model.state.size, observed.device)
    )
    seen = observed if terms is None else terms.source(observed)
    with contextlib.nullcontext() if terms is None else terms.stand_in(world_model):
        loop = _Loop(
            world_model,
            rules,
            landscapes,
            training,
            terms,
            keep_state,
            record,
            None if targets is None else world_model.state.count(targets),
        )
        states = []
        for samples, positions in tiles_of(num_samples, num_positions, rows):
            contexts = _Contexts(
                world_model.network,
                seen[samples],
                loop.readers,
                len(positions),
                terms,
                by_block=rules.checkpoint == "block",
            )
            states += [
                loop.run(
                    seen[samples, part],
                    contexts,
                    None if targets is None else targets[samples, part],
                    part,
                    draws.of(samples, part),
                )
                for part in positions
            ]
        loop.shared.settle()
    state = None
    if keep_state is not None:
        state = torch.cat(states).view(num_samples, num_positions, -1)
    total, losses = None, list(loop.losses)
    if targets is not None:
        total = losses[-1] if rules.loss == "last" else torch.stack(losses).mean()
        total = total if terms is None else terms.total(total)
    return Refinement(
        total,
        [] if targets is None else losses,
        [energy / (num_samples * num_positions) for energy in loop.energies],
        state,
    )


def tile_rows(rules: RefinementConfig, state_size: int, device: torch.device) -> int:
    """Rows refined at a time: refinement.tile_rows, or what keeps a state of them within TILE_BYTES."""
    return rules.tile_rows or max(
        1, TILE_BYTES.get(device.type, TILE_BYTES["cuda"]) // (4 * state_size)
    )


def tiles_of(
    num_samples: int, num_positions: int, rows: int
) -> Iterator[tuple[slice, list[slice]]]:
    """(samples, parts of their positions) that cover a batch, of about the same size and at most `rows` rows, where a sample has more."""
    together = max(1, rows // num_positions)
    parts = _pieces(
        num_positions,
        -(-num_positions * min(together, num_samples) // rows) if together == 1 else 1,
    )
    for samples in _pieces(num_samples, -(-num_samples // together)):
        yield samples, parts


def _pieces(length: int, count: int) -> list[slice]:
    """A range in `count` slices that differ by one at most."""
    edges = [length * i // count for i in range(count + 1)]
    return [slice(*edge) for edge in zip(edges, edges[1:])]


class _Loop:
    """The steps of one refinement: run(...) takes a tile through them; losses and energies add up over tiles."""

    def __init__(
        self,
        world_model,
        rules: RefinementConfig,
        landscapes: Sequence[int],
        training: bool,
        terms: TermGradients | None,
        keep_state: torch.dtype | None,
        record: Callable[[StepRecord], None] | None,
        count: Tensor | None,
    ):
        self.world_model, self.rules, self.landscapes, self.num_steps = (
            world_model,
            rules,
            landscapes,
            len(landscapes),
        )
        self.training, self.terms, self.keep_state, self.record, self.count = (
            training,
            terms,
            keep_state,
            record,
            count,
        )
        self.shared = Cut()  # what all tiles share
        self.step_size = world_model.step_size.squeeze(0).clamp(min=MIN_STEP_SIZE)
        self.state = world_model.state
        if terms is not None:
            self.step_size, self.state = self.shared(self.step_size), self.state.cut(self.shared)
        self.losses: list[Tensor] = [0.0] * self.num_steps
        self.energies: list[Tensor] = [0.0] * self.num_steps
        self.readers = Counter(
            landscape for i, landscape in enumerate(landscapes) if self.has_graph(i)
        )

    def has_graph(self, i: int) -> bool:
        """Whether step i is differentiated."""
        every = self.rules.graph == "full" or (
            self.rules.graph == "detach" and self.rules.loss == "every"
        )
        return self.training and (every or i == self.num_steps - 1) and i < self.num_steps

    def weight_of(self, i: int) -> float:
        """Of step i's loss in the total."""
        return 1 / self.num_steps if self.rules.loss == "every" else float(i == self.num_steps - 1)

    def run(
        self,
        observed: Tensor,
        contexts: "_Contexts",
        targets: Tensor | None,
        positions: slice,
        draws: Draws,
    ) -> Tensor | None:
        """Observed embeddings (b, s, D), targets (b, s) or (b, s, size) of the tile. Returns the final state (b s, size) if it is kept."""
        rules, network = self.rules, self.world_model.network
        full, factor = rules.graph == "full", draws.step_size_factor()
        x, entered, pending = (
            draws.initial(),
            None,
            [],
        )  # pending: (weighted loss, landscape) of steps to be back-propagated together
        for i, landscape in enumerate(self.landscapes):
            last, learned = i == self.num_steps - 1, self.has_graph(i)
            langevin = draws.langevin(i)
            if langevin is not None:
                x = x + langevin

            context = contexts.of(landscape)
            with torch.set_grad_enabled(learned):
                entered, x = (
                    entered or self.state.enter(x),
                    None,
                )  # nobody holds x: entered has what is needed
                embedded = self.world_model.predicted_rows(entered.embedded, observed)
            energy, gradient = energy_and_gradient(
                network,
                embedded,
                context,
                positions,
                landscape,
                create_graph=learned,
                mode=rules.checkpoint,
                compiled=rules.compile,
            )
            with torch.set_grad_enabled(learned or self.has_graph(i + 1)):
                alpha = (self.step_size if learned else self.step_size.detach()) * factor
                keep = self.record is not None or (
                    self.keep_state is not None if last else rules.noise > 0
                )
                x, entered, loss = self.state.descend(
                    entered,
                    gradient,
                    alpha,
                    targets,
                    self.count,
                    connected=learned and full,
                    go_on=not last,
                    keep_state=keep,
                    loss_weight=self.weight_of(i) if learned else 0.0,
                )
                if learned and self.terms is not None:
                    pending.append((loss * self.weight_of(i), landscape))
            if pending and (last or not full):
                self.back_propagate(pending, contexts)
            if loss is not None:
                self.losses[i] = self.losses[i] + loss.detach()
            self.energies[i] = self.energies[i] + energy.detach().sum()
            if self.record is not None:
                self.record(StepRecord(energy.detach(), gradient.detach(), x.detach().clone()))
        return None if self.keep_state is None else x.detach().flatten(0, 1).to(self.keep_state)

    @staticmethod
    def back_propagate(pending: list[tuple[Tensor, int]], contexts: "_Contexts") -> None:
        sum(loss for loss, _ in pending).backward()
        for _, landscape in pending:
            contexts.done(landscape)
        pending.clear()


class _Contexts:
    """The observed stream of a group of samples: encoded once for all steps and tiles that see the same, back-propagated once."""

    def __init__(
        self,
        network,
        observed: Tensor,
        readers: Counter,
        num_tiles: int,
        terms: TermGradients | None,
        *,
        by_block: bool,
    ):
        self.network, self.observed, self.terms, self.by_block = network, observed, terms, by_block
        self.contexts: dict[int, tuple[Context, Cut]] = {}
        self.readers: Counter = Counter()  # how often each is still to be differentiated
        for landscape, count in readers.items():
            self.readers[self._key(landscape)] += count * num_tiles

    def _key(self, landscape: int) -> int:
        return 0 if self.network.shares_context else landscape

    def of(self, landscape: int) -> Context:
        key = self._key(landscape)
        if key not in self.contexts:
            cut = Cut()
            with torch.set_grad_enabled(self.terms is not None and self.readers[key] > 0):
                context = self.network.encode(self.observed, landscape, by_block=self.by_block)
            self.contexts[key] = (context if self.terms is None else context.cut(cut), cut)
        return self.contexts[key][0]

    def done(self, landscape: int) -> None:
        """A step that sees it has been differentiated."""
        key = self._key(landscape)
        self.readers[key] -= 1
        if self.readers[key] == 0:
            self.contexts.pop(key)[1].settle()


def energy_and_gradient(
    network,
    embedded: Tensor,
    context: Context,
    positions: slice,
    landscape: int,
    *,
    create_graph: bool,
    mode: str = "none",
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """E (B, s) and g = d(sum E)/d embedded (B, s, D) of candidates (B, s, D) for some positions of the context.

    With create_graph both are differentiable with respect to everything.
    mode: "none"; "step": the step is computed again in the backward; "block": one block at a time (block_sweeps.py). compiled: let TorchInductor generate the code of a
    differentiated step, once for each shape, and for each landscape that the blocks are conditioned on.
    """
    if not create_graph:
        embedded = embedded.detach().requires_grad_()
    if create_graph and compiled:
        with torch._dynamo.config.patch(trace_autograd_ops=True, recompile_limit=64):
            return _compiled()(
                network,
                embedded,
                positions.start,
                positions.stop,
                landscape if network.modulations is not None else 0,
                context.offset,
                *(u for pair in context.keys_values for u in pair),
            )

    if mode == "block":
        return block_sweeps.energy_and_gradient(
            network, embedded, context.at(positions), landscape, create_graph=create_graph
        )

    def compute(embedded: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            energy = network.energy(embedded, context.at(positions), landscape)
            (gradient,) = torch.autograd.grad(energy.sum(), embedded, create_graph=create_graph)
        return energy, gradient

    if create_graph and mode == "step":
        return checkpoint(compute, embedded, context, use_reentrant=False)
    return compute(embedded, context)


@functools.cache
def _compiled() -> Callable:
    """Made when it is first needed: asking for a compiler imports one, 90 MiB and a second."""
    return torch.compile(_gradient_inside, fullgraph=True, dynamic=False)


def _gradient_inside(
    network,
    embedded: Tensor,
    start: int,
    stop: int,
    landscape: int,
    offset: int,
    *keys_values: Tensor,
) -> tuple[Tensor, Tensor]:
    """The inner gradient is taken inside: what is compiled is differentiated once, which is all that torch.compile supports."""
    context = Context(list(zip(keys_values[::2], keys_values[1::2])), offset).at(slice(start, stop))
    energy = network.energy(embedded, context, landscape)
    (gradient,) = torch.autograd.grad(energy.sum(), embedded, create_graph=True)
    return energy, gradient
