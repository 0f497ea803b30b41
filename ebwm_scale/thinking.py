"""Thinking: refine candidates with more, smaller, noisier or fewer steps than training did, from several starts, and keep the lowest energy.

    for each step:
        E, g  = energy(x), dE/de                       of every row that still moves
        x'    = descend(x, g, alpha)
        accept only if lower:  x <- x' where E(x') < E(x); elsewhere x stays what it was, and its alpha is halved
        stop early:            a row whose energy fell by less than `tolerance` moves no more
    of several starts per row the one with the lowest final energy is the prediction

A row is one candidate for one position: of a prompt's next position (CachedScore), or of every position of a sequence (SequenceScore). No second-order
graph is built, and memory does not depend on the number of steps. Source: EBWM, arXiv 2406.08862; EBT, arXiv 2507.02092, section on thinking.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .errors import ConfigError
from .model.cached import ObservedCache
from .noise import NoiseSource, Purpose
from .refinement import MIN_STEP_SIZE
from .training.validation import EVALUATION_STEP


@dataclass(frozen=True)
class ThinkingRules:
    """num_steps, step_size: default those of training. noise: Langevin, its deviation. num_starts: random initial states per row.

    tolerance: a row stops when a step lowers its energy by no more than this; None: never. seed: of noise and initial states.
    """

    num_steps: int | None = None
    step_size: float | None = None
    noise: float = 0.0
    num_starts: int = 1
    accept_only_if_lower: bool = False
    tolerance: float | None = None
    seed: int = 33

    def __post_init__(self):
        for name, value, low in (
            ("num_steps", self.num_steps, 1),
            ("num_starts", self.num_starts, 1),
            ("noise", self.noise, 0),
            ("tolerance", self.tolerance, 0),
        ):
            if value is not None and value < low:
                raise ConfigError(f"{name} is {value}: must be {low} or more")
        if self.step_size is not None and self.step_size <= 0:
            raise ConfigError(f"step_size is {self.step_size}: must be above 0")

    @property
    def compares(self) -> bool:
        """Whether energies after a step are needed."""
        return self.accept_only_if_lower or self.tolerance is not None


class Score(Protocol):
    """Energies of rows that know their context."""

    def __call__(self, embedded: Tensor, landscape: int) -> Tensor:
        """(B, K) of embedded candidates (B, K, D)."""

    def with_gradient(self, embedded: Tensor, landscape: int) -> tuple[Tensor, Tensor]:
        """The same, and dE/d embedded (B, K, D)."""

    def select(self, rows: Tensor) -> "Score":
        """The same for some of the B."""


@dataclass
class Thought:
    """state (B, K, size), energy (B, K) of it in the last landscape, steps (B, K) that were taken, trace (N + 1, B, K): energy before and after each step.

    energy is None, and trace (N, B, K) ends before the last step, where think was not asked for the final energy.

    trace is measured in the landscape of the step (the last entry in the last one's); where nothing is compared it holds what was computed anyway.
    """

    state: Tensor
    energy: Tensor | None
    steps: Tensor
    trace: Tensor
    accepted: Tensor  # (B, K) steps that changed the state


@torch.no_grad()
def think(
    model,
    score: Score,
    x: Tensor,
    rules: ThinkingRules,
    *,
    noise: "Noise",
    with_energy: bool = True,
) -> Thought:
    """Refine rows x (B, K, size), which are the caller's to overwrite. noise: where Langevin numbers come from.

    with_energy: False saves the pass that only measures where the last step ended; rules that compare energies have made it anyway.
    """
    num_steps = rules.num_steps or model.config.refinement.num_steps
    landscapes, state_space = model.landscapes(num_steps), model.state
    alpha = (
        model.step_size.detach().squeeze(0).clamp(min=MIN_STEP_SIZE)
        if rules.step_size is None
        else torch.tensor(rules.step_size, device=x.device)
    )
    B, K, _ = x.shape
    moving = torch.arange(
        B, device=x.device
    )  # rows of the batch that still move; `whole` collects them
    whole = x if rules.compares else None
    scale = torch.ones(B, K, 1, device=x.device, dtype=x.dtype)
    steps, accepted = (torch.zeros(B, K, dtype=torch.int64, device=x.device) for _ in range(2))
    active = torch.ones(B, K, dtype=torch.bool, device=x.device)
    trace, energy, measured_in, part = [], None, None, score

    def energy_of(x: Tensor, landscape: int) -> Tensor:
        return part(state_space.enter(x.clone()).embedded, landscape)

    for i, landscape in enumerate(landscapes):
        before = x.clone() if rules.compares else None
        if rules.compares and measured_in != landscape:
            energy, measured_in = energy_of(x, landscape), landscape
        if rules.noise:
            x = x + rules.noise * noise.langevin(i)[moving]
        entered = state_space.enter(x)
        here, gradient = part.with_gradient(entered.embedded, landscape)
        proposal = state_space.descend(
            entered, gradient, (alpha * scale).to(gradient.dtype), None, None
        ).x
        if not rules.compares:
            trace.append(here)
            x, steps, accepted = proposal, steps + 1, accepted + 1
            continue
        trace_row = (
            torch.full((B, K), float("nan"), device=x.device, dtype=energy.dtype)
            if not trace
            else trace[-1].clone()
        )
        trace_row[moving] = energy
        trace.append(trace_row)
        after = energy_of(proposal, landscape)
        taken = active & (after < energy) if rules.accept_only_if_lower else active.clone()
        steps[moving] += active
        accepted[moving] += taken
        x = torch.where(taken[..., None], proposal, before)
        if rules.accept_only_if_lower:
            scale = torch.where(taken[..., None] | ~active[..., None], scale, scale / 2)
        fallen = torch.where(taken, energy - after, torch.zeros_like(energy))
        energy = torch.where(taken, after, energy)
        if rules.tolerance is not None:
            active &= fallen > rules.tolerance
        whole[moving] = x
        going = active.any(1)
        if not going.any():
            break
        if going.sum() * 2 <= len(
            moving
        ):  # compute only what still moves, where that is worth a copy
            kept = going.nonzero().squeeze(1)
            moving, x, scale, active, energy, part = (
                moving[kept],
                x[kept],
                scale[kept],
                active[kept],
                energy[kept],
                part.select(kept),
            )
    if not with_energy and not rules.compares:
        return Thought(x, None, steps, torch.stack(trace), accepted)
    x = whole if rules.compares else x
    part = score
    final = energy_of(x, landscapes[-1])
    trace += [final] * (num_steps + 1 - len(trace))
    return Thought(x, final, steps, torch.stack(trace), accepted)


def lowest(thought: Thought) -> tuple[Tensor, Tensor, Tensor]:
    """Of the K starts of each row: (state (B, size), energy (B,), which start (B,)) with the lowest energy."""
    best = thought.energy.argmin(1)
    rows = torch.arange(len(best), device=best.device)
    return thought.state[rows, best], thought.energy[rows, best], best


class CachedScore:
    """K candidates for the next position of each prompt. contexts: landscape -> cache; last: the last observed embedding (B, D)."""

    def __init__(self, model, caches: dict[int, ObservedCache], last: Tensor):
        self.model, self.caches, self.last = model, caches, last

    def __call__(self, embedded: Tensor, landscape: int) -> Tensor:
        return self._cache(landscape).energy(
            self.model.predicted_rows(embedded, self.last[:, None]), landscape
        )

    def with_gradient(self, embedded: Tensor, landscape: int) -> tuple[Tensor, Tensor]:
        return self._cache(landscape).energy_and_gradient(
            self.model.predicted_rows(embedded, self.last[:, None]), landscape
        )

    def _cache(self, landscape: int) -> ObservedCache:
        return self.caches[0 if self.model.network.shares_context else landscape]

    def select(self, rows: Tensor) -> "CachedScore":
        return CachedScore(
            self.model,
            {key: cache.select(rows) for key, cache in self.caches.items()},
            self.last[rows],
        )


class SequenceScore:
    """One candidate for every position of a sequence; observed: embeddings (B, S, D)."""

    def __init__(self, model, observed: Tensor, contexts: dict | None = None):
        self.model, self.observed, self.contexts = (
            model,
            observed,
            {} if contexts is None else contexts,
        )

    def __call__(self, embedded: Tensor, landscape: int) -> Tensor:
        network = self.model.network
        key = 0 if network.shares_context else landscape
        if key not in self.contexts:
            with torch.no_grad():
                self.contexts[key] = network.encode(self.observed, landscape)
        return network.energy(
            self.model.predicted_rows(embedded, self.observed), self.contexts[key], landscape
        )

    def with_gradient(self, embedded: Tensor, landscape: int) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            embedded = embedded.detach().requires_grad_()
            energy = self(embedded, landscape)
            return energy.detach(), torch.autograd.grad(energy.sum(), embedded)[0]

    def select(self, rows: Tensor) -> "SequenceScore":
        contexts = {
            key: type(c)([(k[rows], v[rows]) for k, v in c.keys_values], c.offset)
            for key, c in self.contexts.items()
        }
        return SequenceScore(self.model, self.observed[rows], contexts)


class Noise:
    """Initial states and Langevin noise, addressed by (seed, start, sample, position): nothing depends on batching.

    The first start is the one that validation uses in training.
    """

    def __init__(self, model, rules: ThinkingRules, sample_ids: Tensor):
        self.model, self.rules, self.sample_ids = model, rules, sample_ids

    def initial(self, last: Tensor | None) -> Tensor:
        """x_0 (B, K, size). last: the last observed state of each row, (B, 1 or K, size), for frames that start from it."""
        noise = self.normal(Purpose.INITIAL_STATE)
        kind = self.model.config.state.initial
        if kind == "zeros":
            return torch.zeros_like(noise)
        return last.to(noise.dtype).expand_as(noise).clone() if kind == "most_recent" else noise

    def langevin(self, step: int) -> Tensor:
        return self.normal(Purpose.LANGEVIN + step)

    def normal(self, purpose: int) -> Tensor:
        """N(0, 1), (B, K, size)."""
        raise NotImplementedError

    def _rows(self, sample_ids: Tensor, purpose: int, start: int, first: int, count: int) -> Tensor:
        weight = self.model.network.head.weight
        return NoiseSource(self.rules.seed, EVALUATION_STEP + start).normal(
            sample_ids,
            count,
            self.model.state.size,
            purpose=purpose,
            device=weight.device,
            first_position=first,
            dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32,
        )


class NextNoise(Noise):
    """Of num_starts candidates for one position of each sample: positions (B,)."""

    def __init__(self, model, rules: ThinkingRules, sample_ids: Tensor, positions: Tensor):
        super().__init__(model, rules, sample_ids)
        self.positions = positions.tolist()

    def normal(self, purpose: int) -> Tensor:
        return torch.cat(
            [
                torch.cat(
                    [
                        self._rows(self.sample_ids[b : b + 1], purpose, start, position, 1)
                        for start in range(self.rules.num_starts)
                    ],
                    1,
                )
                for b, position in enumerate(self.positions)
            ]
        )


class SequenceNoise(Noise):
    """Of one start's candidates for positions 0 .. num_positions - 1 of each sample."""

    def __init__(
        self, model, rules: ThinkingRules, sample_ids: Tensor, num_positions: int, start: int = 0
    ):
        super().__init__(model, rules, sample_ids)
        self.num_positions, self.start = num_positions, start

    def normal(self, purpose: int) -> Tensor:
        return self._rows(self.sample_ids, purpose, self.start, 0, self.num_positions)
