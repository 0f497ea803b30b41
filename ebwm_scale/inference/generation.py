"""Continuing texts and clips: the observed stream is cached, only the next prediction is refined.

    session = Session(model, prompts)     prefill: keys and values of every prompt, once
    prediction = session.predict()        thinking on the next position of each, given the cache
    session.accept(tokens or states)      one more position

In a sequence of groups of P positions a prompt holds whole groups, and the next group is predicted
and accepted as one: states (B, P, size), tokens (B, P). Conditions are given per group: those of a
frame lead to the next one, so they come with the prompt, and with each frame that is accepted.

A prompt longer than the context is cut to its end; under data.mask_documents also to its last
document, which is all that the next position sees. A row that has filled the context goes on with
its later half, prefilled again, so a position costs the same however long the text becomes.

Under `refinement.reencode` the earlier positions' predictions shape a step's context. No cache
holds them yet: every prediction thinks over all positions of its row again. A model with a
workspace does so too, since the cache's closed forms know none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ebwm_scale.config import resolved
from ebwm_scale.core.errors import UserError
from ebwm_scale.inference.energy_functions import CachedEnergy, SequenceEnergy
from ebwm_scale.inference.initial_states import NextPositionSampler, SequenceSampler
from ebwm_scale.inference.thinking import (
    ThinkingConfig,
    Thought,
    Watch,
    at_positions,
    lowest,
    think,
    together,
)
from ebwm_scale.model.conditions import Conditions
from ebwm_scale.model.kv_cache import KVCache
from ebwm_scale.world_model import WorldModel


@dataclass
class Prediction:
    """state (B, size), with groups (B, P, size): logits of text, embeddings of video; energy (B,),
    start (B,) and thought of an energy model.
    """

    state: Tensor
    energy: Tensor | None = None
    start: Tensor | None = None
    thought: Thought | None = None


class Session:
    """Prompts of different lengths, continued together.

    prompts: tokens (S,) int64, or states (S, dimension), S >= 1. sample_ids: what the noise of
    each is addressed by; default 0, 1, ... conditions: those of each prompt's groups, tensors
    (T, ..) by name (model/conditions.py). energies False leaves out the pass that only measures a
    prediction's final energy, unless several starts are compared by it.
    Raises UserError for an empty prompt, for one that ends inside a group, and for conditions that
    are not those of the model for every group.
    """

    def __init__(
        self,
        model: WorldModel,
        prompts: Sequence[Tensor],
        config: ThinkingConfig = ThinkingConfig(),
        *,
        sample_ids: Tensor | None = None,
        conditions: Sequence[Conditions] | None = None,
        energies: bool = True,
    ):
        if not prompts or any(len(prompt) == 0 for prompt in prompts):
            raise UserError(
                "an empty prompt has no position to continue from; give at least one token or frame"
            )
        self.group_size = resolved.group_size(model.config)
        for prompt in prompts:
            if len(prompt) % self.group_size:
                raise UserError(
                    f"a prompt has {len(prompt)} positions, the model predicts groups of "
                    f"{self.group_size}: give whole groups"
                )
        self.model = model
        self.config = config
        self.context_length = resolved.context_length(model.config)
        self.with_energy = energies or config.num_starts > 1
        self.is_energy = model.config.model.kind == "energy"
        self.is_text = model.config.state.kind == "vocabulary"
        is_beyond_cache = (
            model.config.refinement.reencode != "none" or model.config.state.workspace is not None
        )
        self.thinks_over_all = self.is_energy and is_beyond_cache
        self.device = next(model.parameters()).device
        self.sample_ids = torch.arange(len(prompts)) if sample_ids is None else sample_ids
        self.rows = []
        for prompt in prompts:
            row = prompt[-self.context_length :].to(self.device)
            self.rows.append(model.visible_prompt(row))
        self.conditions: list[dict[str, Tensor]] = []
        for prompt, own in zip(prompts, conditions or [{}] * len(prompts), strict=True):
            self._check_conditions(own, len(prompt) // self.group_size)
            self.conditions.append({name: value.to(self.device) for name, value in own.items()})
        self._keep_last_conditions()
        self.landscapes = [0]
        if self.is_energy:
            num_steps = config.num_steps or model.config.refinement.num_steps
            self.landscapes = model.landscapes(num_steps)
        self.positions_computed = 0  # that went through the network, per landscape
        self._prefill()

    @torch.no_grad()
    def predict(self, watch: Watch | None = None) -> Prediction:
        """The next state of every row. watch: sees an energy model's states (B, K, size), as of
        think.
        """
        if not self.is_energy:
            assert self.hidden is not None, "a baseline's cache gives its hidden states"
            last = torch.stack([row[-self.group_size :] for row in self.rows])
            output = self.model.prediction_of(self.hidden, last).float()
            return Prediction(self._as_one(output))
        if self.thinks_over_all:
            thought = self._think_over_all(watch)
        else:
            thought = self._think_cached(watch)
        if thought.energy is None:
            first = thought.state[:, : self.group_size]
            return Prediction(self._as_one(first), thought=thought)
        state, energy, start = lowest(thought, self.group_size)
        return Prediction(state, energy, start, thought)

    def _think_cached(self, watch: Watch | None) -> Thought:
        """Of the next position or group alone, (B, K P) rows."""
        lengths = torch.tensor([len(row) for row in self.rows])
        noise = NextPositionSampler(
            self.model,
            self.config.seed,
            self.sample_ids,
            lengths - self.group_size,
            self.config.num_starts,
            self.group_size,
        )
        last_states = None
        if not self.is_text:
            last_states = torch.stack([row[-self.group_size :] for row in self.rows])
            if self.group_size > 1:
                last_states = last_states.repeat(1, self.config.num_starts, 1)
        return think(
            self.model,
            CachedEnergy(self.cache),
            noise.initial(last_states),
            self.config,
            noise=noise,
            with_energy=self.with_energy,
            watch=watch,
        )

    def _think_over_all(self, watch: Watch | None) -> Thought:
        """Of every position of every row; what is returned is the last position's, (B, K) rows.

        With groups: the last group's, (B, K P) rows.
        """
        lengths = torch.tensor([len(row) for row in self.rows], device=self.device)
        padded = torch.nn.utils.rnn.pad_sequence(self.rows, batch_first=True)
        embedded = self.model.embed_observed(padded, self._padded_conditions())
        energy_function = SequenceEnergy(self.model, embedded, self.model.first_visible(padded))
        starts = []
        seen: list[list[Tensor]] = []  # of each start the states after 0, 1, ... steps
        rows = torch.arange(len(lengths), device=self.device)[:, None]
        places = lengths[:, None] - self.group_size
        places = places + torch.arange(self.group_size, device=self.device)

        def watch_last(num_steps: int, states: Tensor) -> None:
            if num_steps == 0:
                seen.append([])
            seen[-1].append(states[rows, places])

        for start in range(self.config.num_starts):
            noise = SequenceSampler(
                self.model, self.config.seed, self.sample_ids, padded.shape[1], start
            )
            initial = noise.initial(None if self.is_text else padded)
            thought = think(
                self.model,
                energy_function,
                initial,
                self.config,
                noise=noise,
                with_energy=self.with_energy,
                watch=None if watch is None else watch_last,
            )
            starts.append(at_positions(thought, lengths - self.group_size, self.group_size))
        self.positions_computed += int(lengths.sum())
        if watch is not None:
            for num_steps in range(max(map(len, seen))):  # a start that has stopped stays
                now = [states[min(num_steps, len(states) - 1)] for states in seen]
                watch(num_steps, torch.cat(now, 1))
        return together(starts)

    @torch.no_grad()
    def accept(self, chosen: Tensor, conditions: Conditions | None = None) -> None:
        """The next observed position of every row: tokens (B,) or states (B, dimension).

        With groups: the next group, tokens (B, P) or states (B, P, dimension). conditions: its own,
        tensors (B, ..).
        """
        if self.group_size == 1:
            chosen = chosen[:, None]
        rows = []
        for row, new in zip(self.rows, chosen.to(self.device)):
            rows.append(torch.cat([row, new.to(row)]))
        self.rows = rows
        for index, own in enumerate(self.conditions):
            new_ones = {name: values[index][None] for name, values in (conditions or {}).items()}
            self._check_conditions(new_ones, 1)
            for name, value in new_ones.items():
                own[name] = torch.cat([own[name], value.to(own[name])])
        seen = [self.model.visible_prompt(self._later_half(row)) for row in rows]
        if any(len(part) < len(row) for part, row in zip(seen, rows)):
            self.rows = seen
            self._keep_last_conditions()
            self._prefill()
            return
        if self.thinks_over_all:
            return
        newest = torch.stack([row[-self.group_size :] for row in rows])
        newest_conditions = {
            name: torch.stack([own[name][-1:] for own in self.conditions])
            for name in self.conditions[0]
        }
        self.hidden = self.cache.append(self.model.embed_observed(newest, newest_conditions))
        self.positions_computed += newest.shape[0] * newest.shape[1]

    def _later_half(self, row: Tensor) -> Tensor:
        """What stays of a row that has outgrown the context."""
        if len(row) <= self.context_length:
            return row
        num_groups = self.context_length // self.group_size
        return row[-max(1, num_groups // 2) * self.group_size :]

    def _keep_last_conditions(self) -> None:
        """Those of the groups that the rows still hold."""
        for row, own in zip(self.rows, self.conditions):
            for name, values in own.items():
                own[name] = values[-(len(row) // self.group_size) :]

    def _check_conditions(self, own: Conditions, num_groups: int) -> None:
        """UserError for conditions that are not those of the model, one value for each group."""
        expected = [condition.name for condition in self.model.config.data.conditions]
        if sorted(own) != sorted(expected):
            raise UserError(
                f"conditions are {', '.join(own) or 'none'}; this model continues from a frame "
                f"given {', '.join(expected) or 'none'}: give those of every frame"
            )
        for name, value in own.items():
            if len(value) != num_groups:
                raise UserError(
                    f"condition {name} is given for {len(value)} frames of {num_groups}: "
                    "give one value for every frame"
                )

    def _padded_conditions(self) -> dict[str, Tensor]:
        """Of all rows, padded as they are; nobody reads what is behind a row's end."""
        result = {}
        for name in self.conditions[0]:
            values = [own[name] for own in self.conditions]
            result[name] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
        return result

    def _as_one(self, states: Tensor) -> Tensor:
        """(B, P, size) as it is; (B, size) without groups."""
        return states[:, 0] if self.group_size == 1 else states

    @torch.no_grad()
    def _prefill(self) -> None:
        if self.thinks_over_all:
            return
        lengths = torch.tensor([len(row) for row in self.rows], device=self.device)
        padded = torch.nn.utils.rnn.pad_sequence(self.rows, batch_first=True)
        embedded = self.model.embed_observed(padded, self._padded_conditions())
        network = self.model.network
        rows_per_group = network.context_group
        capacity = self.context_length // self.group_size * rows_per_group
        self.cache = KVCache(network, capacity, self.landscapes)
        self.hidden = self.cache.prefill(embedded, lengths // self.group_size * rows_per_group)
        self.positions_computed += int(lengths.sum())


@dataclass(frozen=True)
class Sampling:
    """temperature 0: the most probable token.

    top_k, top_p: only the k most probable, only the fewest that hold probability p.
    """

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
    config: ThinkingConfig = ThinkingConfig(),
    sampling: Sampling = Sampling(),
    end: int | None = None,
    energies: bool = True,
) -> Iterator[tuple[Tensor, Prediction]]:
    """(tokens (B,), what they were taken from) for each of at most `count` positions; ends when
    every row has had the token `end`. Raises UserError for a model of groups.
    """
    if resolved.group_size(model.config) > 1:
        raise UserError(
            "this model predicts groups of tokens, which are answers and not texts to continue: "
            "ebwm evaluate says how many it solves"
        )
    session = Session(model, prompts, config, energies=energies)
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
    config: ThinkingConfig = ThinkingConfig(),
    sample_ids: Tensor | None = None,
    conditions: Sequence[Conditions] | None = None,
) -> Tensor:
    """`count` further frames of clips, each predicted from those before: (B, count, dimension), or
    (B, count P, dimension) of P states each.

    conditions: of each clip, those of its T frames and of `count` - 1 further ones, (T + .., ..).
    """
    own = list(conditions or [{}] * len(prompts))
    size = resolved.group_size(model.config)
    lengths = [len(prompt) // size for prompt in prompts]
    session = Session(
        model,
        prompts,
        config,
        sample_ids=sample_ids,
        conditions=[
            {name: values[:length] for name, values in each.items()}
            for each, length in zip(own, lengths)
        ],
        energies=False,
    )
    states = []
    for index in range(count):
        states.append(session.predict().state)
        if index + 1 < count:
            further = {
                name: torch.stack([each[name][n + index] for each, n in zip(own, lengths)])
                for name in own[0]
            }
            session.accept(states[-1], further)
    return torch.stack(states, 1) if size == 1 else torch.cat(states, 1)


@torch.no_grad()
def candidate_energies(
    model: WorldModel,
    observed: Tensor,
    embedded: Tensor,
    conditions: Conditions | None = None,
) -> Tensor:
    """Energies (K,) in the last landscape of candidates for the position after some observed ones.

    observed: tokens (S,) or states (S, dimension). embedded: the candidates, (K, D), with groups
    (K P, D), one candidate after the other. conditions: of the observed groups, tensors (T, ..).
    """
    observed = model.visible_prompt(observed)
    own = {name: value[None] for name, value in (conditions or {}).items()}
    seen = model.embed_observed(observed[None], own)
    landscape = model.energy_network.num_landscapes - 1
    cache = KVCache(model.network, seen.shape[1], [landscape])
    cache.prefill(seen, torch.tensor([seen.shape[1]], device=seen.device))
    energy_function = CachedEnergy(cache)
    energy = energy_function(embedded[None], landscape)[0].float()
    return energy[:: resolved.group_size(model.config)]
