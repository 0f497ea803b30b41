"""Accept only if lower: a row whose energy a step does not lower keeps its state.

    fall = E(x, z) - E(x', z')        in the landscape and the context of the step
    taken where fall > 0              elsewhere x and z stay, later steps are half as long, and what
                                      moved the row is forgotten (momentum.py)

Training does this with `refinement.accept: lower`, and thinking of a model that was trained so, or
that is asked to (inference/thinking.py). The rows of a group have one energy, so they are taken
together. With `refinement.decay` E is that of the steps, with what decay adds (decay.py).

The choice is a constant of the gradient: a row that stays passes its loss's gradient to the state
it had, and none to the step. It costs a step without a graph and the energy where that ends.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebwm_scale.config.schema import RefinementConfig
from ebwm_scale.model.context import Context
from ebwm_scale.model.energy_transformer import EnergyTransformer
from ebwm_scale.model.groups import of_groups
from ebwm_scale.model.states import EmbeddedState, EmbeddingState, VocabularyState
from ebwm_scale.model.workspace import WorkspaceState
from ebwm_scale.refinement.inner_gradient import energy_of
from ebwm_scale.refinement.momentum import carried_from, plus_carried
from ebwm_scale.refinement.step_plan import INFERENCE_STEP


def is_taken(fall: Tensor) -> Tensor:
    """Which rows (B, K) take a step that lowers their energy by `fall`."""
    return fall > 0


class Before(NamedTuple):
    """Where a step begins, and along which slopes.

    embedded, z (b, s, width): of the rows. energy (b, s), energy_grad dE/de and workspace_grad
    dE/dw (b, s, D). motion, z_motion: of the step before, with momentum.
    """

    embedded: EmbeddedState
    z: Tensor | None
    energy: Tensor
    energy_grad: Tensor
    workspace_grad: Tensor | None
    motion: Tensor | None
    z_motion: Tensor | None


class Acceptance:
    """Of one tile, whose steps are told in their order.

    shrunk (b, s, 1): factor on a row's steps. alpha: the model's, without a graph. shape: (b, s).
    """

    def __init__(
        self,
        network: EnergyTransformer,
        config: RefinementConfig,
        space: VocabularyState | EmbeddingState,
        workspace: WorkspaceState | None,
        alpha: Tensor,
        shape: tuple[int, int],
    ):
        self.network = network
        self.config = config
        self.space = space
        self.workspace = workspace
        self.alpha = alpha
        self.shrunk = alpha.new_ones(*shape, 1).to(space.dtype)

    @torch.no_grad()
    def decide(
        self,
        before: Before,
        factors: tuple[Tensor, Tensor],
        context: Context,
        positions: slice,
        landscape: int,
    ) -> Tensor:
        """The rows (b, s) that take the step; the others' later steps are half as long from now on.

        factors: on alpha and on beta, of this step.
        """
        x, z = self._proposed(before, factors)
        gained = self._added(before.embedded.state, before.z) - self._added(x, z)
        w = None
        if self.workspace is not None and z is not None:
            w = self.workspace.embed(z)
        vectors = self.space.embed(x).vectors  # x is ours to overwrite
        after = energy_of(
            self.network,
            vectors,
            context,
            positions,
            landscape,
            config=self.config,
            workspace=w,
        )
        fall = before.energy - after + gained
        taken = is_taken(of_groups(fall, self.network.group_size))
        self.shrunk = torch.where(taken[..., None], self.shrunk, self.shrunk / 2)
        return taken

    def _proposed(
        self, before: Before, factors: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Where the step would lead, (x, z)."""
        of_alpha, of_beta = factors
        config = self.config
        embedded = before.embedded
        if config.decay and embedded.state is not None:
            embedded = embedded.decayed(1 - config.decay * of_alpha)
        carried = carried_from(before.motion, config.momentum)
        state, *_ = self.space.update(
            embedded, before.energy_grad, self.alpha * of_alpha, None, INFERENCE_STEP, carried
        )
        assert isinstance(state, Tensor), "a step of inference gives a state, without candidates"
        if self.workspace is None or before.z is None or before.workspace_grad is None:
            return state, None
        change = plus_carried(
            self.workspace.change(before.workspace_grad, before.z.dtype, of_beta),
            carried_from(before.z_motion, config.momentum),
        )
        return state, self.workspace.update(before.z, change, of_beta, config.decay)

    def _added(self, x: Tensor | None, z: Tensor | None) -> Tensor | float:
        return added_by_decay(self.config, self.space, self.alpha, self.workspace, x, z)


def added_by_decay(
    config: RefinementConfig,
    space: VocabularyState | EmbeddingState,
    alpha: Tensor,
    workspace: WorkspaceState | None,
    x: Tensor | None,
    z: Tensor | None,
) -> Tensor | float:
    """What decay adds to the energies (B, s) of states x (B, s, size) and workspaces z; alpha: the
    model's. x None: zeros, which add nothing.
    """
    # With momentum steps add up to 1 / (1 - mu) of their length, and what they forget does not.
    decay = config.decay * (1 - config.momentum)
    energy: Tensor | float = 0.0
    if decay and x is not None:
        energy = decay / alpha * space.decay_energy(x)
    if decay and workspace is not None and z is not None:
        energy = energy + decay / workspace.step_size.detach() * z.square().sum(-1) / 2
    return energy


def only_rows(taken: Tensor | None, of_step: Any) -> Any:
    """A step's numbers, (B, s, ..) or one for all, with 0 for rows (B, s) that do not take it.

    Unchanged without taken, and where there are none.
    """
    if taken is None or of_step is None:
        return of_step
    return torch.where(taken[..., None], of_step, 0)
