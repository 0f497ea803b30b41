"""The refinement loop: a prediction starts as noise and descends the energy.

    x_0 ~ N(0, 1)
    for i in 0 .. N - 1:
        e       = embed(x_i)                       the state's own linear map
        E, g    = energy(e, context), dE/de        the inner gradient (inner_gradient.py)
        x_(i+1) = update(x_i, g, alpha)            x - alpha * dE/dx (model/states.py)
        loss_i  = criterion(x_(i+1), target)
    loss = mean of loss_i, or loss_(N-1)           its gradient goes through g: a double backward
           or weighted (step_plan.py, exits.py)

Rows, that is (sample, position) pairs, do not see each other's candidates. So the loop runs over
tiles of rows, one after the other (tiling.py). In a sequence of groups (one row per cell of the
next frame or puzzle) the rows of a group do: E is summed over them, dE/de of a row collects what
all rows of its group contribute, and a tile holds whole groups.

    for each group of samples:      contexts: the observed stream, encoded once (contexts.py)
        for each tile of positions: the steps above, as planned (step_plan.py)

With `state.workspace` numbers z beside x are refined by the same energy, and not scored:
w = Z z enters beside e, and z_(i+1) = z_i - beta * dE/dz (model/workspace.py).

With `refinement.momentum` a step goes on with a share of the one before it (momentum.py).
With `refinement.damping` later steps are shorter, alpha / i^p of step i = 1, 2, .., beta too.
With `refinement.decay` a step starts from a share of x and z (decay.py).
With `refinement.accept: lower` a row whose energy a step does not lower stays (acceptance.py).

With `refinement.candidates` the steps after the first move the most probable tokens alone
(model/candidates.py).

With `refinement.reencode` a further step's context is the observed stream encoded again with the
predictions added, o_t + U e_t. The inner gradient does not go through it, the loss's does.

In training, gradients are computed here, step by step: each loss_i is back-propagated as soon as
it exists, unless the graph goes through all steps. The returned loss only hands the sums out
(deferred_backward.py).

Sources: EBWM, arXiv 2406.08862; EBT, arXiv 2507.02092.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ebwm_scale.config.schema import RefinementConfig
from ebwm_scale.model.candidates import CandidateState, whole_state, with_noise
from ebwm_scale.model.states import EmbeddedState, EmbeddingState, VocabularyState
from ebwm_scale.model.workspace import WorkspaceState
from ebwm_scale.refinement.acceptance import Acceptance, Before, only_rows
from ebwm_scale.refinement.contexts import ContextCache
from ebwm_scale.refinement.deferred_backward import (
    DeferredBackward,
    StepwiseBackward,
    fp32_grad_buffer,
)
from ebwm_scale.refinement.exits import exit_objective, with_exit_weights
from ebwm_scale.refinement.inner_gradient import inner_gradient
from ebwm_scale.refinement.momentum import carried_from, motion_of, plus_carried
from ebwm_scale.refinement.sampling import NoiseSampler
from ebwm_scale.refinement.spectral_penalty import SpectralPenalty
from ebwm_scale.refinement.step_plan import (
    StepPlan,
    first_graph_step,
    loss_weight,
    plan_steps,
)
from ebwm_scale.refinement.tiling import tile_rows, tiles_of

MIN_STEP_SIZE = 1e-4


@dataclass
class RefinementResult:
    """loss: scalar with graph, None without targets; everything else is detached.

    energy_per_step[i] is the mean energy before step i, loss_per_step[i] the loss after it.
    state: the final state (B, S, size), where it was asked for.
    """

    loss: Tensor | None
    loss_per_step: list[Tensor]
    energy_per_step: list[Tensor]
    state: Tensor | None


@dataclass(frozen=True)
class StepRecord:
    """One step, for inspection.

    energy (B, S); gradient dE/d embed(x) (B, S, D); state: the next one, (B, S, size).
    """

    energy: Tensor
    gradient: Tensor
    state: Tensor


def refine(
    world_model,
    observed: Tensor,
    targets: Tensor | None,
    *,
    config: RefinementConfig,
    landscapes: Sequence[int],
    noise: NoiseSampler,
    training: bool,
    keep_state: torch.dtype | None = None,
    record: Callable[[StepRecord], None] | None = None,
    first_visible: Tensor | None = None,
) -> RefinementResult:
    """Refine one candidate per position of the observed embeddings (B, S, D).

    With conditions among the embeddings, (B, T (P + A), D): per position of its groups' states.
    targets: token ids (B, S) or embeddings (B, S, size), or None (inference).
    landscapes: one landscape index per step. keep_state: return the final state, in this dtype.
    record: called after every step with the whole batch, which is then one tile.
    first_visible: (B, S) starts of the positions' documents, see Context. training False builds no
    second-order graph.

    In training, gradients are computed in here; `loss.backward()` only hands them out. They are
    exact for every combination of graph, loss and update, and can be handed out once.
    """
    network = world_model.network
    config = with_exit_weights(config, world_model.exit_logits, len(landscapes))
    num_samples = observed.shape[0]
    num_positions = observed.shape[1] // network.context_group * network.group_size
    with_backward = training and targets is not None and torch.is_grad_enabled()
    plan = plan_steps(
        config,
        landscapes,
        training=training,
        keep_last_state=keep_state is not None,
        keep_every_state=record is not None,
    )
    group_size = world_model.network.group_size
    rows = tile_rows(config, world_model.state_size, num_positions, observed.device, group_size)
    if record is not None:
        rows = num_samples * num_positions

    backward = StepwiseBackward(enabled=with_backward)
    observed = backward.detach_input(observed)
    with backward.parameters_as_leaves(world_model):
        loop = RefinementLoop(
            world_model,
            config,
            plan,
            targets,
            num_rows=num_samples * num_positions,
            with_backward=with_backward,
            record=record,
        )
        states = []
        for samples, parts in tiles_of(num_samples, num_positions, rows, group_size):
            contexts = ContextCache(
                world_model.network,
                observed[samples],
                plan,
                num_tiles=len(parts),
                with_backward=with_backward,
                by_block=config.recompute == "block",
                first_visible=None if first_visible is None else first_visible[samples],
            )
            for positions in parts:
                state = loop.refine_tile(
                    contexts, samples, positions, noise.slice(samples, positions)
                )
                if keep_state is not None:
                    assert state is not None, "the plan keeps the last state"
                    states.append(state.detach().flatten(0, 1).to(keep_state))
        loop.shared.backward()
        loss = None if targets is None else total_loss(loop.losses, config)
        if loss is not None and with_backward and world_model.exit_logits is not None:
            loss = exit_objective(world_model.exit_logits, loop.losses, config)
            loss.backward()  # within the model: its logits are a leaf here
            loss = loss.detach()

    result = RefinementResult(None, [], [], None)
    if keep_state is not None:
        result.state = torch.cat(states).view(num_samples, num_positions, -1)
    result.energy_per_step = [e / (num_samples * num_positions) for e in loop.energies]
    if loss is not None:
        result.loss_per_step = loop.losses
        result.loss = backward.as_loss(
            loss + loop.penalty, read_outside=world_model.embedding_parameters()
        )
    return result


def total_loss(losses: list[Tensor], config: RefinementConfig) -> Tensor:
    """The training loss of the steps' losses."""
    if config.loss == "last":
        return losses[-1]
    if config.loss_weights is None:
        return torch.stack(losses[first_graph_step(config, len(losses)) :]).mean()
    weights = [loss_weight(config, i, len(losses)) for i in range(len(losses))]
    total = weights[0] * losses[0]
    for weight, loss in zip(weights[1:], losses[1:]):
        total = total + weight * loss
    return total


class RefinementLoop:
    """Takes tiles through the planned steps; losses and energies add up over tiles.

    targets, num_rows: those of the whole batch. shared: the backward of what all tiles share.
    """

    def __init__(
        self,
        world_model,
        config: RefinementConfig,
        plan: Sequence[StepPlan],
        targets: Tensor | None,
        *,
        num_rows: int,
        with_backward: bool,
        record: Callable[[StepRecord], None] | None,
    ):
        self.world_model = world_model
        self.network = world_model.network
        self.config = config
        self.plan = plan
        self.with_backward = with_backward
        self.record = record
        self.shared = DeferredBackward(enabled=with_backward)
        step_size = world_model.step_size.squeeze(0).clamp(min=MIN_STEP_SIZE)
        self.step_size = self.shared.detach(step_size)
        self.state_space = detach_state_space(world_model.state_space(), self.shared)
        self.workspace = detach_workspace(world_model.workspace(), self.shared)
        self.targets = None if targets is None else self.state_space.targets(targets)
        self.num_rows = num_rows
        self.penalty: Tensor | float = 0.0  # of `refinement.spectral_penalty`, summed over tiles
        self.losses: list[Tensor] = []  # per step, summed over tiles
        self.energies: list[Tensor] = []

    def refine_tile(
        self,
        contexts: ContextCache,
        samples: slice,
        positions: slice,
        noise: NoiseSampler,
    ) -> Tensor | None:
        """The final state (b, s, size) of a tile, if it is kept."""
        targets = None if self.targets is None else self.targets.slice(samples, positions)
        step_size_factor = noise.step_size_factor()
        state: Tensor | CandidateState | None = None
        embedded: EmbeddedState | None = None
        motion: Tensor | None = None  # of the step before, with momentum
        z_motion: Tensor | None = None
        z = None if self.workspace is None else noise.initial_workspace()
        shape = (samples.stop - samples.start, positions.stop - positions.start)
        pending_backwards: list[tuple[Tensor, StepPlan]] = []
        penalty = self._spectral_penalty()
        acceptance = self._acceptance(shape)
        for step in self.plan:
            langevin = noise.langevin(step.index)
            starts_at_zero = step.index == 0 and langevin is None and noise.starts_at_zero()
            if step.index == 0 and not starts_at_zero:
                state = noise.initial_state()
            if langevin is not None:
                assert state is not None, "the plan keeps every state under Langevin noise"
                state = with_noise(state, langevin)

            with torch.set_grad_enabled(step.needs_graph):
                if starts_at_zero:
                    embedded = self.state_space.embed_zeros(shape)
                elif embedded is None:
                    assert state is not None, "a step gives a state or the next embedded one"
                    embedded = self.state_space.embed(state)
                state = None  # `embedded` has what is needed: a second reference costs memory
                w = None
                if self.workspace is not None:
                    assert z is not None, "a workspace starts somewhere"
                    w = self.workspace.embed(z)
            context = contexts.of_step(step, embedded.vectors, w)
            energy, energy_grad, workspace_grad = inner_gradient(
                self.network,
                embedded.vectors,
                context,
                positions,
                step.landscape,
                needs_graph=step.needs_graph,
                config=self.config,
                workspace=w,
            )
            scale: Tensor | float = step.scale
            taken = None
            if acceptance is not None:
                before = Before(embedded, z, energy, energy_grad, workspace_grad, motion, z_motion)
                scale = step.scale * acceptance.shrunk
                factors = (step_size_factor * scale, scale)
                taken = acceptance.decide(before, factors, context, positions, step.landscape)
                scale = only_rows(taken, scale)
            moves_have_graph = step.needs_graph if penalty is not None else step.keep_graph
            z_move = None
            if self.workspace is not None and (penalty is not None or not step.is_last):
                assert z is not None and workspace_grad is not None, "it entered the step"
                with torch.set_grad_enabled(moves_have_graph):
                    z_motion = plus_carried(
                        self.workspace.change(workspace_grad, z.dtype, scale),
                        only_rows(taken, carried_from(z_motion, self.config.momentum)),
                    )
                    next_z = self.workspace.update(z, z_motion, scale, self.config.decay)
                    z_move = next_z - z if penalty is not None else None
                z, z_motion = kept_for_next(step, next_z), kept_for_next(step, z_motion)
            with torch.set_grad_enabled(step.needs_graph or step.next_needs_graph):
                step_size = self.step_size if step.needs_graph else self.step_size.detach()
                factor = step_size_factor * scale
                alpha = step_size * factor
                if self.config.decay and not starts_at_zero:
                    embedded = embedded.decayed(1 - self.config.decay * factor)
                carried = only_rows(taken, carried_from(motion, self.config.momentum))
                state, embedded, loss = self.state_space.update(
                    embedded, energy_grad, alpha, targets, step, carried
                )
            term = None
            if penalty is not None or (self.config.momentum and not step.is_last):
                with torch.set_grad_enabled(moves_have_graph):
                    motion = motion_of(energy_grad, alpha, carried, self.state_space.dtype)
                    if penalty is not None:
                        term = penalty.of_step(step, motion, factor, z_move)
                motion = kept_for_next(step, motion)
            if step.needs_graph and self.with_backward:
                assert loss is not None, "a backward is run for targets only"
                loss_terms = loss * step.loss_weight
                if term is not None:
                    loss_terms = loss_terms + term
                    self.penalty = self.penalty + term.detach()
                pending_backwards.append((loss_terms, step))
            # With the full graph a step's loss waits for the last step's: one backward for all.
            if step.ends_graph:
                back_propagate(pending_backwards, contexts)
            self._add_up(step, energy, loss)
            if self.record is not None:
                assert state is not None, "the plan keeps every state for a record"
                whole = whole_state(state).detach().clone()
                self.record(StepRecord(energy.detach(), energy_grad.detach(), whole))
        return None if state is None else whole_state(state)

    def _acceptance(self, shape: tuple[int, int]) -> Acceptance | None:
        """For a tile of (b, s) rows; None where every step is taken."""
        if self.config.accept == "always":
            return None
        alpha = self.step_size.detach()
        return Acceptance(self.network, self.config, self.state_space, self.workspace, alpha, shape)

    def _spectral_penalty(self) -> SpectralPenalty | None:
        """For a tile; None where it has no part in the loss."""
        if not self.with_backward or self.config.spectral_penalty == 0:
            return None
        return SpectralPenalty(
            self.config,
            self.plan,
            num_groups=self.num_rows // self.network.group_size,
            group_size=self.network.group_size,
        )

    def _add_up(self, step: StepPlan, energy: Tensor, loss: Tensor | None) -> None:
        _add_at(self.energies, step.index, energy.detach().sum())
        if loss is not None:
            _add_at(self.losses, step.index, loss.detach())


def _add_at(sums: list[Tensor], index: int, value: Tensor) -> None:
    """Add to the sum at `index`; the first tile meets the steps in order and starts the sums."""
    if index == len(sums):
        sums.append(0.0 + value)
    else:
        sums[index] = sums[index] + value


def back_propagate(
    pending_backwards: list[tuple[Tensor, StepPlan]], contexts: ContextCache
) -> None:
    """Run one backward through the sum of (loss, step) pairs and empty the list."""
    if not pending_backwards:
        return
    total, _ = pending_backwards[0]
    for loss, _ in pending_backwards[1:]:
        total = total + loss
    total.backward()
    for _, step in pending_backwards:
        contexts.release(step)
    pending_backwards.clear()


def kept_for_next(step: StepPlan, tensor: Tensor) -> Tensor:
    """What the next step reads of this one's: with its graph only where the plan keeps it."""
    return tensor if step.keep_graph else tensor.detach()


def detach_workspace(
    workspace: WorkspaceState | None, shared: DeferredBackward
) -> WorkspaceState | None:
    """The workspace on a detached step size; its map is a module, so a leaf already."""
    if workspace is None:
        return None
    return replace(workspace, step_size=shared.detach(workspace.step_size))


def detach_state_space(
    state_space: VocabularyState | EmbeddingState, shared: DeferredBackward
) -> VocabularyState | EmbeddingState:
    """The state space on a detached map, whose gradient is summed over tiles and steps."""
    if not shared.enabled or isinstance(state_space, EmbeddingState):
        return state_space  # a projection is a module: its parameters are leaves already
    weight = shared.detach(state_space.weight)
    return replace(state_space, weight=weight, grad_buffer=fp32_grad_buffer(weight))
