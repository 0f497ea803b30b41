"""A trained world model as a cost of stable-worldmodel (optional: pip install stable-worldmodel).

    cost = WorldModelCost.load("runs/world")
    solver = swm.solver.CEMSolver(model=cost, num_samples=300)
    policy = swm.policy.WorldModelPolicy(solver, config, process=cost.process())
    world.set_policy(policy)

Nothing of that package is imported here: its solvers take whatever has `get_cost`. They give a
candidate's actions in the units that `process` made, which are those of this model, and frames as
the world shows them: bytes of the size that the run was trained on (World(image_shape=..)).

    info["pixels"]    uint8 (envs, samples, T, height, width, 3), or with the colours first
    info["goal"]      the same; its last frame is the goal
    info[NAME]        of each other condition (envs, samples, T, width), in stored units
    candidates        (envs, samples, horizon, width); ids as one of their values each, in
                      (envs, samples, horizon, width * values)

With T frames the first T - 1 actions of a candidate belong to the frames before the last one, as
that package's own models read them. Costs are differentiable where the candidates are: then futures
are imagined with a graph, for its GradientSolver.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ebwm_scale.checkpoint.load import load_checkpoint
from ebwm_scale.config import resolved
from ebwm_scale.config.schema import Config
from ebwm_scale.control.actions import action_spec
from ebwm_scale.control.differentiable_futures import differentiable_futures
from ebwm_scale.control.futures import Situation, imagine_futures
from ebwm_scale.control.planner import refuse_other_conditions
from ebwm_scale.control.world_costs import REACHED, FrameGoal
from ebwm_scale.core.errors import UserError
from ebwm_scale.data.format.content import VideoContent
from ebwm_scale.data.format.manifest import Manifest
from ebwm_scale.data.format.side_files import open_manifest
from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.inference.imagination import ACTION
from ebwm_scale.inference.thinking import ThinkingConfig
from ebwm_scale.world_model import WorldModel


class WorldModelCost(nn.Module):
    """How far the future of each candidate is from the goal's frame.

    model: in eval mode; config: resolved; manifest: of its dataset, with actions. reached: which
    imagined frames are held against the goal, see control/world_costs.py. Raises UserError for a
    run without actions.
    """

    def __init__(
        self,
        model: WorldModel,
        config: Config,
        manifest: Manifest,
        *,
        reached: str = REACHED[0],
        batch_size: int = 64,
    ):
        super().__init__()
        self.model = model
        self.config = config
        self.manifest = manifest
        self.reached = reached
        self.batch_size = batch_size
        self.observe = Observation(manifest, next(model.parameters()).device)
        self.spec = action_spec(manifest, self.observe)
        refuse_other_conditions(config, manifest)
        self.thinking = ThinkingConfig(seed=config.train.seed)

    @classmethod
    def load(
        cls,
        run: str | Path,
        *,
        manifest: str | Path | None = None,
        device: str = "cpu",
        reached: str = REACHED[0],
    ) -> WorldModelCost:
        """Of a run folder or a checkpoint folder; manifest: where its dataset is now."""
        model, config = load_checkpoint(run, device=device)
        path = manifest or config.data.manifest
        if path is None:
            raise UserError(f"{run}: names no dataset: give manifest=")
        return cls(model, config, open_manifest(path), reached=reached)

    def process(self) -> dict[str, ActionUnits]:
        """For WorldModelPolicy(process=..): actions of the environment to candidates and back."""
        return {} if self.spec.is_discrete else {ACTION: ActionUnits(self.observe)}

    def get_cost(self, info_dict: dict[str, Any], action_candidates: Tensor) -> Tensor:
        """Costs (envs, samples); lower is better."""
        candidates = self._actions(action_candidates)
        device = self.observe.device
        num_envs, num_samples = candidates.shape[:2]
        pixels = self._frames(info_dict, "pixels", num_envs)
        goals = self._frames(info_dict, "goal", num_envs)
        past = pixels.shape[1] - 1
        horizon = candidates.shape[2] - past
        most = resolved.num_groups(self.config)
        if horizon < 1 or candidates.shape[2] > most:
            raise UserError(
                f"candidates have {candidates.shape[2]} actions, after {past + 1} frames of which "
                f"the first {past} were taken: must be from {past + 1} to {most}, the frames that "
                "this run was trained to see"
            )
        costs = []
        for env in range(num_envs):
            sensed = self._sensed(info_dict, env, past + 1)
            goal = FrameGoal(self._states(goals[env, -1:])[0], self.reached)
            states = self._states(pixels[env])
            own = candidates[env].to(device)
            if past == 0:
                situation = Situation(states, self._none(), sensed)
                costs.append(self._costs(situation, own, goal))
                continue
            # Candidates may differ in what is past as well: each has a situation of its own.
            for candidate in own:
                before = self._ids(candidate[:past])
                situation = Situation(states, before, sensed)
                costs.append(self._costs(situation, candidate[None, past:], goal))
        return torch.cat(costs).view(num_envs, num_samples).to(action_candidates.device)

    def criterion(self, info_dict: dict[str, Any], action_candidates: Tensor) -> Tensor:
        """The same: the protocol has it beside get_cost."""
        return self.get_cost(info_dict, action_candidates)

    def _costs(self, situation: Situation, actions: Tensor, goal: FrameGoal) -> Tensor:
        """(N,) of candidates (N, H, ..)."""
        costs = []
        for some in actions.split(self.batch_size):
            if some.requires_grad:
                states = differentiable_futures(self.model, situation, some, self.thinking)
            else:
                with torch.inference_mode(False), torch.no_grad():
                    states = imagine_futures(
                        self.model, situation, some.clone(), thinking=self.thinking
                    ).states
            costs.append(goal.cost(states, some))
        return torch.cat(costs)

    def _actions(self, candidates: Tensor) -> Tensor:
        """(envs, samples, horizon, width), or (.., width, values) of ids."""
        width = self.spec.width * (self.spec.most_values if self.spec.is_discrete else 1)
        if candidates.dim() != 4 or candidates.shape[-1] != width:
            raise UserError(
                f"candidates are {tuple(candidates.shape)}: expected (envs, samples, horizon, "
                f"{width}): this run's actions have width {self.spec.width}"
                + (f" of {self.spec.most_values} values" if self.spec.is_discrete else "")
            )
        if not self.spec.is_discrete:
            return candidates.float()
        return candidates.float().unflatten(-1, (self.spec.width, self.spec.most_values))

    def _ids(self, actions: Tensor) -> Tensor:
        """Actions of the past (T, width): the likeliest ids of probabilities, or numbers."""
        return actions.argmax(-1) if self.spec.is_discrete else actions.detach()

    def _none(self) -> Tensor:
        """No action (0, width)."""
        kind = torch.int64 if self.spec.is_discrete else torch.float32
        return torch.zeros(0, self.spec.width, dtype=kind, device=self.observe.device)

    def _frames(self, info: Mapping[str, Any], key: str, num_envs: int) -> np.ndarray:
        """uint8 (envs, T, height, width, 3): those of the first sample, since all have the same."""
        if key not in info:
            raise UserError(f"info has no {key}; it has {', '.join(info)}")
        content = self.manifest.content
        assert isinstance(content, VideoContent), "a dataset with actions is of frames"
        size = (content.height, content.width, 3)
        frames = np.asarray(torch.as_tensor(info[key])[:, 0].cpu())
        if frames.ndim == 5 and frames.shape[2:] == (3, *size[:2]) and size != frames.shape[2:]:
            frames = np.moveaxis(frames, 2, -1)
        if frames.dtype != np.uint8 or frames.ndim != 5 or frames.shape[2:] != size:
            raise UserError(
                f"{key} is {frames.dtype} {frames.shape} without samples: expected bytes (envs, T, "
                f"{content.height}, {content.width}, 3): give World(image_shape=({content.height}, "
                f"{content.width})) and no image transform, since the run has an encoder of its own"
            )
        if len(frames) != num_envs:
            raise UserError(f"{key} is of {len(frames)} environments, candidates of {num_envs}")
        return np.ascontiguousarray(frames)

    def _sensed(self, info: Mapping[str, Any], env: int, count: int) -> dict[str, Tensor]:
        """What else frames are conditioned on, standardised, (T, width) each."""
        stored = {}
        for condition in self.observe.content.conditions:
            if condition.name == ACTION:
                stored[ACTION] = torch.zeros(1, 0, condition.width)
                continue
            if condition.name not in info:
                raise UserError(
                    f"info has no {condition.name}, on which this run's frames are conditioned; it "
                    f"has {', '.join(info)}"
                )
            values = torch.as_tensor(info[condition.name])[env, 0].reshape(-1, condition.width)
            if len(values) != count:
                raise UserError(
                    f"{condition.name} is given for {len(values)} frames of {count}: give it for "
                    "each"
                )
            stored[condition.name] = (values.long() if condition.is_discrete else values)[None]
        known = self.observe.conditions(stored)
        return {name: values[0] for name, values in known.items() if name != ACTION}

    def _states(self, frames: np.ndarray) -> Tensor:
        """(T, P, dimension) of frames (T, height, width, 3)."""
        assert self.observe.space is not None, "a world is of frames"
        with torch.inference_mode(False):
            states = self.observe.space.states(torch.from_numpy(frames)[None])[0]
        return states.unflatten(0, (len(frames), -1))


class ActionUnits:
    """Actions of an environment in the units of candidates, and back; that package's Transformable.

    Where several actions of the environment stand side by side in one of the dataset, they have the
    same statistics, so that one of them is enough.
    """

    def __init__(self, observe: Observation):
        mean, std = observe.statistics(ACTION)
        self.mean, self.std = mean.cpu().numpy(), std.cpu().numpy()

    def transform(self, x: np.ndarray) -> np.ndarray:
        mean, std = self._of(x)
        return (x - mean) / std

    def inverse_transform(self, x: np.ndarray) -> np.ndarray:
        mean, std = self._of(x)
        return x * std + mean

    def _of(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.mean[: x.shape[-1]], self.std[: x.shape[-1]]
