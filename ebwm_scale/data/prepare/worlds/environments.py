"""Environments of Gymnasium, opened and played with errors of one line.

env = make_environment(name, options)       DataError for one that is not there
observation, info = reset(env, ..)          what fails inside an environment is a DataError too
keys = chosen_keys(wanted, ..)              which of the things it shows are taken
look(env, observation, info, keys, ..)      the frame in the dataset's size, and the columns

keys    render            what env.render() shows: frames, unless the observation is a picture
        observation       the observation, or observation/KEY of a dictionary
        info/KEY          numbers of the info dictionary
        action, reward, terminated
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.plain_text import shorten
from ebwm_scale.data.prepare.worlds.images import looks_like_image, sized
from ebwm_scale.data.prepare.worlds.minari import flattened
from ebwm_scale.data.prepare.worlds.source import FRAMES, Wanted, needed

RENDER = "render"
# What an environment's name begins with -> (module that registers it, package)
_REGISTERED_BY = {
    "ALE/": ("ale_py", "ale-py"),
    "gym_pusht/": ("gym_pusht", "gym-pusht"),
    "gym_aloha/": ("gym_aloha", "gym-aloha"),
    "gym_xarm/": ("gym_xarm", "gym-xarm"),
    "swm/": ("stable_worldmodel", "stable-worldmodel"),
    "PointMaze_": ("gymnasium_robotics", "gymnasium-robotics"),
    "AntMaze_": ("gymnasium_robotics", "gymnasium-robotics"),
    "Fetch": ("gymnasium_robotics", "gymnasium-robotics"),
    "MiniGrid-": ("minigrid", "minigrid"),
    "TwoRooms-": ("ebwm_scale.data.prepare.worlds.two_rooms", "gymnasium"),
    "dm_control/": ("shimmy", "shimmy[dm-control]"),
}
_USUAL = {
    "action": ("action",),
    "proprio": ("observation", "observation/agent_pos", "observation/observation"),
    "reward": ("reward",),
    "terminated": ("terminated",),
}
_OF_A_STEP = ("action", "reward", "terminated")


def make_environment(name: str, options: Mapping[str, Any]) -> Any:
    """The environment; DataError in one line for one that is not there or not installed.

    name: of Gymnasium's, MODULE:NAME for one that a module registers. options: of gymnasium.make.
    """
    gymnasium: Any = needed("gymnasium", "gymnasium", f"the environment {name}")
    for beginning, (module, package) in _REGISTERED_BY.items():
        if name.startswith(beginning):
            needed(module, package, f"the environment {name}")
    # pygame draws without a screen; what a user sets stays.
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    try:
        return gymnasium.make(name, render_mode="rgb_array", **options)
    except gymnasium.error.DependencyNotInstalled as error:
        raise DataError(f"the environment {name} needs a package: {shorten(error, 200)}") from None
    except ModuleNotFoundError as error:
        module = error.name or name.partition(":")[0]
        raise DataError(
            f"the environment {name} needs the package {module}; install it with: "
            f"python -m pip install {module}"
        ) from None
    except Exception as error:  # noqa: BLE001 (an environment's constructor raises what it likes)
        raise DataError(
            f"the environment {name} cannot be made: {shorten(error, 300)}; install the "
            "package that registers it, or name it as MODULE:NAME"
        ) from None


def reset(env: Any, where: str, seed: int) -> tuple[Any, Any]:
    """(observation, info) of a new episode; where: for messages."""
    try:
        return env.reset(seed=seed)
    except Exception as error:  # noqa: BLE001 (as above)
        raise DataError(f"{where}: the environment fails: {_words(error)}") from None


def step(env: Any, action: Any, number: int) -> tuple[Any, Any, Any, Any, Any]:
    """(observation, reward, terminated, truncated, info) after an action."""
    try:
        return env.step(action)
    except Exception as error:  # noqa: BLE001 (as above)
        raise DataError(f"step {number}: the environment fails: {_words(error)}") from None


def rendered(env: Any) -> np.ndarray:
    """What the environment draws, bytes (height, width, colours)."""
    try:
        picture = np.asarray(env.render())
    except Exception as error:  # noqa: BLE001 (as above)
        raise DataError(f"its picture cannot be drawn: {_words(error)}") from None
    if picture.ndim != 3 or picture.dtype != np.uint8:
        raise DataError(
            f"env.render() gives {picture.dtype} {picture.shape}: expected a picture of bytes; "
            "name an observation that is one with --camera"
        )
    return picture


def seen(observation: Any, info: Any) -> dict[str, np.ndarray]:
    """Arrays of an observation and of the info dictionary by their keys."""
    seen = flattened(observation, "observation")
    if isinstance(info, dict):
        seen |= flattened(info, "info")
    return seen


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {shorten(error, 200)}"


def chosen_keys(wanted: Wanted, observation: Any, info: Any, where: str) -> dict[str, str]:
    """The key of each wanted column; DataError says what there is."""
    there = seen(observation, info)
    images = [key for key, a in there.items() if looks_like_image(a.shape, a.dtype)]
    all_keys = [*there, RENDER, *_OF_A_STEP]
    keys: dict[str, str] = {}
    for name in wanted.names:
        usual = (*images, RENDER) if name == FRAMES else _USUAL.get(name, (f"info/{name}",))
        key = wanted.key(name, all_keys, usual, where)
        assert key is not None, "an environment has all outcomes"
        keys[name] = key
    return keys


def look(
    env: Any,
    observation: Any,
    info: Any,
    keys: Mapping[str, str],
    size: tuple[int, int],
    where: str,
) -> dict[str, np.ndarray]:
    """What is kept of a moment, by key: the frame (1, height, width, 3), and the columns."""
    there = seen(observation, info)
    key = keys[FRAMES]
    if key == RENDER:
        there[RENDER] = rendered(env)
    wanted = [k for k in keys.values() if k not in _OF_A_STEP]
    missing = [k for k in wanted if k not in there]
    if missing:
        raise DataError(f"{missing[0]} is missing; there are {', '.join(sorted(there))}")
    kept = {k: there[k].copy() for k in wanted}
    kept[key] = sized(kept[key][None], *size, where)
    return kept


def option_values(texts: Sequence[str]) -> dict[str, Any]:
    """Options of gymnasium.make, NAME=VALUE each; whole numbers, fractions, true and false as such.

    Raises DataError for a text without NAME=.
    """
    options: dict[str, Any] = {}
    for name, text in name_value_pairs(texts, "--env-option", "frameskip=1"):
        options[name] = text
        if text in ("true", "false"):
            options[name] = text == "true"
            continue
        for kind in (int, float):
            try:
                options[name] = kind(text)
                break
            except ValueError:
                continue
    return options


def name_value_pairs(texts: Sequence[str], option: str, example: str) -> list[tuple[str, str]]:
    """Texts NAME=VALUE as pairs; DataError for others."""
    pairs = []
    for text in texts:
        name, separator, value = text.partition("=")
        if not (name and separator and value):
            raise DataError(f"{option} {text}: expected NAME=VALUE, for example {example}")
        pairs.append((name, value))
    return pairs
