"""Recording episodes from a Gymnasium environment.

Every episode has an environment of its own, reset with seed + its number, whose action space and
policy draw from the same. So an episode does not depend on those before it, a killed recording goes
on with what is missing, and the same arguments give the same bytes.

    keys    render            what env.render() shows: frames, unless the observation is a picture
            observation       the observation, or observation/KEY of a dictionary
            info/KEY          numbers of the info dictionary
            action, reward, terminated
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.plain_text import shorten
from ebwm_scale.core.strict_json import canonical_json
from ebwm_scale.data.prepare.worlds.columns import RawEpisode
from ebwm_scale.data.prepare.worlds.images import looks_like_image, sized
from ebwm_scale.data.prepare.worlds.minari import flattened
from ebwm_scale.data.prepare.worlds.policies import make_policy
from ebwm_scale.data.prepare.worlds.source import FRAMES, Wanted, needed
from ebwm_scale.data.prepare.worlds.spaces import ActionSpace

RENDER = "render"
_VERSION = 1  # of what is recorded for the same arguments
# First word of an environment's name -> (module that registers it, package)
_REGISTERED_BY = {
    "ALE": ("ale_py", "ale-py"),
    "gym_pusht": ("gym_pusht", "gym-pusht"),
    "gym_aloha": ("gym_aloha", "gym-aloha"),
    "gym_xarm": ("gym_xarm", "gym-xarm"),
    "swm": ("stable_worldmodel", "stable-worldmodel"),
    "PointMaze": ("gymnasium_robotics", "gymnasium-robotics"),
    "AntMaze": ("gymnasium_robotics", "gymnasium-robotics"),
    "Fetch": ("gymnasium_robotics", "gymnasium-robotics"),
    "MiniGrid": ("minigrid", "minigrid"),
    "dm_control": ("shimmy", "shimmy[dm-control]"),
}
_USUAL = {
    "action": ("action",),
    "proprio": ("observation", "observation/agent_pos", "observation/observation"),
    "reward": ("reward",),
    "terminated": ("terminated",),
}


@dataclass(frozen=True)
class RecordConfig:
    """What is recorded.

    env: a name of Gymnasium's, module:NAME for one that a module registers. options: of
    gymnasium.make. steps: at most so many of an episode.
    """

    env: str
    policy: str = "random"
    stickiness: float = 0.9
    episodes: int = 100
    steps: int = 1000
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("episodes", "steps"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} is {getattr(self, name)}: must be above 0")
        if not 0 <= self.seed < 2**31:
            raise DataError(f"seed is {self.seed}: must be from 0 to {2**31 - 1}")


class RecordedSource:
    """See data/prepare/worlds/source.py: Source. size: of the kept frames, (height, width)."""

    kind = "recording"

    def __init__(self, config: RecordConfig, wanted: Wanted, size: tuple[int, int]):
        self.config = config
        self.size = size
        self.name = config.env
        self.gymnasium: Any = needed("gymnasium", "gymnasium", "recording an environment")
        self.policy = make_policy(config.policy, stickiness=config.stickiness)
        env = self._make()
        try:
            self.actions = ActionSpace(env.action_space, f"{config.env}: its actions")
            first, info = _reset(env, config.env, config.seed)
            self.keys = self._chosen(wanted, first, info)
            rate = (env.metadata or {}).get("render_fps")
            self.fps = float(rate) if isinstance(rate, int | float) and rate > 0 else None
        finally:
            env.close()
        number_width = len(str(config.episodes - 1))
        names = [f"episode_{i:0{max(6, number_width)}d}" for i in range(config.episodes)]
        self._numbers = {name: number for number, name in enumerate(names)}
        self.groups = [[name] for name in names]
        recipe = {
            "version": _VERSION,
            "env": config.env,
            "options": config.options,
            "policy": self.policy.identity,
            "steps": config.steps,
            "seed": config.seed,
            "gymnasium": importlib.metadata.version("gymnasium"),
        }
        self.recipe = hashlib.sha256(canonical_json(recipe)).hexdigest()
        self.digest = hashlib.sha256(f"{self.recipe} {config.episodes}".encode()).hexdigest()

    def read(self, group: list[str], moved: Callable[[], None]) -> Iterator[RawEpisode]:
        for name in group:
            try:
                yield self._recorded(name, moved)
            except DataError as error:
                raise DataError(f"{self.config.env}: {name}, {error}") from None

    def _recorded(self, name: str, moved: Callable[[], None]) -> RawEpisode:
        seed = self.config.seed + self._numbers[name]
        generator = np.random.Generator(np.random.Philox(key=[seed, 0x776F726C64]))
        env = self._make()
        try:
            observation, info = _reset(env, "reset", seed)
            env.action_space.seed(seed)
            shots = [self._look(env, observation, info, name)]
            actions, rewards, ends = [], [], []
            action: Any = None
            for step in range(self.config.steps):
                if action is None or generator.random() >= self.policy.stickiness:
                    action = self.policy.action(observation, step, generator, env)
                observation, reward, terminated, truncated, info = _step(env, action, step)
                actions.append(action)
                rewards.append(float(reward))
                ends.append(bool(terminated))
                shots.append(self._look(env, observation, info, name))
                moved()
                if terminated or truncated:
                    break
        finally:
            env.close()
        columns: dict[str, np.ndarray] = {}
        for column, key in self.keys.items():
            if key == "action":
                columns[column], _ = self.actions.ids(actions, name)
            elif key in ("reward", "terminated"):
                columns[column] = np.array(rewards if key == "reward" else ends)
            elif column != FRAMES:
                columns[column] = np.stack([np.asarray(shot[key]) for shot in shots])
        frames = np.concatenate([shot[self.keys[FRAMES]] for shot in shots])
        known = {c: self.actions.num_values for c, k in self.keys.items() if k == "action"}
        return RawEpisode(name, frames, columns, known)

    def _look(self, env: Any, observation: Any, info: Any, name: str) -> dict[str, np.ndarray]:
        """What is kept of a moment: the frame in its final size, and the columns."""
        seen = _seen(observation, info)
        key = self.keys[FRAMES]
        if key == RENDER:
            seen[RENDER] = _rendered(env)
        wanted = [k for k in self.keys.values() if k not in ("action", "reward", "terminated")]
        missing = [k for k in wanted if k not in seen]
        if missing:
            raise DataError(f"{missing[0]} is missing; there are {', '.join(sorted(seen))}")
        kept = {k: seen[k].copy() for k in wanted}
        kept[key] = sized(kept[key][None], *self.size, name)
        return kept

    def _chosen(self, wanted: Wanted, observation: Any, info: Any) -> dict[str, str]:
        """The key of each wanted column."""
        seen = _seen(observation, info)
        images = [key for key, a in seen.items() if looks_like_image(a.shape, a.dtype)]
        there = [*seen, RENDER, "action", "reward", "terminated"]
        keys: dict[str, str] = {}
        for name in wanted.names:
            usual = (*images, RENDER) if name == FRAMES else _USUAL.get(name, (f"info/{name}",))
            key = wanted.key(name, there, usual, self.config.env)
            assert key is not None, "an environment has all outcomes"
            keys[name] = key
        return keys

    def _make(self) -> Any:
        """The environment; DataError in one line for one that is not there or not installed."""
        config = self.config
        word = config.env.partition("/")[0].partition("_")[0]
        namespace = config.env.partition("/")[0]
        for name in (namespace, word):
            if name in _REGISTERED_BY:
                module, package = _REGISTERED_BY[name]
                needed(module, package, f"the environment {config.env}")
        # pygame draws without a screen; what a user sets stays.
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
        try:
            return self.gymnasium.make(config.env, render_mode="rgb_array", **config.options)
        except self.gymnasium.error.DependencyNotInstalled as error:
            raise DataError(
                f"the environment {config.env} needs a package: {shorten(error, 200)}"
            ) from None
        except ModuleNotFoundError as error:
            module = error.name or config.env.partition(":")[0]
            raise DataError(
                f"the environment {config.env} needs the package {module}; install it with: "
                f"python -m pip install {module}"
            ) from None
        except Exception as error:  # noqa: BLE001 (an environment's constructor raises what it likes)
            raise DataError(
                f"the environment {config.env} cannot be made: {shorten(error, 300)}; install the "
                "package that registers it, or name it as MODULE:NAME"
            ) from None


def _reset(env: Any, where: str, seed: int) -> tuple[Any, Any]:
    try:
        return env.reset(seed=seed)
    except Exception as error:  # noqa: BLE001 (as above)
        raise DataError(f"{where}: the environment fails: {_words(error)}") from None


def _step(env: Any, action: Any, step: int) -> tuple[Any, Any, Any, Any, Any]:
    try:
        return env.step(action)
    except Exception as error:  # noqa: BLE001 (as above)
        raise DataError(f"step {step}: the environment fails: {_words(error)}") from None


def _rendered(env: Any) -> np.ndarray:
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


def _seen(observation: Any, info: Any) -> dict[str, np.ndarray]:
    """Arrays of an observation and of the info dictionary by their keys."""
    seen = flattened(observation, "observation")
    if isinstance(info, dict):
        seen |= flattened(info, "info")
    return seen


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {shorten(error, 200)}"
