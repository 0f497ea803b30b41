"""What could be done at a moment of a world, and what a model imagines would come of each: the part
"choose an action" of an explorer's page.

    discrete, one column    its ids
    numbers, two columns    a pad of 3 x 3: low, middle and high of each
    otherwise               each column low and high, the others in the middle; or at their first id
    beside them             what was done, and what the form asks for

Low and high are the least and the largest number of some held-out episodes, which plans stay
between, too. An action is held for all imagined frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ebwm_scale.control.actions import ActionSpec
from ebwm_scale.control.futures import Situation, imagine_futures
from ebwm_scale.exploring.frame_request import numbers_of
from ebwm_scale.exploring.frame_source import FrameSource
from ebwm_scale.inference.imagination import ACTION, Imagined, Window
from ebwm_scale.inference.thinking import ThinkingConfig
from ebwm_scale.world_model import WorldModel

LOOKED_AT = 8  # episodes or clips, for the bounds of actions
MOST_IDS = 12
MOST_COLUMNS = 4  # of actions of many numbers


@dataclass(frozen=True)
class ActionOption:
    """An action to choose. stored: (width,) in the units of the dataset. name: what it is called
    beside its numbers, if anything.
    """

    stored: np.ndarray
    name: str = ""

    @property
    def numbers(self) -> str:
        return numbers_text(self.stored)


def numbers_text(values: np.ndarray) -> str:
    """An action for people: three significant digits."""
    return ", ".join(f"{float(value):.3g}".replace("-", "−") for value in values)


@dataclass(frozen=True)
class ActionOptions:
    """columns: of the pad they stand in; 0: in a row, as they come."""

    options: list[ActionOption]
    columns: int = 0


def action_options(spec: ActionSpec, taken: np.ndarray | None, own: str) -> ActionOptions:
    """What to choose from. taken (width,): what was done; own: a text of the form, or "".

    Raises UserError for a text that is no action.
    """
    pad = _pad(spec)
    beside = []
    if taken is not None:
        beside.append(ActionOption(taken, "what was done"))
    if own:
        values = numbers_of(own, spec.width, spec.most_values if spec.is_discrete else 0)
        beside.append(ActionOption(np.array(values, spec.condition.dtype), "yours"))
    return ActionOptions([*pad.options, *beside], pad.columns)


def within_what_was_done(spec: ActionSpec, source: FrameSource) -> ActionSpec:
    """With the bounds of what was done in the first LOOKED_AT held-out episodes or clips; a column
    in which always the same was done keeps its own.
    """
    if spec.is_discrete:
        return spec
    done = [source.actions(number) for number in range(min(LOOKED_AT, len(source)))]
    all_done = spec.to_model(np.concatenate([each for each in done if each is not None]))
    low, high = all_done.amin(0), all_done.amax(0)
    varies = high > low
    return replace(
        spec, low=torch.where(varies, low, spec.low), high=torch.where(varies, high, spec.high)
    )


def _pad(spec: ActionSpec) -> ActionOptions:
    if spec.is_discrete:
        return _ids(spec)
    middle = (spec.low + spec.high) / 2
    levels = {-1: spec.low, 0: middle, 1: spec.high}
    if spec.width == 2:
        pairs = [(down, right) for down in levels for right in levels]
        chosen = [torch.stack([levels[down][0], levels[right][1]]) for down, right in pairs]
        return ActionOptions([_stored(spec, each) for each in chosen], 3)
    if spec.width == 1:
        chosen = [spec.low + share * (spec.high - spec.low) for share in (0, 0.25, 0.5, 0.75, 1)]
        return ActionOptions([_stored(spec, each) for each in chosen], 5)
    options = []
    for column in range(min(spec.width, MOST_COLUMNS)):
        for level, word in ((-1, "low"), (1, "high")):
            chosen_one = middle.clone()
            chosen_one[column] = levels[level][column]
            name = f"number {column + 1} {word}"
            options.append(replace(_stored(spec, chosen_one), name=name))
    return ActionOptions(options)


def _stored(spec: ActionSpec, action: Tensor) -> ActionOption:
    """An action (width,) of the model as an option."""
    return ActionOption(spec.to_stored(action[None])[0])


def _ids(spec: ActionSpec) -> ActionOptions:
    dtype = spec.condition.dtype
    counts = spec.num_values.tolist()
    if spec.width == 1:
        ids = range(min(counts[0], MOST_IDS))
        return ActionOptions([ActionOption(np.array([each], dtype)) for each in ids])
    options = []
    for column in range(min(spec.width, MOST_COLUMNS)):
        for each in range(min(counts[column], MOST_IDS // MOST_COLUMNS)):
            stored = np.zeros(spec.width, dtype)
            stored[column] = each
            options.append(ActionOption(stored, f"column {column + 1}"))
    return ActionOptions(options)


def situation_of(window: Window, num_context: int) -> Situation:
    """The first frames of a window as what was seen."""
    sensed = {
        name: values[:num_context] for name, values in window.conditions.items() if name != ACTION
    }
    return Situation(
        window.states[:num_context], window.conditions[ACTION][: num_context - 1], sensed
    )


def futures_under(
    model: WorldModel,
    situation: Situation,
    spec: ActionSpec,
    options: Sequence[ActionOption],
    num_steps: int,
    thinking: ThinkingConfig,
) -> Imagined:
    """`num_steps` imagined frames for each option, whose action is held; with their energies."""
    chosen: Tensor = spec.to_model(np.stack([option.stored for option in options]))
    held = chosen[:, None].expand(-1, num_steps, -1)
    with torch.no_grad():
        return imagine_futures(model, situation, held, thinking=thinking, energies=True)
