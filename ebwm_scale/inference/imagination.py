"""Imagining a world: frames ahead of some observed ones, each predicted from those before it.

    window = states of F frames, and what was done at each of them but the last
    imagine(model, windows, num_context=c, num_steps=k)     frames c .. c + k - 1 of each window

Actions are given: those of the window, or others. What else a frame is conditioned on, such as
proprioception, is not known ahead: from the last observed frame on it keeps its value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ebwm_scale.config import resolved
from ebwm_scale.inference.generation import Session
from ebwm_scale.inference.thinking import ThinkingConfig
from ebwm_scale.world_model import WorldModel

ACTION = "action"  # the condition that is chosen; all others are sensed


@dataclass(frozen=True)
class Window:
    """A part of an episode, as a model sees it.

    states: float32 (F, P, dimension), standardised. conditions: by name, of the first F - 1 frames,
    as Observation.conditions gives them but for the samples. frames: uint8 (F, height, width, 3),
    or None where the dataset keeps none. start: the episode's frame that it begins with.
    """

    episode: str
    start: int
    states: Tensor
    conditions: dict[str, Tensor]
    frames: np.ndarray | None = None

    @property
    def num_frames(self) -> int:
        return len(self.states)

    def context(self, num_context: int) -> Tensor:
        """The states (c P, dimension) of the first c frames, as a prompt."""
        return self.states[:num_context].flatten(0, 1)


@dataclass(frozen=True)
class Imagined:
    """states: float32 (B, k, P, dimension). energies: (B, k) of an energy model that was asked."""

    states: Tensor
    energies: Tensor | None


def with_actions_of(window: Window, other: Window, first: int) -> Window:
    """The window with another's actions from frame `first` on."""
    if ACTION not in window.conditions:
        return window
    own = window.conditions[ACTION]
    actions = torch.cat([own[:first], other.conditions[ACTION][first : len(own)]])
    return replace(window, conditions={**window.conditions, ACTION: actions})


def known_ahead(window: Window, num_context: int) -> dict[str, Tensor]:
    """A window's conditions as they are known after c observed frames."""
    known = {}
    for name, values in window.conditions.items():
        known[name] = values
        if name != ACTION:
            held = values[num_context - 1 : num_context]
            held = held.expand(len(values) - num_context, *values.shape[1:])
            known[name] = torch.cat([values[:num_context], held])
    return known


@torch.no_grad()
def imagine(
    model: WorldModel,
    windows: Sequence[Window],
    *,
    num_context: int,
    num_steps: int,
    config: ThinkingConfig = ThinkingConfig(),
    sample_ids: Tensor | None = None,
    energies: bool = False,
) -> Imagined:
    """k imagined frames after the first c of each of B windows, which have c + k or more."""
    given = [known_ahead(window, num_context) for window in windows]
    session = Session(
        model,
        [window.context(num_context) for window in windows],
        config,
        sample_ids=sample_ids,
        conditions=[{name: values[:num_context] for name, values in own.items()} for own in given],
        energies=energies,
    )
    size = resolved.group_size(model.config)
    states = []
    found = []
    for step in range(num_steps):
        prediction = session.predict()
        states.append(prediction.state.float().reshape(len(windows), size, -1))
        if prediction.energy is not None:
            found.append(prediction.energy.float())
        if step + 1 < num_steps:
            further = {
                name: torch.stack([own[name][num_context + step] for own in given])
                for name in given[0]
            }
            session.accept(prediction.state, further)
    return Imagined(torch.stack(states, 1), torch.stack(found, 1) if found else None)
