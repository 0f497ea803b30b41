"""Continuing texts and clips: the observed stream is cached, and only the next prediction of each is refined.

    session = Session(model, prompts)           prefill: keys and values of every prompt, once
    prediction = session.predict()              thinking on the next position of each, given the cache
    session.accept(tokens or states)            one more position

A prompt longer than the context is cut to its end; a row that has filled the context goes on with its later half (prefilled again), so a
position costs the same however long the text becomes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Iterator, Sequence

import torch
from torch import Tensor

from .errors import UserError
from .model.cached import ObservedCache
from .model.world_model import WorldModel
from .thinking import CachedScore, NextNoise, ThinkingRules, Thought, lowest, think


@dataclass
class Prediction:
    """state (B, size): logits of text, an embedding of video; energy (B,), start (B,) and thought of an energy model."""

    state: Tensor
    energy: Tensor | None = None
    start: Tensor | None = None
    thought: Thought | None = None


class Session:
    """Prompts of different lengths, continued together. prompts: tokens (S,) int64, or states (S, dimension), S >= 1.

    sample_ids: what the noise of each is addressed by; default 0, 1, ...  energies: False leaves out the pass that only measures a prediction's
    final energy, unless several starts are compared by it. Raises UserError for an empty prompt.
    """

    def __init__(
        self,
        model: WorldModel,
        prompts: Sequence[Tensor],
        rules: ThinkingRules = ThinkingRules(),
        *,
        sample_ids: Tensor | None = None,
        energies: bool = True,
    ):
        if any(len(prompt) == 0 for prompt in prompts) or not prompts:
            raise UserError(
                "an empty prompt has no position to continue from; give at least one token or frame"
            )
        self.model, self.rules, self.context_length = model, rules, model.config.data.context_length
        self.with_energy = energies or rules.num_starts > 1
        self.is_energy, self.is_text = (
            model.config.model.kind == "energy",
            model.config.state.kind == "vocabulary",
        )
        self.device = next(model.parameters()).device
        self.sample_ids = torch.arange(len(prompts)) if sample_ids is None else sample_ids
        self.rows = [prompt[-self.context_length :].to(self.device) for prompt in prompts]
        landscapes = (
            set(model.landscapes(rules.num_steps or model.config.refinement.num_steps))
            if self.is_energy
            else {0}
        )
        self.landscapes = {0} if not self.is_energy or model.network.shares_context else landscapes
        self.caches: dict[int, ObservedCache] = {}
        self.positions_computed = (
            0  # observed positions that went through the network, per landscape
        )
        self._prefill()

    @torch.no_grad()
    def predict(self) -> Prediction:
        """The next state of every row."""
        if not self.is_energy:
            return Prediction(self.model.output(self.hidden).float())
        lengths = torch.tensor([len(row) for row in self.rows])
        noise = NextNoise(self.model, self.rules, self.sample_ids, lengths - 1)
        last = None if self.is_text else torch.stack([row[-1] for row in self.rows])[:, None]
        thought = think(
            self.model,
            CachedScore(self.model, self.caches, self.last),
            noise.initial(last),
            self.rules,
            noise=noise,
            with_energy=self.with_energy,
        )
        if thought.energy is None:
            return Prediction(thought.state[:, 0], thought=thought)
        state, energy, start = lowest(thought)
        return Prediction(state, energy, start, thought)

    @torch.no_grad()
    def accept(self, chosen: Tensor) -> None:
        """The next observed position of every row: tokens (B,) or states (B, dimension)."""
        self.rows = [
            torch.cat([row, new[None].to(row)])
            for row, new in zip(self.rows, chosen.to(self.device))
        ]
        if any(len(row) > self.context_length for row in self.rows):
            self.rows = [
                row[-max(1, self.context_length // 2) :] if len(row) > self.context_length else row
                for row in self.rows
            ]
            self._prefill()
            return
        self.last = self.model.embed_observed(torch.stack([row[-1] for row in self.rows])[:, None])[
            :, 0
        ]
        for cache in self.caches.values():
            hidden = cache.append(self.last)
        self.hidden = hidden
        self.positions_computed += len(self.rows)

    @torch.no_grad()
    def _prefill(self) -> None:
        lengths = torch.tensor([len(row) for row in self.rows], device=self.device)
        padded = torch.nn.utils.rnn.pad_sequence(self.rows, batch_first=True)
        embedded = self.model.embed_observed(padded)
        self.last = embedded[torch.arange(len(self.rows)), lengths - 1]
        self.caches = {
            landscape: ObservedCache(self.model.network, self.context_length, landscape)
            for landscape in self.landscapes
        }
        for cache in self.caches.values():
            hidden = cache.prefill(embedded, lengths)
        self.hidden = hidden
        self.positions_computed += int(lengths.sum())


@dataclass(frozen=True)
class Sampling:
    """temperature 0: the most probable token. top_k, top_p: only the k most probable, only the fewest that hold probability p."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self):
        if self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}: must be 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}: must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: must be above 0 and at most 1")

    def distribution(self, logits: Tensor) -> Tensor:
        """Probabilities (B, V) of the next token given logits (B, V)."""
        if self.temperature == 0:
            return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(
                torch.float64
            )
        probabilities = (logits.double() / self.temperature).softmax(-1)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            probabilities = torch.where(
                probabilities >= probabilities.topk(self.top_k).values[:, -1:], probabilities, 0
            )
        if self.top_p is not None:
            ordered, places = probabilities.sort(-1, descending=True)
            ordered = ordered / ordered.sum(-1, keepdim=True)
            kept = torch.where(ordered.cumsum(-1) - ordered < self.top_p, ordered, 0)
            probabilities = torch.zeros_like(probabilities).scatter(-1, places, kept)
        return probabilities / probabilities.sum(-1, keepdim=True)


def continue_texts(
    model: WorldModel,
    prompts: Sequence[Tensor],
    count: int,
    *,
    rules: ThinkingRules = ThinkingRules(),
    sampling: Sampling = Sampling(),
    end: int | None = None,
    energies: bool = True,
) -> Iterator[tuple[Tensor, Prediction]]:
    """(tokens (B,), what they were taken from) for each of at most `count` positions; ends when every row has had the token `end`."""
    session = Session(model, prompts, rules, energies=energies)
    generator = torch.Generator().manual_seed(sampling.seed)
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    for index in range(count):
        prediction = session.predict()
        tokens = torch.multinomial(
            sampling.distribution(prediction.state.cpu()), 1, generator=generator
        )[:, 0]
        yield tokens, prediction
        ended |= tokens == end if end is not None else False
        if bool(ended.all()) or index + 1 == count:
            return
        session.accept(tokens)


def continue_states(
    model: WorldModel,
    prompts: Sequence[Tensor],
    count: int,
    *,
    rules: ThinkingRules = ThinkingRules(),
    sample_ids: Tensor | None = None,
) -> Tensor:
    """`count` further states (B, count, dimension) of clips, each predicted from those before it."""
    session, states = Session(model, prompts, rules, sample_ids=sample_ids, energies=False), []
    for index in range(count):
        states.append(session.predict().state)
        if index + 1 < count:
            session.accept(states[-1])
    return torch.stack(states, 1)


@torch.no_grad()
def candidate_energies(model: WorldModel, observed: Tensor, embedded: Tensor) -> Tensor:
    """Energies (K,) in the last landscape of candidates, embedded (K, D), for the position after observed tokens (S,) or states (S, dimension)."""
    seen = model.embed_observed(observed[None])
    landscape = model.network.num_landscapes - 1
    cache = ObservedCache(model.network, len(observed), landscape)
    cache.prefill(seen, torch.tensor([len(observed)], device=seen.device))
    return cache.energy(model.predicted_rows(embedded[None], seen[:, -1:]), landscape)[0].float()


def samples_to_look_at(model: WorldModel, split, *, seed: int) -> dict[str, Any]:
    """What samples.json holds beside the step: {"continuations": [...]} of text, {"clips": [...]} of video."""
    from .data.mixing import MixedSplit

    split = split.parts[0] if isinstance(split, MixedSplit) else split
    if split.manifest.modality == "video":
        from .samples_video import sample_clips

        return {"clips": sample_clips(model, split, seed=seed)}
    from .samples_text import sample_continuations

    return {"continuations": sample_continuations(model, split, seed=seed)}
