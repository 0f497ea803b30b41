"""Who plans nothing: actions at random, as a lower bound of planning.

Planning with persistence is a Planner with imagines="persistence"; Transformer++ is a Planner with
another model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ebwm_scale.control.actions import action_spec
from ebwm_scale.control.planner import Plan
from ebwm_scale.control.solvers.problem import Problem
from ebwm_scale.control.world_costs import Goal
from ebwm_scale.data.format.manifest import Manifest
from ebwm_scale.data.loading.observation import Observation


class RandomActor:
    """Any of the actions, anew at each step; space: the environment's, for its bounds."""

    def __init__(self, manifest: Manifest, *, seed: int = 0, space: Any = None):
        self.manifest = manifest
        self.seed = seed
        self.spec = action_spec(manifest, Observation(manifest, "cpu"), space)
        self.begin()

    def begin(self, episode: int = 0) -> None:
        key = np.random.SeedSequence([self.seed, episode]).generate_state(1, np.uint64)[0]
        self.generator = torch.Generator().manual_seed(int(key) % 2**63)

    def plan(
        self,
        frames: np.ndarray,
        conditions: Mapping[str, np.ndarray],
        goal: Goal | np.ndarray,
        *,
        executed: int = 1,
    ) -> Plan:
        problem = Problem(
            self.spec, executed, lambda actions: torch.zeros(len(actions)), 1, self.generator
        )
        actions = problem.uniform(1)[0]
        return Plan(self.spec.to_stored(actions), 0.0, [], 0, torch.empty(0))

    def shown(self, states: Any) -> np.ndarray | None:
        """It imagines nothing."""
        return None
