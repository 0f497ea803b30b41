"""TwoRooms-v0: a ball in two rooms with a door between them, seen from above. A world that is made
here, drawn without a screen, and learned in minutes.

    ┌──────┬──────┐
    │      │      │     action     two numbers from -1 to 1: how far the ball moves, down and right
    │  o          │     frame      bytes (side, side, 3)
    │      │   x  │     success    info["success"]: the ball is at the goal x, which is not drawn
    └──────┴──────┘

Lengths are in sides of the picture. The ball stops where it would touch a wall.
"""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium
import numpy as np

RADIUS = 0.14  # of the ball
REACH = 0.1  # how far it moves in a step, at most, down and right
WALL = (0.47, 0.53)  # between the rooms, from left to right
DOOR = (0.28, 0.72)  # from top to bottom
NEAR = 0.1  # the goal is reached from so far away
FARTHEST = 2.0  # more than any two places are apart
SUBSTEPS = 8  # of a step, so that no wall is jumped over
FLOOR, STONE, BALL = (236, 232, 222), (70, 78, 90), (206, 72, 48)


class TwoRooms(gymnasium.Env):
    """See above. side: of the picture in pixels. farthest: how far away a goal is at most."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 5}

    def __init__(self, render_mode: str | None = None, side: int = 32, farthest: float = FARTHEST):
        if not 2 * NEAR < farthest:
            raise ValueError(f"farthest is {farthest}: must be above {2 * NEAR}")
        self.render_mode = render_mode
        self.side = side
        self.farthest = farthest
        self.action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
        self.observation_space = gymnasium.spaces.Box(0, 1, (2,), np.float32)
        self.place = np.full(2, 0.5)  # of the ball, from the top and from the left
        self.goal = np.full(2, 0.5)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """The ball is anywhere, the goal not in its reach and not farther than asked for."""
        super().reset(seed=seed)
        self.place = self._somewhere()
        self.goal = self._somewhere()
        while not 2 * NEAR <= self._distance() <= self.farthest:
            self.goal = self._somewhere()
        return self._observation(), self._info()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Down and right in small steps, each as far as no wall is touched."""
        move = np.clip(np.asarray(action, np.float64), -1, 1) * REACH / SUBSTEPS
        for _ in range(SUBSTEPS):
            for axis in range(2):
                there = self.place.copy()
                there[axis] += move[axis]
                if is_free(there):
                    self.place = there
        return self._observation(), -self._distance(), False, False, self._info()

    def render(self) -> np.ndarray:
        return self.picture(self.place)

    def picture(self, place: np.ndarray) -> np.ndarray:
        """What is seen with the ball at a place, bytes (side, side, 3)."""
        middles = (np.arange(self.side) + 0.5) / self.side
        down, right = middles[:, None], middles[None, :]
        frame = np.broadcast_to(np.array(FLOOR, float), (self.side, self.side, 3)).copy()
        is_wall = (right > WALL[0]) & (right < WALL[1]) & ((down < DOOR[0]) | (down > DOOR[1]))
        frame[is_wall] = STONE
        distance = np.hypot(down - place[0], right - place[1])
        covered = np.clip((RADIUS - distance) * self.side + 0.5, 0, 1)[..., None]
        frame = frame * (1 - covered) + np.array(BALL, float) * covered
        return frame.round().astype(np.uint8)

    def _somewhere(self) -> np.ndarray:
        while True:
            place = self.np_random.uniform(RADIUS, 1 - RADIUS, 2)
            if is_free(place):
                return place

    def _distance(self) -> float:
        return float(np.hypot(*(self.place - self.goal)))

    def _observation(self) -> np.ndarray:
        return self.place.astype(np.float32)

    def _info(self) -> dict[str, Any]:
        return {"success": self._distance() < NEAR, "goal": self.goal.astype(np.float32)}


def is_free(place: np.ndarray) -> bool:
    """Whether a ball there touches no wall."""
    if (place < RADIUS).any() or (place > 1 - RADIUS).any():
        return False
    down, right = place
    if right < WALL[0] - RADIUS or right > WALL[1] + RADIUS:
        return True
    if DOOR[0] + RADIUS <= down <= DOOR[1] - RADIUS:
        return True
    corners = [(y, x) for y in DOOR for x in WALL]
    beside = right < WALL[0] or right > WALL[1]
    in_door = DOOR[0] < down < DOOR[1]
    return beside and in_door and all(np.hypot(down - y, right - x) >= RADIUS for y, x in corners)


def goal_frame(env: Any, observation: Any, info: Any) -> np.ndarray:
    """What is seen when the ball has reached the goal: --goal two_rooms.py:goal_frame."""
    return env.unwrapped.picture(np.asarray(info["goal"], np.float64))


if "TwoRooms-v0" not in gymnasium.registry:  # a goal's file is read as a module of its own
    gymnasium.register(
        "TwoRooms-v0", entry_point="ebwm_scale.data.prepare.worlds.two_rooms:TwoRooms"
    )
