"""Planner: from past frames and a goal to actions. START HERE.

    planner = Planner(model, config, manifest, solver="cem", horizon=8, budget=256, seed=0)
    plan = planner.plan(frames, conditions, goal)     actions, in the units of the dataset

    frames --encoder--> states ┐
    conditions, standardised   ┴ situation --solver, model, goal--> actions --units--> plan

`imagines="persistence"` plans with the last frame in place of a model: a baseline that knows the
goal and not what actions do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebwm_scale.config import resolved
from ebwm_scale.config.schema import Config
from ebwm_scale.control.actions import action_condition, action_spec
from ebwm_scale.control.futures import Situation, imagine_futures, persistent_futures
from ebwm_scale.control.joint_energy import joint_gradients, refuse_without_joint_energy
from ebwm_scale.control.solvers.gradient import JointDescent
from ebwm_scale.control.solvers.problem import Problem, Solver
from ebwm_scale.control.solvers.sampling import (
    CrossEntropy,
    ImprovedCrossEntropy,
    PathIntegral,
    RandomShooting,
)
from ebwm_scale.control.world_costs import (
    DISTANCES,
    REACHED,
    CostConfig,
    FrameGoal,
    Goal,
    future_costs,
)
from ebwm_scale.core.errors import UserError
from ebwm_scale.data.format.content import VideoContent
from ebwm_scale.data.format.manifest import Manifest
from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.inference.imagination import ACTION, Imagined
from ebwm_scale.inference.thinking import ThinkingConfig
from ebwm_scale.world_model import WorldModel

SOLVERS = ("gradient", "cem", "icem", "mppi", "random")
IMAGINES = ("model", "persistence")
LEAST_BUDGET = {"gradient": 3}  # others: 1


@dataclass(frozen=True)
class Plan:
    """What to do.

    actions (horizon, width): stored units, ids of discrete ones. cost: of what is imagined under
    them, lower is better. history: the lowest cost after each iteration of the solver. evaluations:
    futures that were evaluated. states (horizon, P, dimension): the imagined frames.
    """

    actions: np.ndarray
    cost: float
    history: list[float]
    evaluations: int
    states: Tensor


class Planner:
    """Plans with one model, for one environment at a time.

    model: in eval mode. config: its resolved configuration. manifest: of its dataset. horizon:
    steps ahead; default: what the trained context has behind its first half. budget: futures that
    a plan may evaluate. space: the environment's action space, for its bounds. imagines: of
    IMAGINES. thinking: how the model refines imagined frames. costs: beside the goal's.
    reached, distance: how frames are held against one that is the goal, see world_costs.py.
    goal_weight: of the goal against the energy, for the solver gradient. Raises UserError for a run
    without actions, and for numbers that cannot be.
    """

    def __init__(
        self,
        model: WorldModel,
        config: Config,
        manifest: Manifest,
        *,
        solver: str = "cem",
        horizon: int | None = None,
        budget: int = 256,
        seed: int = 0,
        space: Any = None,
        imagines: str = "model",
        thinking: ThinkingConfig | None = None,
        costs: CostConfig = CostConfig(),
        reached: str = REACHED[0],
        distance: str = DISTANCES[0],
        goal_weight: float = 1.0,
        batch_size: int = 64,
    ):
        self.model = model
        self.manifest = manifest
        self.num_groups = resolved.num_groups(config)
        if horizon is None:
            horizon = self.num_groups - (self.num_groups + 1) // 2 + 1
        self.horizon = horizon
        self.budget = budget
        self.seed = seed
        self.imagines = imagines
        self.solver_name = solver
        self.goal_weight = goal_weight
        self.costs = costs
        self.reached = reached
        self.distance = distance
        self.grid = resolved.grid(config)
        self.batch_size = batch_size
        self.thinking = thinking or ThinkingConfig(seed=config.train.seed)
        self._check()
        action_condition(manifest)
        refuse_other_conditions(config, manifest)
        self.observe = Observation(manifest, next(model.parameters()).device)
        self.spec = action_spec(manifest, self.observe, space)
        self.begin()

    def begin(self, episode: int = 0) -> None:
        """Before an episode: nothing is known of the last one, and draws depend on its number."""
        key = np.random.SeedSequence([self.seed, episode]).generate_state(1, np.uint64)[0]
        self.generator = torch.Generator().manual_seed(int(key) % 2**63)
        self.rest: Tensor | None = None

    def plan(
        self,
        frames: np.ndarray,
        conditions: Mapping[str, np.ndarray],
        goal: Goal | np.ndarray,
        *,
        executed: int = 1,
    ) -> Plan:
        """Actions from the last frame on.

        frames: uint8 (T, height, width, 3) seen so far, T >= 1. conditions: in stored units, by
        name: action (T - 1, width), what was done between them; others (T, width). goal: a frame
        like them, or a Goal. executed: how many actions of this plan are taken before the next one
        is asked for, which starts from the rest of this one.
        """
        situation = self.situation(frames, conditions)
        if isinstance(goal, np.ndarray):
            goal = self.frame_goal(goal)
        futures = _Futures(self, situation, goal)
        problem = Problem(
            self.spec, self.horizon, futures.costs, self.budget, self.generator, self._start()
        )
        self._solver(futures)(problem)
        assert problem.best is not None, "a solver evaluates one candidate at least"
        best = problem.best
        self.rest = torch.cat([best[executed:], best[-1:].expand(executed, -1)])[: self.horizon]
        return Plan(
            self.spec.to_stored(best),
            problem.best_cost,
            problem.history,
            problem.evaluations,
            futures.imagine(best[None])[0],
        )

    def frame_goal(self, frame: np.ndarray) -> FrameGoal:
        """A goal of a frame uint8 (height, width, 3); UserError for another size."""
        content = self.manifest.content
        assert isinstance(content, VideoContent), "checked when the planner was made"
        size = (content.height, content.width, 3)
        if frame.dtype != np.uint8 or frame.shape != size:
            raise UserError(
                f"the goal is {frame.dtype} {frame.shape}: frames of this run are uint8 {size}; "
                "give one of that size"
            )
        return FrameGoal(self.states_of(frame[None])[0], self.reached, self.distance, self.grid)

    def situation(self, frames: np.ndarray, conditions: Mapping[str, np.ndarray]) -> Situation:
        """What was seen, in the model's units, as far as its context reaches with the horizon."""
        count = min(len(frames), self.num_groups - self.horizon + 1)
        stored = {}
        for condition in self.observe.content.conditions:
            expected = len(frames) - (condition.name == ACTION)
            values = np.asarray(conditions[condition.name]).reshape(-1, condition.width)
            if len(values) != expected:
                raise UserError(
                    f"condition {condition.name} is given {len(values)} times for {len(frames)} "
                    f"frames: give it {expected} times"
                )
            if condition.name != ACTION:
                stored[condition.name] = torch.as_tensor(values)[None, -count:]
        actions = np.asarray(conditions[ACTION]).reshape(-1, self.spec.width)
        own = self.spec.to_model(actions)[len(actions) - count + 1 :]
        sensed = {}
        for name, values in stored.items():
            sensed[name] = values if values.is_floating_point() else values.long()
        known = self.observe.conditions(sensed | {ACTION: torch.as_tensor(actions)[None]})
        return Situation(
            self.states_of(frames[-count:]), own, {name: known[name][0] for name in sensed}
        )

    def shown(self, states: Tensor) -> np.ndarray | None:
        """Imagined frames (T, P, dimension) as uint8 (T, height, width, 3); None where the encoder
        cannot go back.
        """
        assert self.observe.space is not None, "a world is of frames"
        frames = self.observe.space.frames(states.float().flatten(0, 1)[None])
        return None if frames is None else frames[0].cpu().numpy()

    def states_of(self, frames: np.ndarray) -> Tensor:
        """States (T, P, dimension) of frames uint8 (T, height, width, 3)."""
        assert self.observe.space is not None, "a world is of frames"
        states = self.observe.space.states(torch.from_numpy(np.ascontiguousarray(frames))[None])[0]
        return states.unflatten(0, (len(frames), -1))

    def _start(self) -> Tensor | None:
        return None if self.rest is None else self.rest.clone()

    def _solver(self, futures: _Futures) -> Solver:
        if self.solver_name == "gradient":
            return JointDescent(futures.imagine, futures.gradients)
        if self.solver_name == "cem":
            return CrossEntropy()
        if self.solver_name == "icem":
            return ImprovedCrossEntropy()
        if self.solver_name == "mppi":
            return PathIntegral()
        return RandomShooting()

    def _check(self) -> None:
        if self.solver_name not in SOLVERS:
            raise UserError(f"solver is {self.solver_name}: must be one of {', '.join(SOLVERS)}")
        if self.imagines not in IMAGINES:
            raise UserError(f"imagines is {self.imagines}: must be one of {', '.join(IMAGINES)}")
        if not 1 <= self.horizon <= self.num_groups:
            raise UserError(
                f"horizon is {self.horizon}: must be from 1 to {self.num_groups}, the frames that "
                "this run was trained to see"
            )
        least = LEAST_BUDGET.get(self.solver_name, 1)
        if self.budget < least:
            raise UserError(
                f"budget is {self.budget}: must be at least {least} for the solver "
                f"{self.solver_name}"
            )
        if self.solver_name == "gradient":
            if self.imagines == "persistence":
                raise UserError(
                    "the solver gradient has nothing to follow where the last frame stays; take "
                    "cem, icem, mppi or random"
                )
            refuse_without_joint_energy(self.model)


class _Futures:
    """Futures of one situation, held against one goal."""

    def __init__(self, planner: Planner, situation: Situation, goal: Goal):
        self.planner = planner
        self.situation = situation
        self.goal = goal
        self.last: tuple[Tensor, Imagined] | None = None

    def costs(self, actions: Tensor) -> Tensor:
        """(N,) of candidates (N, H, width)."""
        futures = self._imagined(actions)
        return future_costs(futures, actions, self.goal, self.planner.costs)

    def imagine(self, actions: Tensor) -> Tensor:
        """(N, H, P, dimension); of the candidates just evaluated it costs nothing."""
        return self._imagined(actions).states

    def gradients(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Of the joint energy and the goal."""
        parts = []
        size = self.planner.batch_size
        for x, a in zip(states.split(size), actions.split(size)):
            _, *gradients = joint_gradients(
                self.planner.model,
                self.situation,
                x,
                a,
                self.goal.pull,
                self.planner.goal_weight,
            )
            parts.append(gradients)
        of_states, of_actions = zip(*parts)
        return torch.cat(of_states), torch.cat(of_actions)

    def _imagined(self, actions: Tensor) -> Imagined:
        if self.last is not None and self.last[0] is actions:
            return self.last[1]
        if self.planner.imagines == "persistence":
            futures = persistent_futures(self.situation, actions)
        else:
            futures = imagine_futures(
                self.planner.model,
                self.situation,
                actions,
                thinking=self.planner.thinking,
                energies=self.planner.costs.energy_weight != 0,
                batch_size=self.planner.batch_size,
            )
        self.last = (actions, futures)
        return futures


def refuse_other_conditions(config: Config, manifest: Manifest) -> None:
    """UserError for a dataset whose conditions are not those that a run was trained with."""
    content = manifest.content
    assert isinstance(content, VideoContent), "a dataset with actions is of frames"
    trained = [(c.name, c.kind, c.width, c.num_values or 0) for c in config.data.conditions]
    there = [(c.name, c.kind, c.width, c.num_values) for c in content.conditions]
    if trained != there:
        ours = ", ".join(name for name, *_ in trained) or "nothing"
        theirs = ", ".join(name for name, *_ in there)
        raise UserError(
            f"{manifest.path}: its conditions are {theirs}, this run was trained with {ours} or "
            "others of another width: name the run's own dataset with --data"
        )
