"""Futures of a held-out episode, imagined under chosen actions: what `ebwm think --episode` shows.

actions    true      those of the episode; only then there is a truth to hold a future against
           hold      the last one that was taken, again and again
           random    drawn from those of the episode
           FILE      .npy or .csv: a row for each step, as stored in the dataset
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ebwm_scale.config import resolved
from ebwm_scale.core.errors import UserError
from ebwm_scale.data.format.episodes import Episode
from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.inference.imagination import ACTION, Imagined, Window, imagine
from ebwm_scale.inference.thinking import ThinkingConfig
from ebwm_scale.inference.windows import window_of
from ebwm_scale.world_model import WorldModel

POLICIES = ("true", "hold", "random")


@dataclass(frozen=True)
class Rollout:
    """futures: one for each start, of k frames. errors: (futures, k) SmoothL1 against the truth,
    None under other actions than the true ones.
    """

    window: Window
    num_context: int
    num_steps: int
    futures: list[Imagined]
    errors: Tensor | None


def roll_out(
    model: WorldModel,
    episode: Episode,
    observe: Observation,
    *,
    start: int,
    num_steps: int,
    actions: str,
    config: ThinkingConfig,
) -> Rollout:
    """Imagine num_steps frames from frame `start` + c on; config.num_starts futures.

    Raises UserError for an episode that is too short, and for actions that do not fit.
    """
    num_context = max(1, (resolved.num_groups(model.config) + 1) // 2)
    num_frames = num_context + num_steps
    if start < 0 or start + num_frames > len(episode.frames):
        most = len(episode.frames) - num_context - max(0, start)
        raise UserError(
            f"episode {episode.name} has {len(episode.frames)} frames: from frame {start} on, "
            f"after {num_context} observed ones, it has {max(0, most)} more, not {num_steps}; "
            "give --max-new or --start less"
        )
    true = window_of(episode, observe, start, num_frames)
    window = replace(true, conditions=dict(true.conditions))
    if actions != "true":
        chosen = actions_of(actions, episode, observe, true, num_context, config.seed)
        window.conditions[ACTION] = chosen
    single = replace(config, num_starts=1)
    ahead = {"num_context": num_context, "num_steps": num_steps, "energies": True}
    seeds = range(config.seed, config.seed + config.num_starts)
    futures = [
        imagine(model, [window], config=replace(single, seed=seed), **ahead) for seed in seeds
    ]
    errors = None
    if actions == "true":
        truth = true.states[num_context:]
        errors = torch.stack([_errors(future.states[0], truth) for future in futures])
    return Rollout(true, num_context, num_steps, futures, errors)


def _errors(states: Tensor, truth: Tensor) -> Tensor:
    return F.smooth_l1_loss(states, truth, beta=1.0, reduction="none").mean((1, 2)).cpu()


def actions_of(
    asked: str,
    episode: Episode,
    observe: Observation,
    window: Window,
    num_context: int,
    seed: int,
) -> Tensor:
    """A window's actions (F - 1, ..) as a model takes them, chosen from the last observed frame on.

    Raises UserError for a dataset without actions, and for a file that does not fit.
    """
    if ACTION not in window.conditions:
        raise UserError(
            f"--actions {asked}: this dataset's frames are conditioned on "
            f"{', '.join(window.conditions) or 'nothing'}, and not on an action; leave it out"
        )
    own = window.conditions[ACTION]
    first = num_context - 1
    count = len(own) - first
    if asked == "hold":
        taken = own[max(0, first - 1)]
        return torch.cat([own[:first], taken.expand(count, *taken.shape)])
    stored = episode.conditions[ACTION]
    if asked == "random":
        rows = np.random.Generator(np.random.PCG64(seed)).integers(len(stored), size=count)
        chosen = stored[rows]
    else:
        chosen = _read_actions(Path(asked), count, stored)
        condition = next(c for c in observe.content.conditions if c.name == ACTION)
        problem = condition.problem(chosen)
        if problem is not None:
            raise UserError(f"--actions {asked}: {problem}")
    values = {name: torch.from_numpy(np.array(v)) for name, v in episode.conditions.items()}
    values = {name: value[:count] for name, value in values.items()}
    values[ACTION] = torch.from_numpy(np.ascontiguousarray(chosen))
    wide = {
        name: (value if value.is_floating_point() else value.long())[None]
        for name, value in values.items()
    }
    return torch.cat([own[:first], observe.conditions(wide)[ACTION][0]])


def _read_actions(path: Path, count: int, stored: np.ndarray) -> np.ndarray:
    """The first `count` rows of a file of actions, in the type of those of the dataset."""
    what = f"--actions {path}"
    if not path.is_file():
        raise UserError(f"{what}: no such file; give a .npy or .csv, or {', '.join(POLICIES)}")
    try:
        if path.suffix.lower() == ".npy":
            values = np.load(path, allow_pickle=False)
        else:
            values = np.loadtxt(path, delimiter=",", ndmin=2)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{what}: cannot be read: {error}") from None
    if values.ndim == 1:
        values = values[:, None]
    width = stored.shape[1]
    if values.ndim != 2 or values.shape[1] != width or len(values) < count:
        raise UserError(
            f"{what}: has shape {values.shape}; expected {count} rows or more (from the last "
            f"observed frame on) of {width} numbers"
        )
    if not np.issubdtype(values.dtype, np.number) or not np.isfinite(values).all():
        raise UserError(f"{what}: holds what is no finite number")
    values = values[:count]
    are_ids = np.issubdtype(stored.dtype, np.integer)
    if are_ids and ((values < 0) | (values != np.round(values))).any():
        raise UserError(f"{what}: this dataset's actions are ids: give whole numbers from 0 on")
    return values.astype(stored.dtype)
