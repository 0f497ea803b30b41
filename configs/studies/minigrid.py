"""What the study of worlds needs of MiniGrid: who walks while it is recorded, and what a goal looks
like. configs/studies/world.yaml says how both are used.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# left, right, forward; the other four of MiniGrid's actions change nothing in an empty room
SHARES = (0.2, 0.2, 0.5, 0.025, 0.025, 0.025, 0.025)


def wander(observation: Any, step: int, generator: np.random.Generator, env: Any) -> int:
    """Mostly forward, turning now and then: --policy scripted:..minigrid.py:wander."""
    return int(generator.choice(len(SHARES), p=SHARES))


def goal_frame(env: Any, observation: Any, info: Any) -> np.ndarray:
    """The room with the agent on its goal, looking as it does now."""
    room = env.unwrapped
    (goal,) = [
        (column, row)
        for column in range(room.width)
        for row in range(room.height)
        if getattr(room.grid.get(column, row), "type", None) == "goal"
    ]
    before, room.agent_pos = room.agent_pos, goal
    try:
        return room.render()
    finally:
        room.agent_pos = before
