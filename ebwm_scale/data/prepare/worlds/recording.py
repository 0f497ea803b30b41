"""Recording episodes from a Gymnasium environment.

Every episode has an environment of its own, reset with seed + its number, whose action space and
policy draw from the same. So an episode does not depend on those before it, a killed recording goes
on with what is missing, and the same arguments give the same bytes.

Which of the things that it shows are taken is said in environments.py.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.strict_json import canonical_json
from ebwm_scale.data.prepare.worlds import environments
from ebwm_scale.data.prepare.worlds.columns import RawEpisode
from ebwm_scale.data.prepare.worlds.policies import make_policy
from ebwm_scale.data.prepare.worlds.source import FRAMES, Wanted
from ebwm_scale.data.prepare.worlds.spaces import ActionSpace

_VERSION = 1  # of what is recorded for the same arguments


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
        self.policy = make_policy(config.policy, stickiness=config.stickiness)
        env = environments.make_environment(config.env, config.options)
        try:
            self.actions = ActionSpace(env.action_space, f"{config.env}: its actions")
            first, info = environments.reset(env, config.env, config.seed)
            self.keys = environments.chosen_keys(wanted, first, info, config.env)
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
            "keys": self.keys,
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
        env = environments.make_environment(self.config.env, self.config.options)
        try:
            observation, info = environments.reset(env, "reset", seed)
            env.action_space.seed(seed)
            shots = [environments.look(env, observation, info, self.keys, self.size, name)]
            actions, rewards, ends = [], [], []
            action: Any = None
            for step in range(self.config.steps):
                if action is None or generator.random() >= self.policy.stickiness:
                    action = self.policy.action(observation, step, generator, env)
                observation, reward, terminated, truncated, info = environments.step(
                    env, action, step
                )
                actions.append(action)
                rewards.append(float(reward))
                ends.append(bool(terminated))
                shots.append(environments.look(env, observation, info, self.keys, self.size, name))
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
