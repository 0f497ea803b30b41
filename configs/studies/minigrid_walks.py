"""What the study of worlds needs of MiniGrid: who walks while it is recorded, and an environment
with goals to plan for. configs/studies/worlds.yaml says how they are used.

MiniGrid-Walk-6x6-v0 is MiniGrid-Empty-Random-6x6-v0, its room, pictures and actions, with other
goals: a cell and a direction a few actions away, where a walk from the start led. The room's own
goal, a green cell, ends an episode, so no frame that was recorded shows anybody on it.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from minigrid.envs import EmptyEnv

Place = tuple[tuple[int, int], int]  # a cell (column, row), and where one looks
LEFT, RIGHT, FORWARD = 0, 1, 2
# left, right, forward; the other four of MiniGrid's actions change nothing in an empty room
SHARES = (0.2, 0.2, 0.5, 0.025, 0.025, 0.025, 0.025)


def wander(observation: Any, step: int, generator: np.random.Generator, env: Any) -> int:
    """Mostly forward, turning now and then: --policy scripted:..minigrid_walks.py:wander."""
    return int(generator.choice(len(SHARES), p=SHARES))


class Walk(EmptyEnv):
    """steps: of the walk to the goal. info["success"]: at its cell, and looking its way."""

    def __init__(self, steps: int = 5, **options: Any):
        super().__init__(size=6, agent_start_pos=None, **options)
        self.steps = steps
        self.wanted: Place = ((0, 0), 0)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Anywhere; the goal is in another cell."""
        observation, info = super().reset(seed=seed, options=options)
        start = self._where()
        self.wanted = start
        while self.wanted[0] == start[0]:
            self.wanted = self._after_a_walk(start)
        self._put(start)
        self.step_count = 0
        return observation, info | self._said()

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated, truncated, info | self._said()

    def picture_of_goal(self) -> np.ndarray:
        """What is seen of the room once the goal is reached."""
        here = self._where()
        self._put(self.wanted)
        try:
            return self.render()
        finally:
            self._put(here)

    def _after_a_walk(self, start: Place) -> Place:
        """Where it ends. Half of its actions go forward; none steps on the green cell."""
        while True:
            self._put(start)
            actions = self.np_random.choice((LEFT, RIGHT, FORWARD, FORWARD), self.steps)
            if not any(super(Walk, self).step(action)[2] for action in actions):
                return self._where()

    def _where(self) -> Place:
        column, row = self.agent_pos
        return (int(column), int(row)), int(self.agent_dir)

    def _put(self, place: Place) -> None:
        self.agent_pos, self.agent_dir = place

    def _said(self) -> dict[str, Any]:
        return {"success": self._where() == self.wanted}


def goal_frame(env: Any, observation: Any, info: Any) -> np.ndarray:
    """The room with the agent at its goal."""
    return env.unwrapped.picture_of_goal()


if "MiniGrid-Walk-6x6-v0" not in gymnasium.registry:  # a goal's file is read as a module of its own
    gymnasium.register("MiniGrid-Walk-6x6-v0", entry_point="minigrid_walks:Walk")
