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
With `refinement.damping` later steps are shorter, alpha / i^p of step i = 1, 2, .., beta too;
with `damping_after` those beyond the first k, alpha (k / i)^p.
With `refinement.decay` a step starts from a share of x and z (decay.py).
With `refinement.level_weight` the loss also asks that E(x_i) is the loss of x_i (energy_level.py).
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

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ebwm_scale.config.schema import RefinementConfig
from ebwm_scale.model.context import Context
from ebwm_scale.model.states import EmbeddingState, Targets, VocabularyState
from ebwm_scale.model.workspace import WorkspaceState
from ebwm_scale.refinement.acceptance import Acceptance
from ebwm_scale.refinement.contexts import ContextCache
from ebwm_scale.refinement.deferred_backward import (
    DeferredBackward,
    StepwiseBackward,
    fp32_grad_buffer,
)
from ebwm_scale.refinement.energy_level import EnergyLevel
from ebwm_scale.refinement.exits import exit_objective, with_exit_weights
from ebwm_scale.refinement.graphed import Computed, GivenTensors, RefinementResult
from ebwm_scale.refinement.inner_gradient import energy_of, inner_gradient
from ebwm_scale.refinement.moving import MovingState, MovingWorkspace, StepFactors
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
    num_scored: Tensor | None = None,
) -> RefinementResult:
    """Refine one candidate per position of the observed embeddings (B, S, D).

    With conditions among the embeddings, (B, T (P + A), D): per position of its groups' states.
    targets: token ids (B, S) or embeddings (B, S, size), or None (inference).
    landscapes: one landscape index per step. keep_state: return the final state, in this dtype.
    record: called after every step with the whole batch, which is then one tile.
    first_visible: (B, S) starts of the positions' documents, see Context. training False builds no
    second-order graph. num_scored: see Targets; default: the targets here that count.

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

    compute = functools.partial(
        _compute,
        world_model,
        config=config,
        plan=plan,
        tile_rows=rows,
        with_backward=with_backward,
        keep_state=keep_state,
        record=record,
    )
    given = GivenTensors(observed, targets, first_visible, num_scored)
    graphs = world_model.graphs
    if with_backward and record is None and graphs.may_serve(world_model, config, given, rows):
        return graphs.run(compute, given, noise, world_model, plan, keep_state)
    computed = compute(given, noise)
    result = computed.result
    if result.loss is not None and computed.gradients is not None:
        result.loss = computed.gradients.as_loss(result.loss)
    return result


def _compute(
    world_model,
    given: GivenTensors,
    noise: NoiseSampler,
    *,
    config: RefinementConfig,
    plan: Sequence[StepPlan],
    tile_rows: int,
    with_backward: bool,
    keep_state: torch.dtype | None,
    record: Callable[[StepRecord], None] | None,
) -> Computed:
    """All of a refinement but handing its gradients out: what a CUDA graph may hold (graphed.py).

    It reads no number back from its device, and random numbers come from `noise` alone.
    """
    group_size = world_model.network.group_size
    num_samples = given.observed.shape[0]
    num_positions = given.observed.shape[1] // world_model.network.context_group * group_size
    targets, first_visible = given.targets, given.first_visible
    backward = StepwiseBackward(enabled=with_backward)
    observed = backward.detach_input(given.observed)
    with backward.parameters_as_leaves(world_model):
        loop = RefinementLoop(
            world_model,
            config,
            plan,
            targets,
            num_rows=num_samples * num_positions,
            with_backward=with_backward,
            record=record,
            num_scored=given.num_scored,
        )
        states = []
        for samples, parts in tiles_of(num_samples, num_positions, tile_rows, group_size):
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
    gradients = None
    if loss is not None:
        result.loss_per_step = loop.losses
        result.loss = loss + loop.penalty
    if loss is not None and with_backward:
        gradients = backward.collect(read_outside=world_model.embedding_parameters())
    return Computed(result, gradients)


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
        num_scored: Tensor | None = None,
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
        if with_backward and isinstance(self.state_space, VocabularyState):
            z_weight = world_model.config.train.z_loss
            self.state_space = replace(self.state_space, z_weight=z_weight)
        self.workspace = detach_workspace(world_model.workspace(), self.shared)
        self.targets = None if targets is None else self.state_space.targets(targets)
        if self.targets is not None and num_scored is not None:
            self.targets = self.targets._replace(count=num_scored)
        self.num_rows = num_rows
        # Of `refinement.spectral_penalty`, `level_weight` and `train.z_loss`, summed over tiles.
        self.penalty: Tensor | float = 0.0
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
        shape = (samples.stop - samples.start, positions.stop - positions.start)
        penalty = self._spectral_penalty()
        level = self._energy_level(targets)
        keeps_moves = penalty is not None
        x = MovingState(
            self.state_space, self.step_size, self.config, noise, shape, keeps_moves=keeps_moves
        )
        z = MovingWorkspace(
            self.workspace,
            self.config,
            noise,
            keeps_moves=keeps_moves,
            keeps_end=level is not None,
        )
        acceptance = None
        if self.config.accept == "lower":
            acceptance = Acceptance(self.network, self.config, x, z)
        random_factor = noise.step_size_factor()
        pending_backwards: list[tuple[Tensor, StepPlan]] = []
        for step in self.plan:
            costs = x.embed(step, level)
            w = z.embed(step)
            context = contexts.of_step(step, x.vectors, w)
            energy, energy_grad, workspace_grad = inner_gradient(
                self.network,
                x.vectors,
                context,
                positions,
                step.landscape,
                needs_graph=step.needs_graph,
                config=self.config,
                workspace=w,
            )
            factors = StepFactors(random_factor * step.scale, step.scale)
            if acceptance is not None:
                slopes = (energy_grad, workspace_grad)
                factors = acceptance.narrowed(
                    factors, energy, *slopes, context, positions, step.landscape
                )
            z_move = z.move(workspace_grad, factors, step)
            loss, z_term, x_move = x.move(energy_grad, factors, targets, step)
            terms = []
            if penalty is not None and x_move is not None:
                terms.append(penalty.of_step(step, x_move, factors.of_alpha, z_move))
            if level is not None and costs is not None:
                terms.append(level.of_state(energy, costs))
            if level is not None and level.at_end(step):
                terms.append(self._level_of_end(level, x, z, context, positions, step))
            if step.needs_graph and self.with_backward:
                assert loss is not None, "a backward is run for targets only"
                pending_backwards.append((self._objective(loss * step.loss_weight, terms), step))
            # With the full graph a step's loss waits for the last step's: one backward for all.
            if step.ends_graph:
                back_propagate(pending_backwards, contexts)
            self._add_up(step, energy, loss, z_term)
            if self.record is not None:
                state = x.whole()
                assert state is not None, "the plan keeps every state for a record"
                self.record(
                    StepRecord(energy.detach(), energy_grad.detach(), state.detach().clone())
                )
        return x.whole()

    def _objective(self, loss: Tensor, terms: list[Tensor | None]) -> Tensor:
        """What is back-propagated of a step: its weighted loss, and what else it adds."""
        for term in terms:
            if term is not None:
                self.penalty = self.penalty + term.detach()
                loss = loss + term
        return loss

    def _level_of_end(
        self,
        level: EnergyLevel,
        x: MovingState,
        z: MovingWorkspace,
        context: Context,
        positions: slice,
        step: StepPlan,
    ) -> Tensor:
        """The level's term of where the last step ended, which no step measures."""
        costs = x.embed_end(step, level)
        energy = energy_of(
            self.network,
            x.vectors,
            context,
            positions,
            step.landscape,
            config=self.config,
            workspace=z.embed(step),
            needs_graph=True,
        )
        return level.of_state(energy, costs)

    def _energy_level(self, targets: Targets | None) -> EnergyLevel | None:
        """For a tile; None where it has no part in the loss."""
        if not self.with_backward or targets is None or self.config.level_weight == 0:
            return None
        return EnergyLevel(
            self.config,
            self.plan,
            self.state_space,
            targets,
            group_size=self.network.group_size,
        )

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

    def _add_up(
        self, step: StepPlan, energy: Tensor, loss: Tensor | None, z_term: Tensor | None
    ) -> None:
        _add_at(self.energies, step.index, energy.detach().sum())
        if loss is None:
            return
        loss = loss.detach()
        if z_term is not None:
            loss = loss - z_term
            self.penalty = self.penalty + step.loss_weight * z_term
        _add_at(self.losses, step.index, loss)


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
