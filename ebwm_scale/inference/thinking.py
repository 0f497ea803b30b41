"""Thinking: refine candidates with more, smaller, noisier or fewer steps than training did.

    for each step:
        E, g  = energy(x), dE/de                       of every row that still moves
        x'    = update(x, g, alpha)                    and z' of a workspace beside it, by dE/dz
        accept only if lower:  x <- x' where E(x') < E(x); elsewhere x stays, its alpha is halved
        stop early:            a row whose energy fell by less than `tolerance` moves no more, nor
                               one whose prediction changed by less than `settled`
    of several starts per row the one with the lowest final energy is the prediction

A row is one candidate for one position: of a prompt's next position, or of every position of a
sequence (energy_functions.py). In a sequence of groups the rows of a group have one energy, so they
stop, go back and win together. With `refinement.momentum` a step goes on with a share of the one
before it, after one that was undone with nothing. With `refinement.decay` E(x) is compared with
what decay adds to it (refinement/decay.py). With `refinement.candidates` a row moves a few of its
tokens once it has taken a step (thinking_state.py). No second-order graph is built, and memory does
not depend on the number of steps. Source: EBWM, arXiv 2406.08862; EBT, arXiv 2507.02092, section on
thinking.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ebwm_scale.core.errors import ConfigError
from ebwm_scale.inference.energy_functions import EnergyFunction, of_groups
from ebwm_scale.inference.initial_states import InitialStateSampler
from ebwm_scale.inference.thinking_state import ThinkingState
from ebwm_scale.model.workspace import WorkspaceState
from ebwm_scale.refinement.acceptance import is_taken
from ebwm_scale.refinement.decay import decay_energy
from ebwm_scale.refinement.loop import MIN_STEP_SIZE
from ebwm_scale.refinement.momentum import at_rest_where, carried_from, motion_of, plus_carried
from ebwm_scale.refinement.step_plan import step_scale

Watch = Callable[[int, Tensor], None]  # of steps taken and states (B, K, size)


@dataclass(frozen=True)
class ThinkingConfig:
    """How to think.

    num_steps, step_size: default those of training. noise: deviation of the Langevin noise.
    num_starts: random initial states per row. accept_only_if_lower: undo a step that raises the
    energy, as a model does that was trained with `refinement.accept: lower`. tolerance: a row stops
    when a step lowers its energy by no more than this; None: never. settled: a row stops when a
    step changes no probability (of an embedding: no number) of its prediction by more than this;
    None: never. seed: of noise and initial states.
    """

    num_steps: int | None = None
    step_size: float | None = None
    noise: float = 0.0
    num_starts: int = 1
    accept_only_if_lower: bool = False
    tolerance: float | None = None
    settled: float | None = None
    seed: int = 33

    def __post_init__(self):
        for name, value, low in (
            ("num_steps", self.num_steps, 1),
            ("num_starts", self.num_starts, 1),
            ("noise", self.noise, 0),
            ("tolerance", self.tolerance, 0),
            ("settled", self.settled, 0),
        ):
            if value is not None and value < low:
                raise ConfigError(f"{name} is {value}: must be {low} or more")
        if self.step_size is not None and self.step_size <= 0:
            raise ConfigError(f"step_size is {self.step_size}: must be above 0")

    @property
    def compares(self) -> bool:
        """Whether energies after a step are needed."""
        return self.accept_only_if_lower or self.tolerance is not None or self.settled is not None


@dataclass
class Thought:
    """What thinking ended with.

    state (B, K, size). energy (B, K) of it in the last landscape; None where it was not asked for.
    steps (B, K) that were taken; accepted (B, K): those that changed the state.
    trace (N + 1, B, K): energy before each step and after the last; without a final energy
    (N, B, K). Each entry is measured in the landscape of its step, the last in the last one's.
    workspace (B, K, width): z where thinking ended, of a model with a workspace.
    """

    state: Tensor
    energy: Tensor | None
    steps: Tensor
    trace: Tensor
    accepted: Tensor
    workspace: Tensor | None = None


@torch.no_grad()
def think(
    model,
    energy_function: EnergyFunction,
    x: Tensor,
    config: ThinkingConfig,
    *,
    noise: InitialStateSampler,
    with_energy: bool = True,
    asked: Tensor | None = None,
    watch: Watch | None = None,
) -> Thought:
    """Refine rows x (B, K, size), which are the caller's to overwrite.

    noise: where Langevin numbers come from. with_energy False saves the pass that only measures
    where the last step ended; a config that compares energies has made it anyway. asked (B, K),
    bool: the rows whose answer matters, for config.settled; default: all. watch: called with the
    number of steps taken, 0 before the first, and the states then, to be read at once. Where all
    rows have stopped it is called no more.
    """
    if model.config.refinement.accept == "lower":
        config = replace(config, accept_only_if_lower=True)
    energy_function.restart()  # another start may have gone further with it
    if config.compares:
        return _think_comparing(model, energy_function, x, config, noise, asked, watch)
    return _think_plainly(model, energy_function, x, config, noise, with_energy, watch)


def _think_plainly(
    model,
    energy_function: EnergyFunction,
    x: Tensor,
    config: ThinkingConfig,
    noise: InitialStateSampler,
    with_energy: bool,
    watch: Watch | None,
) -> Thought:
    """Every row takes every step."""
    momentum = model.config.refinement.momentum
    landscapes = _landscapes(model, config)
    alpha = _step_size(model, config, x.device)
    state = ThinkingState(model.state_space(), x)
    scale = torch.ones(*x.shape[:2], 1, device=x.device, dtype=x.dtype)
    workspace = model.workspace()
    z = noise.initial_workspace()
    motion = z_motion = None  # of the step before, with momentum
    trace = []
    if watch is not None:
        watch(0, x)
    for i, landscape in enumerate(landscapes):
        if config.noise:
            state = state.with_noise(config.noise * noise.langevin(i))
        embedded = state.embed(overwrite=True)
        w = _mapped(workspace, z)
        energy_function.begin_step(i, landscape, embedded.vectors, w)
        energy, gradient, of_w = energy_function.with_gradient(embedded.vectors, landscape, w)
        trace.append(energy)
        damped = step_scale(model.config.refinement, i)
        step_size = (alpha * scale * damped).to(gradient.dtype)
        carried = carried_from(motion, momentum)
        state = embedded.decayed(_kept(model, alpha * damped)).update(gradient, step_size, carried)
        motion = motion_of(gradient, step_size, carried, x.dtype) if momentum else None
        z, z_motion = _moved(model, workspace, z, of_w, damped, z_motion)
        if watch is not None:
            watch(i + 1, state.x)
    steps = torch.full(x.shape[:2], len(landscapes), dtype=torch.int64, device=x.device)
    final = None
    if with_energy:
        w = _mapped(workspace, z)
        final = _energy_of(state, energy_function, landscapes[-1], w)
        trace.append(final)
    return Thought(state.x, final, steps, torch.stack(trace), steps.clone(), z)


def _think_comparing(
    model,
    energy_function: EnergyFunction,
    x: Tensor,
    config: ThinkingConfig,
    noise: InitialStateSampler,
    asked: Tensor | None,
    watch: Watch | None,
) -> Thought:
    """Rows are compared before and after each step: undone, or left alone when they are done."""
    momentum = model.config.refinement.momentum
    landscapes = _landscapes(model, config)
    alpha = _step_size(model, config, x.device)
    num_contexts, num_candidates, _ = x.shape
    shape = (num_contexts, num_candidates)
    state = ThinkingState(model.state_space(), x)
    result = state  # of all rows; what is below is that of contexts that still move
    remaining = torch.arange(num_contexts, device=x.device)
    scale = torch.ones(*shape, 1, device=x.device, dtype=x.dtype)
    active = torch.ones(shape, dtype=torch.bool, device=x.device)
    steps = torch.zeros(shape, dtype=torch.int64, device=x.device)
    accepted = torch.zeros(shape, dtype=torch.int64, device=x.device)
    function = energy_function
    encodes_again = model.config.refinement.reencode != "none"
    trace = []
    measured_in = landscapes[0]
    workspace = model.workspace()
    z = noise.initial_workspace()
    z_result = z  # of all rows, as result is
    motion = z_motion = None  # of the step before, with momentum
    energy = _energy_of(state, function, measured_in, _mapped(workspace, z))
    added = _added_by_decay(model, x, z, energy)
    if watch is not None:
        watch(0, x)
    for i, landscape in enumerate(landscapes):
        before = state
        if config.noise:
            state = state.with_noise(config.noise * noise.langevin(i)[remaining])
        embedded = state.embed()
        w = _mapped(workspace, z)
        has_another_context = function.begin_step(i, landscape, embedded.vectors, w)
        if measured_in != landscape or has_another_context:
            energy = _energy_of(before, function, landscape, w)
            measured_in = landscape
        _, gradient, of_w = function.with_gradient(embedded.vectors, landscape, w)
        damped = step_scale(model.config.refinement, i)
        step_size = (alpha * scale * damped).to(gradient.dtype)
        kept = _kept(model, alpha * scale * damped)
        carried = carried_from(motion, momentum)
        proposal = embedded.decayed(kept).update(gradient, step_size, carried)
        motion = motion_of(gradient, step_size, carried, x.dtype) if momentum else None
        z_proposal, z_motion = _moved(model, workspace, z, of_w, scale * damped, z_motion)
        if trace:
            energies = trace[-1].clone()
        else:
            energies = torch.full(shape, float("nan"), device=x.device, dtype=energy.dtype)
        energies[remaining] = energy
        trace.append(energies)

        w = _mapped(workspace, z_proposal)
        after = _energy_of(proposal, function, landscape, w)
        added_after = _added_by_decay(model, proposal.x, z_proposal, after)
        fall = (energy + added) - (after + added_after)
        taken = active.clone()
        if config.accept_only_if_lower:
            taken &= is_taken(fall)
            halved = active & ~taken
            scale = torch.where(halved[..., None], scale / 2, scale)
            motion = at_rest_where(halved, motion)
            z_motion = at_rest_where(halved, z_motion)
        steps[remaining] += active
        accepted[remaining] += taken
        state = proposal.where(taken, before)
        fallen = torch.where(taken, fall, torch.zeros_like(energy))
        energy = torch.where(taken, after, energy)
        added = torch.where(taken, added_after, added)
        if config.tolerance is not None:
            active &= fallen > config.tolerance
        if config.settled is not None:
            change = _change_of_prediction(model, before.x, proposal.x)
            if asked is not None:
                change = change.masked_fill(~asked[remaining], 0)
            active &= _largest_of_group(change, model.network.group_size) > config.settled
        result = result.put(remaining, state)
        if z is not None and z_proposal is not None and z_result is not None:
            z = torch.where(taken[..., None], z_proposal, z)
            z_result[remaining] = z
        if watch is not None:
            watch(i + 1, result.x)
        context_moves = active.any(1)
        if not context_moves.any():
            break
        # Computing only what still moves costs a copy: worth it where half of the rows rest. Not
        # under reencode: the final energies are those of all rows in their last context.
        if not encodes_again and context_moves.sum() * 2 <= len(remaining):
            kept = context_moves.nonzero().squeeze(1)
            function = function.select(kept)
            remaining = remaining[kept]
            state = state.select(kept)
            z = None if z is None else z[kept]
            motion = None if motion is None else motion[kept]
            z_motion = None if z_motion is None else z_motion[kept]
            scale = scale[kept]
            active = active[kept]
            energy = energy[kept]
            added = added[kept]
    w = _mapped(workspace, z_result)
    final = _energy_of(result, energy_function, landscapes[-1], w)
    while len(trace) < len(landscapes) + 1:
        trace.append(final)
    return Thought(result.x, final, steps, torch.stack(trace), accepted, z_result)


def at_positions(thought: Thought, positions: Tensor, group_size: int = 1) -> Thought:
    """Of a thought over whole sequences the group at one position each, (B,): rows (B, P)."""
    rows = torch.arange(len(positions), device=positions.device)[:, None]
    places = positions[:, None] + torch.arange(group_size, device=positions.device)
    return Thought(
        thought.state[rows, places],
        None if thought.energy is None else thought.energy[rows, places],
        thought.steps[rows, places],
        thought.trace[:, rows, places],
        thought.accepted[rows, places],
        None if thought.workspace is None else thought.workspace[rows, places],
    )


def together(starts: list[Thought]) -> Thought:
    """Thoughts of rows (B, P) each as one of rows (B, P times the number of thoughts)."""
    energies = [thought.energy for thought in starts if thought.energy is not None]
    workspaces = [thought.workspace for thought in starts if thought.workspace is not None]
    return Thought(
        torch.cat([thought.state for thought in starts], 1),
        torch.cat(energies, 1) if energies else None,
        torch.cat([thought.steps for thought in starts], 1),
        torch.cat([thought.trace for thought in starts], 2),
        torch.cat([thought.accepted for thought in starts], 1),
        torch.cat(workspaces, 1) if workspaces else None,
    )


def lowest(thought: Thought, group_size: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Of the K starts of each row, the one with the lowest energy.

    Returns (state (B, size), energy (B,), which start (B,)); with groups the thought is of K P rows
    and the state of all P, (B, P, size).
    """
    if thought.energy is None:
        raise ValueError("the thought was made without energies")
    energy = thought.energy[:, ::group_size]  # one of each group: they have the same
    best = energy.argmin(1)
    rows = torch.arange(len(best), device=best.device)
    if group_size == 1:
        return thought.state[rows, best], energy[rows, best], best
    states = thought.state.unflatten(1, (-1, group_size))
    return states[rows, best], energy[rows, best], best


def _change_of_prediction(model, before: Tensor, after: Tensor) -> Tensor:
    """(B, K): the largest change of a probability, or of a number of an embedding."""
    if model.config.state.kind == "vocabulary":
        before, after = before.softmax(-1), after.softmax(-1)
    return (after - before).abs().amax(-1)


def _largest_of_group(values: Tensor, group_size: int) -> Tensor:
    """Of values (B, K) the largest of each group, for all of its rows."""
    if group_size == 1:
        return values
    return values.unflatten(1, (-1, group_size)).amax(2).repeat_interleave(group_size, 1)


def _landscapes(model, config: ThinkingConfig) -> list[int]:
    return model.landscapes(config.num_steps or model.config.refinement.num_steps)


def _step_size(model, config: ThinkingConfig, device: torch.device) -> Tensor:
    if config.step_size is not None:
        return torch.tensor(config.step_size, device=device)
    return model.step_size.detach().squeeze(0).clamp(min=MIN_STEP_SIZE)


def _energy_of(
    state: ThinkingState, energy_function: EnergyFunction, landscape: int, w: Tensor | None
) -> Tensor:
    """Energies (B, K) of states, which stay as they are; w: mapped workspaces."""
    return energy_function(state.embed().vectors, landscape, w)


def _mapped(workspace: WorkspaceState | None, z: Tensor | None) -> Tensor | None:
    """w (B, K, D) of z (B, K, width), or None without a workspace."""
    if workspace is None or z is None:
        return None
    return workspace.embed(z)


def _kept(model, step_size: Tensor) -> Tensor | None:
    """The share of a state that a step of this size, a number or (B, K, 1), starts from."""
    decay = model.config.refinement.decay
    if decay == 0:
        return None
    trained = model.step_size.detach().squeeze(0).clamp(min=MIN_STEP_SIZE)
    return 1 - decay * step_size / trained


def _added_by_decay(model, x: Tensor, z: Tensor | None, energy: Tensor) -> Tensor:
    """What decay adds to the energies (B, K) of x (B, K, size); zeros without decay."""
    if model.config.refinement.decay == 0:
        return torch.zeros_like(energy)
    return of_groups(decay_energy(model, x, z), model.network.group_size)


def _moved(
    model,
    workspace: WorkspaceState | None,
    z: Tensor | None,
    energy_grad: Tensor | None,
    scale: Tensor | float,
    motion: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The next z (B, K, width) and its motion, or None without a workspace.

    scale: a factor on beta. motion: of the step before.
    """
    if workspace is None or z is None or energy_grad is None:
        return None, None
    refinement = model.config.refinement
    change = workspace.change(energy_grad, z.dtype, scale)
    motion = plus_carried(change, carried_from(motion, refinement.momentum))
    return workspace.update(z, motion, scale, refinement.decay), motion
