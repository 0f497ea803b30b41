"""Actions as a planner searches them: numbers between bounds, or ids.

    stored    as in the dataset: float32 (.., width) in the source's units, or ids from 0 on
    model's   continuous: standardised floats (.., width); discrete: ids int64 (.., width)

An environment's action is a part of a stored one: where a dataset takes each n-th frame only, the n
actions between stand side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebwm_scale.core.errors import UserError
from ebwm_scale.data.format.conditions import Condition
from ebwm_scale.data.format.content import VideoContent
from ebwm_scale.data.format.episodes import rate_of
from ebwm_scale.data.format.manifest import Manifest
from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.data.prepare.worlds.spaces import ActionSpace
from ebwm_scale.inference.imagination import ACTION

SPREAD = 3.0  # standard deviations around the mean, where an environment sets no bounds


@dataclass(frozen=True)
class ActionSpec:
    """What actions there are.

    low, high: (width,) bounds in the model's units; of discrete actions nobody reads them.
    num_values: int64 (width,) how many ids each column has; 0 for continuous ones.
    """

    condition: Condition
    observe: Observation
    low: Tensor
    high: Tensor
    num_values: Tensor

    @property
    def is_discrete(self) -> bool:
        return self.condition.is_discrete

    @property
    def width(self) -> int:
        return self.condition.width

    @property
    def most_values(self) -> int:
        """The largest number of ids that the model knows, as in its probabilities."""
        return self.condition.num_values

    def to_model(self, stored: np.ndarray | Tensor) -> Tensor:
        """Stored actions (T, width) in the model's units."""
        values = torch.as_tensor(np.asarray(stored))
        if self.is_discrete:
            return values.long().to(self.observe.device)
        mean, std = self.observe.statistics(ACTION)
        return (values.float().to(mean.device) - mean) / std

    def to_stored(self, actions: Tensor) -> np.ndarray:
        """Actions (T, width) of the model as the dataset stores them."""
        if self.is_discrete:
            return actions.cpu().numpy().astype(self.condition.dtype)
        mean, std = self.observe.statistics(ACTION)
        return (actions * std + mean).cpu().numpy().astype(self.condition.dtype)


def action_spec(manifest: Manifest, observe: Observation, space: Any = None) -> ActionSpec:
    """The actions of a dataset, within the bounds of an environment's action space where given.

    space: of Gymnasium. Raises UserError for a dataset without actions, and for an environment
    whose actions are others.
    """
    condition = action_condition(manifest)
    device = observe.device
    width = condition.width
    nothing = torch.zeros(width, device=device)
    if condition.is_discrete:
        counts = np.full(width, condition.num_values)
        if space is not None:
            counts = _discrete_counts(condition, manifest, space)
        return ActionSpec(condition, observe, nothing, nothing, torch.from_numpy(counts).to(device))
    low, high = -SPREAD * np.ones(width), SPREAD * np.ones(width)
    if space is not None:
        low, high = _bounds(condition, manifest, space, low, high)
    lowest, highest = [torch.from_numpy(limit).float().to(device) for limit in (low, high)]
    return ActionSpec(condition, observe, lowest, highest, nothing.long())


def action_condition(manifest: Manifest) -> Condition:
    """The condition that is chosen; UserError where a dataset has none."""
    content = manifest.content
    if not isinstance(content, VideoContent):
        raise UserError(
            f"{manifest.path}: holds {manifest.modality}: actions are planned in worlds only"
        )
    for condition in content.conditions:
        if condition.name == ACTION:
            return condition
    given = ", ".join(condition.name for condition in content.conditions) or "nothing"
    raise UserError(
        f"{manifest.path}: its frames are conditioned on {given}, and not on an action: there is "
        "nothing to plan; make the dataset with --conditions action, and train on it"
    )


def steps_per_action(manifest: Manifest) -> tuple[int, bool]:
    """(steps of the environment for each of the dataset, whether an action holds those of all)."""
    if manifest.values.get("episodes") is None:
        return 1, True
    skip, dense = rate_of(manifest)
    return skip, skip == 1 or ACTION in dense


def environment_actions(stored: np.ndarray, manifest: Manifest, space: Any) -> list[Any]:
    """What an environment is given, step by step, for one stored action (width,)."""
    skip, is_dense = steps_per_action(manifest)
    parts = stored.reshape(skip, -1) if is_dense else np.repeat(stored[None], skip, 0)
    return [_in_space(part, space) for part in parts]


def _in_space(part: np.ndarray, space: Any) -> Any:
    actions = ActionSpace(space, "the environment's actions")
    if actions.kind == "Box":
        low, high = np.asarray(space.low), np.asarray(space.high)
        return np.clip(part.reshape(space.shape), low, high).astype(space.dtype)
    ids = part.astype(np.int64) + actions.start
    if actions.kind == "Discrete":
        return int(ids[0])
    return ids.reshape(space.shape).astype(space.dtype)


def _copies(condition: Condition, manifest: Manifest, own: int, what: str) -> int:
    """How many actions of an environment stand side by side in a stored one; own: its width."""
    skip, is_dense = steps_per_action(manifest)
    copies = skip if is_dense else 1
    if own * copies != condition.width:
        beside = f", {copies} of them side by side" if copies > 1 else ""
        raise UserError(
            f"the environment's actions are {what} of width {own}{beside}; the run's dataset has "
            f"actions of width {condition.width}: not the environment it was made from"
        )
    return copies


def _discrete_counts(condition: Condition, manifest: Manifest, space: Any) -> np.ndarray:
    """Ids of each column, (width,)."""
    actions = ActionSpace(space, "the environment's actions")
    if actions.kind == "Box":
        raise UserError(
            "the environment's actions are numbers (Box), those of the run's dataset are ids: not "
            "the environment it was made from"
        )
    if actions.kind == "MultiDiscrete":
        own = np.asarray(space.nvec).reshape(-1)
    else:
        width = 1 if actions.kind == "Discrete" else int(np.prod(space.shape))
        own = np.full(width, actions.num_values)
    copies = _copies(condition, manifest, len(own), "ids")
    if own.max() < condition.num_values:
        raise UserError(
            f"the environment's actions have {own.max()} values, those of the run's dataset "
            f"{condition.num_values}: not the environment it was made from"
        )
    return np.tile(np.minimum(own, condition.num_values), copies).astype(np.int64)


def _bounds(
    condition: Condition, manifest: Manifest, space: Any, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds (width,) in the model's units; low, high: where the space has none."""
    actions = ActionSpace(space, "the environment's actions")
    if actions.kind != "Box":
        raise UserError(
            f"the environment's actions are ids ({actions.kind}), those of the run's dataset are "
            "numbers: not the environment it was made from"
        )
    own = [np.asarray(limit, np.float64).reshape(-1) for limit in (space.low, space.high)]
    copies = _copies(condition, manifest, len(own[0]), "numbers")
    limits = []
    for limit, otherwise in zip(own, (low, high)):
        standard = (np.tile(limit, copies) - condition.mean) / condition.std
        limits.append(np.where(np.isfinite(standard), standard, otherwise))
    return limits[0], limits[1]
