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
    """logits (B, S, V) after num_steps; energy (B, S) of them, None of a baseline.

    cells (B, S): of each position by itself, whose mean over a group is the group's energy; None
    where they were not asked for, or where there are none (see cell_energies).
    """

    num_steps: int
    logits: Tensor
    energy: Tensor | None
    cells: Tensor | None = None


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
def answers(
    model, batch: Instances, numbers: Sequence[int], *, cells: bool = False
) -> Iterator[Answer]:
    """After each of these numbers of steps, which rise; also more than were trained.

    cells: with the energy of each cell, which costs a pass more.
    """
    if model.config.model.kind == "energy":
        for num_steps in numbers:
            thinking = ThinkingConfig(num_steps=num_steps, seed=model.config.train.seed)
            energy_function = energies_of(model, batch)
            thought = thought_of(model, batch, thinking, energy_function=energy_function)
            of_cells = cell_energies(model, energy_function, thought, num_steps) if cells else None
            yield Answer(num_steps, thought.state, thought.energy, of_cells)
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
    energy_function: SequenceEnergy | None = None,
) -> Thought:
    """Thinking of an energy model on every position of a batch; scored ones are asked for.

    energy_function: of the batch, for who asks it afterwards.
    """
    noise = SequenceSampler(model, thinking.seed, batch.sample_ids, batch.observed.shape[1])
    return think(
        model,
        energy_function or energies_of(model, batch),
        noise.initial(None),
        thinking,
        noise=noise,
        with_energy=with_energy,
        asked=batch.targets != IGNORE,
        watch=watch,
    )


def energies_of(model, batch: Instances) -> SequenceEnergy:
    """The energies of candidates for every position of a batch."""
    embedded = model.embed_observed(batch.observed)
    return SequenceEnergy(model, embedded, model.first_visible(batch.observed))


@torch.no_grad()
def cell_energies(
    model, energy_function: SequenceEnergy, thought: Thought, num_steps: int
) -> Tensor | None:
    """(B, S): of each position's answer by itself, after thinking with this function.

    With a workspace, beside the one that thinking ended with. None where steps move a few
    candidates alone: what their energies depend on is not a part of a thought.
    """
    if model.config.refinement.candidates is not None:
        return None
    embedded = model.state_space().embed(thought.state.clone()).vectors
    workspace, w = model.workspace(), None
    if workspace is not None and thought.workspace is not None:
        w = workspace.embed(thought.workspace)
    return energy_function.of_rows(embedded, model.landscapes(num_steps)[-1], w).float()
