"""What a refinement step moves: the states x of a tile's rows, and the workspaces z beside them.

    e = embed(x)        x <- (1 - c) x + W m        m <- mu m - alpha dE/de
    w = Z z             z <- (1 - c) z + n          n <- mu n - beta dE/dz

c: `refinement.decay`, mu: `refinement.momentum`, both 0 in the papers' algorithm: a step of
gradient descent. alpha and beta of a step are the model's times the step's factors (StepFactors).
Which update W m stands for is the state space's (model/states.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebwm_scale.config.schema import RefinementConfig
from ebwm_scale.model.candidates import CandidateState, whole_state, with_noise
from ebwm_scale.model.states import EmbeddedState, EmbeddingState, Targets, VocabularyState
from ebwm_scale.model.workspace import WorkspaceState
from ebwm_scale.refinement.energy_level import EnergyLevel
from ebwm_scale.refinement.momentum import carried_from, motion_of, plus_carried
from ebwm_scale.refinement.sampling import NoiseSampler
from ebwm_scale.refinement.step_plan import StepPlan


class StepFactors(NamedTuple):
    """Factors on the sizes of a step, alpha and beta: numbers, or (b, s, 1) with one per row.

    taken (b, s), bool: the rows that take the step; None: all (acceptance.py).
    """

    of_alpha: Tensor | float
    of_beta: Tensor | float
    taken: Tensor | None = None


class Moved(NamedTuple):
    """What a step of the state did.

    loss: where it ended, a scalar, with targets. z_term: the z-loss's part of it, detached, where
    there is one. motion (b, s, D): what it moved by in front of the map, where that is kept.
    """

    loss: Tensor | None
    z_term: Tensor | None
    motion: Tensor | None


class MovingState:
    """The states of a tile's rows, from step to step.

    Each step is `embed`, which makes `embedded` e, and then `move`. step_size: alpha. shape: (b, s)
    of the tile. keeps_moves: every step's move is asked for (spectral_penalty.py).
    """

    def __init__(
        self,
        space: VocabularyState | EmbeddingState,
        step_size: Tensor,
        config: RefinementConfig,
        noise: NoiseSampler,
        shape: tuple[int, int],
        *,
        keeps_moves: bool = False,
    ):
        self.space = space
        self.step_size = step_size
        self.config = config
        self.noise = noise
        self.shape = shape
        self.keeps_moves = keeps_moves
        self.x: Tensor | CandidateState | None = None  # where a step ended, if that was asked for
        self.embedded: EmbeddedState | None = None  # the same inside the next step
        self.motion: Tensor | None = None  # m of the step before
        self.at_zero = False  # the step starts at zeros that nobody has written down

    @property
    def vectors(self) -> Tensor:
        """e (b, s, D): what enters the network."""
        assert self.embedded is not None, "a state is embedded before it is looked at"
        return self.embedded.vectors

    def whole(self) -> Tensor | None:
        """x (b, s, size) after a step, if it was asked for."""
        return None if self.x is None else whole_state(self.x)

    def embed(self, step: StepPlan, level: EnergyLevel | None = None) -> Tensor | None:
        """Where the step starts: the initial state, or the last one, with Langevin noise.

        Returns what the rows' states cost (b, s), where `level` has a term for the step.
        """
        langevin = self.noise.langevin(step.index)
        starts = step.index == 0
        self.at_zero = starts and langevin is None and self.noise.starts_at_zero()
        if starts and not self.at_zero:
            self.x = self.noise.initial_state()
        if langevin is not None:
            assert self.x is not None, "the plan keeps every state under Langevin noise"
            self.x = with_noise(self.x, langevin)
        costs = None
        if level is not None and level.at_start(step):
            assert isinstance(self.x, Tensor), "the plan keeps every state, which is whole"
            costs = level.costs(self.x)  # before `embed` below may overwrite it
        with torch.set_grad_enabled(step.needs_graph):
            if self.at_zero:
                self.embedded = self.space.embed_zeros(self.shape)
            elif self.embedded is None:
                assert self.x is not None, "a step gives a state or the next embedded one"
                self.embedded = self.space.embed(self.x)
        self.x = None  # `embedded` has what is needed: a second reference costs memory
        return costs

    def embed_end(self, step: StepPlan, level: EnergyLevel) -> Tensor:
        """Where the last step ended, to measure its energy: `vectors` are its own then.

        Returns what the rows' states cost (b, s).
        """
        assert isinstance(self.x, Tensor), "the plan keeps every state, which is whole"
        costs = level.costs(self.x)
        # `embed` may overwrite what it is given.
        state = self.x.clone() if step.keep_whole else self.x
        self.embedded = self.space.embed(state)
        return costs

    def move(
        self, energy_grad: Tensor, factors: StepFactors, targets: Targets | None, step: StepPlan
    ) -> Moved:
        """Take the step along dE/de (b, s, D)."""
        momentum, decay = self.config.momentum, self.config.decay
        with torch.set_grad_enabled(step.needs_graph or step.next_needs_graph):
            step_size = self.step_size if step.needs_graph else self.step_size.detach()
            alpha = step_size * factors.of_alpha
            embedded, self.embedded = self.embedded, None
            assert embedded is not None, "a step begins with embed"
            if decay and not self.at_zero:
                embedded = embedded.decayed(1 - decay * factors.of_alpha)
            carried = only_rows(factors.taken, carried_from(self.motion, momentum))
            self.x, self.embedded, loss, z_term = self.space.update(
                embedded, energy_grad, alpha, targets, step, carried
            )
        if not self.keeps_moves and (momentum == 0 or step.is_last):
            return Moved(loss, z_term, None)
        with torch.set_grad_enabled(step.needs_graph if self.keeps_moves else step.keep_graph):
            motion = motion_of(energy_grad, alpha, carried, self.space.dtype)
        self.motion = kept_for_next(step, motion)
        return Moved(loss, z_term, motion if self.keeps_moves else None)


class MovingWorkspace:
    """The workspaces z (b, s, width) of a tile's rows, from step to step; none for a model without.

    keeps_moves: as for MovingState. keeps_end: where the last step ends is asked for.
    """

    def __init__(
        self,
        workspace: WorkspaceState | None,
        config: RefinementConfig,
        noise: NoiseSampler,
        *,
        keeps_moves: bool = False,
        keeps_end: bool = False,
    ):
        self.workspace = workspace
        self.config = config
        self.keeps_moves = keeps_moves
        self.keeps_end = keeps_end or keeps_moves
        self.z = None if workspace is None else noise.initial_workspace()
        self.motion: Tensor | None = None  # n of the step before

    def embed(self, step: StepPlan) -> Tensor | None:
        """w (b, s, D): what enters the network beside e."""
        if self.workspace is None:
            return None
        assert self.z is not None, "a workspace starts somewhere"
        with torch.set_grad_enabled(step.needs_graph):
            return self.workspace.embed(self.z)

    def move(
        self, workspace_grad: Tensor | None, factors: StepFactors, step: StepPlan
    ) -> Tensor | None:
        """Take the step along dE/dw (b, s, D); the last one only where `keeps_end`.

        Returns what it moved by (b, s, width), where `keeps_moves`.
        """
        if self.workspace is None or (step.is_last and not self.keeps_end):
            return None
        assert self.z is not None and workspace_grad is not None, "it entered the step"
        with torch.set_grad_enabled(step.needs_graph if self.keeps_moves else step.keep_graph):
            motion = plus_carried(
                self.workspace.change(workspace_grad, self.z.dtype, factors.of_beta),
                only_rows(factors.taken, carried_from(self.motion, self.config.momentum)),
            )
            next_z = self.workspace.update(self.z, motion, factors.of_beta, self.config.decay)
            move = next_z - self.z if self.keeps_moves else None
        self.z = kept_for_next(step, next_z)
        self.motion = kept_for_next(step, motion)
        return move


def kept_for_next(step: StepPlan, tensor: Tensor) -> Tensor:
    """What the next step reads of this one's: with its graph only where the plan keeps it."""
    return tensor if step.keep_graph else tensor.detach()


def only_rows(taken: Tensor | None, of_step: Any) -> Any:
    """A step's numbers, (B, s, ..) or one for all, with 0 for rows (B, s) that do not take it.

    Unchanged without taken, and where there are none.
    """
    if taken is None or of_step is None:
        return of_step
    return torch.where(taken[..., None], of_step, 0)
