"""Model-predictive control: plan, take the first actions, look again, plan again.

    env.reset --> frame ┐
    frames, actions ----┴--plan--> first actions --env.step--> next frame, and so on

An actor is a Planner, or whoever else has `begin` and `plan` (baselines.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ebwm_scale.control.actions import environment_actions
from ebwm_scale.control.planner import Plan
from ebwm_scale.control.world_costs import Goal
from ebwm_scale.core.errors import UserError
from ebwm_scale.data.format.content import VideoContent
from ebwm_scale.data.format.manifest import Manifest
from ebwm_scale.data.prepare.worlds import environments
from ebwm_scale.data.prepare.worlds.source import FRAMES, Wanted
from ebwm_scale.inference.imagination import ACTION

Success = Callable[[Any, float, bool, Any], bool]  # (observation, reward, terminated, info)
_SAID = ("success", "is_success")  # what environments call it in info


class Actor(Protocol):
    """Who chooses actions."""

    def begin(self, episode: int = 0) -> None: ...

    def plan(
        self,
        frames: np.ndarray,
        conditions: Mapping[str, np.ndarray],
        goal: Goal | np.ndarray,
        *,
        executed: int = 1,
    ) -> Plan: ...

    def shown(self, states: Any) -> np.ndarray | None: ...

    @property
    def manifest(self) -> Manifest: ...


@dataclass(frozen=True)
class Outcome:
    """What came of an episode.

    success: None where nobody can say. steps: of the environment. rewards: of each of them.
    frames: uint8 (n + 1, height, width, 3) as the model sees them, one more than actions taken.
    imagined: what each of the n later frames was planned to be, the same shape but one; None where
    the encoder cannot go back. costs: of each plan. evaluations, seconds: of all plans together.
    goal: what was planned for.
    """

    success: bool | None
    steps: int
    rewards: list[float]
    frames: np.ndarray
    imagined: np.ndarray | None
    costs: list[float]
    evaluations: int
    seconds: float
    goal: Goal | np.ndarray

    @property
    def total_reward(self) -> float:
        return float(sum(self.rewards))


@dataclass
class View:
    """How an environment's moments become what a dataset holds.

    keys: which key of the environment each column is, see environments.py.
    """

    manifest: Manifest
    keys: dict[str, str]

    @classmethod
    def of(
        cls, env: Any, manifest: Manifest, observation: Any, info: Any, keys: Mapping[str, str]
    ) -> View:
        """keys: where they are not those that the dataset was recorded with."""
        content = manifest.content
        assert isinstance(content, VideoContent), "a world is of frames"
        source = manifest.values.get("source") or {}
        recorded = source.get("keys") if source.get("kind") == "recording" else None
        names = tuple(condition.name for condition in content.conditions)
        wanted = Wanted(names, {**(recorded or {}), **keys})
        return cls(manifest, environments.chosen_keys(wanted, observation, info, _name(env)))

    def look(self, env: Any, observation: Any, info: Any) -> tuple[np.ndarray, dict]:
        """(frame (height, width, 3), what is sensed beside it by name, (width,) each)."""
        content = self.manifest.content
        assert isinstance(content, VideoContent), "a world is of frames"
        size = (content.height, content.width)
        shot = environments.look(env, observation, info, self.keys, size, _name(env))
        sensed = {}
        for condition in content.conditions:
            if condition.name == ACTION:
                continue
            values = np.asarray(shot[self.keys[condition.name]]).reshape(-1)
            if len(values) != condition.width:
                raise UserError(
                    f"{condition.name} of the environment has {len(values)} numbers, the run's "
                    f"dataset {condition.width}: not the environment it was made from; --map "
                    f"{condition.name}=KEY names another"
                )
            sensed[condition.name] = values.astype(condition.dtype)
        return shot[self.keys[FRAMES]][0], sensed


@dataclass
class _Past:
    frames: list[np.ndarray] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)
    sensed: list[dict[str, np.ndarray]] = field(default_factory=list)

    def saw(self, frame: np.ndarray, sensed: dict[str, np.ndarray]) -> None:
        self.frames.append(frame)
        self.sensed.append(sensed)

    def conditions(self) -> dict[str, np.ndarray]:
        """By name: actions between the frames, and what was sensed at each."""
        result = {name: np.stack([each[name] for each in self.sensed]) for name in self.sensed[0]}
        result[ACTION] = np.array(self.actions)
        return result


GoalAtReset = Callable[[Any, Any, Any], "Goal | np.ndarray"]  # (env, observation, info) -> a goal


def run_episode(
    env: Any,
    planner: Actor,
    goal: Goal | np.ndarray | GoalAtReset,
    max_steps: int,
    *,
    seed: int = 0,
    execute: int = 1,
    success: Success | None = None,
    keys: Mapping[str, str] | None = None,
    moved: Callable[[], None] = lambda: None,
) -> Outcome:
    """Plan and act until the environment ends, the goal is reached, or max_steps steps are over.

    env: of Gymnasium, which renders rgb_array. goal: a frame, a Goal, or a function that makes one
    of the episode's beginning. seed: of env.reset, and of the planner's draws. execute: actions of
    the dataset that are taken of each plan. success: says whether a step has reached the goal;
    default: info["success"] or info["is_success"], otherwise a terminal step with a reward above 0
    and above all before it. moved: called at each step. Raises UserError where the environment
    fails.
    """
    if max_steps < 1 or execute < 1:
        raise UserError(f"{max_steps} steps, {execute} of each plan: both must be at least 1")
    planner.begin(seed)
    observation, info = environments.reset(env, _name(env), seed)
    env.action_space.seed(seed)
    view = View.of(env, planner.manifest, observation, info, keys or {})
    target = goal(env, observation, info) if callable(goal) else goal
    past = _Past()
    past.saw(*view.look(env, observation, info))
    judge = _Judge(success)
    imagined: list[np.ndarray] | None = []
    costs: list[float] = []
    evaluations, seconds = 0, 0.0
    while not judge.is_over and judge.steps < max_steps:
        started = time.perf_counter()
        plan = planner.plan(np.stack(past.frames), past.conditions(), target, executed=execute)
        seconds += time.perf_counter() - started
        costs.append(plan.cost)
        evaluations += plan.evaluations
        shown = planner.shown(plan.states)
        for number, action in enumerate(plan.actions[:execute]):
            for own in environment_actions(action, planner.manifest, env.action_space):
                moment = environments.step(env, own, judge.steps)
                judge.saw(*moment)
                moved()
                if judge.is_over or judge.steps >= max_steps:
                    break
            observation, *_, info = moment
            past.actions.append(action)
            past.saw(*view.look(env, observation, info))
            imagined = None if shown is None or imagined is None else [*imagined, shown[number]]
            if judge.is_over or judge.steps >= max_steps:
                break
    return Outcome(
        judge.success,
        judge.steps,
        judge.rewards,
        np.stack(past.frames),
        None if imagined is None else np.stack(imagined),
        costs,
        evaluations,
        seconds,
        target,
    )


class _Judge:
    """Whether an episode is over, and whether it succeeded."""

    def __init__(self, success: Success | None):
        self.function = success
        self.rewards: list[float] = []
        self.success: bool | None = False if success is not None else None
        self.is_over = False

    @property
    def steps(self) -> int:
        return len(self.rewards)

    def saw(
        self, observation: Any, reward: float, terminated: bool, truncated: bool, info: Any
    ) -> None:
        """A step; UserError for a reward that is no number."""
        if not np.isfinite(reward):
            raise UserError(
                f"step {self.steps}: the environment's reward is {reward}: must be a finite number"
            )
        reached = self._reached(observation, float(reward), bool(terminated), info)
        if reached is not None:
            self.success = bool(self.success) or reached
        self.rewards.append(float(reward))
        self.is_over = bool(terminated) or bool(truncated) or bool(self.success)

    def _reached(self, observation: Any, reward: float, terminated: bool, info: Any) -> bool | None:
        """None where nothing is said."""
        if self.function is not None:
            return bool(self.function(observation, reward, terminated, info))
        for key in _SAID:
            if isinstance(info, dict) and key in info:
                return bool(np.all(info[key]))
        if terminated and reward > 0:
            return reward > max(self.rewards, default=0.0)
        return None


def _name(env: Any) -> str:
    spec = getattr(env, "spec", None)
    return str(getattr(spec, "id", type(env).__name__))
