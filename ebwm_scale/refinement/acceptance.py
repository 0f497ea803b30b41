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
from ebwm_scale.refinement.moving import MovingState, MovingWorkspace, StepFactors, only_rows
from ebwm_scale.refinement.step_plan import INFERENCE_STEP


def is_taken(fall: Tensor) -> Tensor:
    """Which rows (B, K) take a step that lowers their energy by `fall`."""
    return fall > 0


class Acceptance:
    """Of one tile, whose steps are told in their order.

    x, z: what moves in it. shrunk (b, s, 1): factor on a row's steps, a power of 1/2.
    """

    def __init__(
        self,
        network: EnergyTransformer,
        config: RefinementConfig,
        x: MovingState,
        z: MovingWorkspace,
    ):
        self.network = network
        self.config = config
        self.x = x
        self.z = z
        self.alpha = x.step_size.detach()
        self.shrunk = self.alpha.new_ones(*x.shape, 1).to(x.space.dtype)

    def narrowed(
        self,
        factors: StepFactors,
        energy: Tensor,
        energy_grad: Tensor,
        workspace_grad: Tensor | None,
        context: Context,
        positions: slice,
        landscape: int,
    ) -> StepFactors:
        """The step's factors, 0 for rows that stay, as the energy where it would end decides.

        energy (b, s), energy_grad dE/de and workspace_grad dE/dw (b, s, D): where it begins.
        """
        factors = StepFactors(factors.of_alpha * self.shrunk, factors.of_beta * self.shrunk)
        ends = self.proposed(energy_grad, workspace_grad, factors)
        taken = self.decide(energy, *ends, context, positions, landscape)
        return StepFactors(
            only_rows(taken, factors.of_alpha), only_rows(taken, factors.of_beta), taken
        )

    @torch.no_grad()
    def decide(
        self,
        energy: Tensor,
        x: Tensor,
        z: Tensor | None,
        context: Context,
        positions: slice,
        landscape: int,
    ) -> Tensor:
        """The rows (b, s) that go to x and z; the others' later steps are half as long from now on.

        x, z: ours to overwrite.
        """
        gained = self._added(self._here().state, self.z.z) - self._added(x, z)
        w = None
        if self.z.workspace is not None and z is not None:
            w = self.z.workspace.embed(z)
        after = energy_of(
            self.network,
            self.x.space.embed(x).vectors,
            context,
            positions,
            landscape,
            config=self.config,
            workspace=w,
        )
        taken = is_taken(of_groups(energy - after + gained, self.network.group_size))
        self.shrunk = torch.where(taken[..., None], self.shrunk, self.shrunk / 2)
        return taken

    @torch.no_grad()
    def proposed(
        self, energy_grad: Tensor, workspace_grad: Tensor | None, factors: StepFactors
    ) -> tuple[Tensor, Tensor | None]:
        """Where the step would lead, (x, z)."""
        decay, momentum = self.config.decay, self.config.momentum
        embedded = self._here()
        if decay and embedded.state is not None:
            embedded = embedded.decayed(1 - decay * factors.of_alpha)
        state, *_ = self.x.space.update(
            embedded,
            energy_grad,
            self.alpha * factors.of_alpha,
            None,
            INFERENCE_STEP,
            carried_from(self.x.motion, momentum),
        )
        assert isinstance(state, Tensor), "a step of inference gives a state, without candidates"
        workspace, z = self.z.workspace, self.z.z
        if workspace is None or z is None or workspace_grad is None:
            return state, None
        change = plus_carried(
            workspace.change(workspace_grad, z.dtype, factors.of_beta),
            carried_from(self.z.motion, momentum),
        )
        return state, workspace.update(z, change, factors.of_beta, decay)

    def _here(self) -> EmbeddedState:
        """Where the step begins."""
        assert self.x.embedded is not None, "a step begins with embed"
        return self.x.embedded

    def _added(self, x: Tensor | None, z: Tensor | None) -> Tensor | float:
        return added_by_decay(self.config, self.x.space, self.alpha, self.z.workspace, x, z)


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
