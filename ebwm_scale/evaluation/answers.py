"""What a model answers to tasks after each number of steps: of an energy model refinement steps, of
a looped Transformer++ passes of its blocks, of an ordinary one the answer that it gives.

    for answer in answers(model, batch, [1, 2, 4]):
        answer.num_steps, answer.logits, answer.energy
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ebwm_kernels.vocabulary.softmax_cross_entropy import IGNORE
from ebwm_scale.config.schema import Config
from ebwm_scale.inference.energy_functions import SequenceEnergy
from ebwm_scale.inference.initial_states import SequenceSampler
from ebwm_scale.inference.thinking import ThinkingConfig, Thought, Watch, think

MANY_STEPS = 8  # up to so many, each trained step is looked at


@dataclass(frozen=True)
class Instances:
    """A batch: sample_ids (B,), observed and targets (B, S) tokens, on the model's device."""

    sample_ids: Tensor
    observed: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Answer:
    """logits (B, S, V) after num_steps; energy (B, S) of them, None of a baseline."""

    num_steps: int
    logits: Tensor
    energy: Tensor | None


def trained_steps(config: Config) -> int | None:
    """Refinement steps, or loops, that were trained; None of an ordinary Transformer++."""
    if config.model.kind == "energy":
        return config.refinement.num_steps
    return config.model.loops if config.model.loops > 1 else None


def numbers_of_steps(config: Config, asked: Sequence[int]) -> list[int]:
    """Those to look at, fewest first: the ones asked for, the trained one, and each below it if
    they are few. Of an ordinary Transformer++ 1, its only answer.
    """
    trained = trained_steps(config)
    if trained is None:
        return [1]
    numbers = {*asked, trained}
    if trained <= MANY_STEPS:
        numbers.update(range(1, trained))
    return sorted(numbers)


@torch.no_grad()
def see_answers(
    model, batch: Instances, numbers: Sequence[int], see: Callable[[int, Tensor], None]
) -> None:
    """As answers, without energies and in one pass: see is called with each number of steps and
    the logits then, which it must read at once. An energy model's steps do not depend on how many
    follow.
    """
    if model.config.model.kind != "energy":
        for answer in answers(model, batch, numbers):
            see(answer.num_steps, answer.logits)
        return

    def watch(num_steps: int, states: Tensor) -> None:
        if num_steps in numbers:
            see(num_steps, states)

    thinking = ThinkingConfig(num_steps=numbers[-1], seed=model.config.train.seed)
    thought_of(model, batch, thinking, with_energy=False, watch=watch)


@torch.no_grad()
def answers(model, batch: Instances, numbers: Sequence[int]) -> Iterator[Answer]:
    """After each of these numbers of steps, which rise; also more than were trained."""
    if model.config.model.kind == "energy":
        for num_steps in numbers:
            thinking = ThinkingConfig(num_steps=num_steps, seed=model.config.train.seed)
            thought = thought_of(model, batch, thinking)
            yield Answer(num_steps, thought.state, thought.energy)
        return
    hidden = model.network.after_each_loop(
        model.embed_observed(batch.observed), model.first_visible(batch.observed), numbers[-1]
    )
    for num_steps in numbers:
        yield Answer(num_steps, model.output(hidden[num_steps - 1]), None)


@torch.no_grad()
def thought_of(
    model,
    batch: Instances,
    thinking: ThinkingConfig,
    *,
    with_energy: bool = True,
    watch: Watch | None = None,
) -> Thought:
    """Thinking of an energy model on every position of a batch; scored ones are asked for."""
    noise = SequenceSampler(model, thinking.seed, batch.sample_ids, batch.observed.shape[1])
    embedded = model.embed_observed(batch.observed)
    energy_function = SequenceEnergy(model, embedded, model.first_visible(batch.observed))
    return think(
        model,
        energy_function,
        noise.initial(None),
        thinking,
        noise=noise,
        with_energy=with_energy,
        asked=batch.targets != IGNORE,
        watch=watch,
    )
