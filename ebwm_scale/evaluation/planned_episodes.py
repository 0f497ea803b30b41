"""Episodes that planners act in, beside each other: the measures of plan_actions.json.

    actors     this run, another one, persistence, random actions: each in the same episodes,
               that is from the same reset of an environment of its own
    success    shares with Wilson's intervals; returns, steps and distances with a bootstrap's
    gains      by how much this run is better, paired by episode

Where an environment says nothing of success there is none; where it says so of some episodes, the
others have failed. A distance is the mean squared one of a frame that was seen from the goal, in
the model's space: of the last, and of the nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ebwm_scale.control.mpc import Actor, GoalAtReset, Outcome, Success, run_episode
from ebwm_scale.control.planner import Planner
from ebwm_scale.control.world_costs import FrameGoal, Goal
from ebwm_scale.core.progress import Progress, no_progress
from ebwm_scale.evaluation.bootstrap import bootstrap_ci, share_ci


@dataclass(frozen=True)
class Episodes:
    """What every actor is given.

    make: an environment. goal, execute, success, keys: as run_episode takes them. seed: of the
    first of `count` episodes, the next ones count up.
    """

    make: Callable[[], Any]
    goal: Goal | np.ndarray | GoalAtReset
    count: int
    max_steps: int
    seed: int = 0
    execute: int = 1
    success: Success | None = None
    keys: Mapping[str, str] | None = None

    def played(self, actor: Actor, moved: Callable[[], None] = lambda: None) -> list[Outcome]:
        """What came of each."""
        outcomes = []
        for number in range(self.count):
            env = self.make()
            try:
                outcomes.append(
                    run_episode(
                        env,
                        actor,
                        self.goal,
                        self.max_steps,
                        seed=self.seed + number,
                        execute=self.execute,
                        success=self.success,
                        keys=self.keys,
                        moved=moved,
                    )
                )
            finally:
                env.close()
        return outcomes


def play_all(
    actors: Mapping[str, Actor], episodes: Episodes, progress: Progress = no_progress
) -> dict[str, list[Outcome]]:
    """By actor, what came of each episode."""
    played = {}
    for name, actor in actors.items():
        total = episodes.count * episodes.max_steps
        done = 0

        def moved(name: str = name, total: int = total) -> None:
            nonlocal done
            done += 1
            progress(f"steps of {name}", done, total)

        played[name] = episodes.played(actor, moved)
        progress(f"steps of {name}", total, total)
    return played


def measures(played: Mapping[str, list[Outcome]], eye: Planner, first_seed: int) -> dict[str, Any]:
    """The content of plan_actions.json but for where it comes from.

    eye: whose model's space distances are of. The first actor is this run's; gains are of it.
    """
    known = any(each.success is not None for outcomes in played.values() for each in outcomes)
    rows = {
        name: [episode_row(outcome, known, eye, first_seed + number) for number, outcome in each]
        for name, each in ((name, list(enumerate(outcomes))) for name, outcomes in played.items())
    }
    result: dict[str, Any] = {"actors": {}, "gains": {}}
    for name, own in rows.items():
        result["actors"][name] = _summary(own) | {"episodes": own}
    ours, *others = rows
    for name in others:
        gains = {}
        for key in ("success", "return", "nearest_distance"):
            if rows[ours][0][key] is not None:
                gains[key] = bootstrap_ci(_of(rows[ours], key) - _of(rows[name], key))
        result["gains"][name] = gains
    return result


def episode_row(outcome: Outcome, known: bool, eye: Planner, seed: int) -> dict[str, Any]:
    """What is kept of an episode; known: whether the environment says what success is."""
    distances = _distances(outcome, eye)
    return {
        "seed": seed,
        "success": bool(outcome.success) if known else None,
        "return": outcome.total_reward,
        "steps": outcome.steps,
        "first_distance": None if distances is None else distances[0],
        "last_distance": None if distances is None else distances[-1],
        "nearest_distance": None if distances is None else min(distances),
        "plans": len(outcome.costs),
        "evaluations": outcome.evaluations,
        "seconds": outcome.seconds,
    }


def _distances(outcome: Outcome, eye: Planner) -> list[float] | None:
    """Of each frame from the goal; None where the goal is no frame."""
    goal = outcome.goal
    if isinstance(goal, np.ndarray):
        goal = eye.frame_goal(goal)
    if not isinstance(goal, FrameGoal):
        return None
    states = eye.states_of(outcome.frames)
    return FrameGoal(goal.states).distances(states).tolist()


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    plans = sum(row["plans"] for row in rows)
    summary: dict[str, Any] = {
        "success": None,
        "return": bootstrap_ci(_of(rows, "return")),
        "steps": bootstrap_ci(_of(rows, "steps")),
        "evaluations_per_plan": sum(row["evaluations"] for row in rows) / plans,
        "seconds_per_plan": sum(row["seconds"] for row in rows) / plans,
    }
    if rows[0]["success"] is not None:
        summary["success"] = share_ci(_of(rows, "success"))
    for key in ("last_distance", "nearest_distance"):
        summary[key] = None if rows[0][key] is None else bootstrap_ci(_of(rows, key))
    return summary


def _of(rows: list[dict[str, Any]], key: str) -> torch.Tensor:
    return torch.tensor([float(row[key]) for row in rows], dtype=torch.float64)
