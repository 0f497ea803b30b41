"""The energy of imagined states and actions together: one scalar, differentiable in all of them.

    U(x, a) = sum over h of  u(o_1 .. o_c x_1 .. x_(h-1), a_h; x_h)       h = 1 .. H

    energy model     u = alpha * E: the last landscape's energy of frame h given what is before it,
                     times the trained step size. A refinement step moves a frame along -du/dx.
    Transformer++    u = |x_h - prediction|^2 / 2, so that a step along -du/dx ends at it

So both are in squared units of a state, and one solver plans with either. All H frames are scored
in one pass: they stand in the observed stream, and each is a candidate behind those before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ebwm_scale.config import resolved
from ebwm_scale.control.futures import Situation
from ebwm_scale.core.errors import UserError
from ebwm_scale.refinement.loop import MIN_STEP_SIZE
from ebwm_scale.world_model import WorldModel


def refuse_without_joint_energy(model: WorldModel) -> None:
    """UserError for a model whose energy of given frames is not one pass over them."""
    config = model.config
    if config.model.kind != "energy":
        return
    for key, is_used in (
        ("refinement.reencode", config.refinement.reencode != "none"),
        ("state.workspace", config.state.workspace is not None),
    ):
        if is_used:
            raise UserError(
                f"the solver gradient: this model was trained with {key}, so that a frame's energy "
                "depends on more than frames and actions; take cem, icem, mppi or random"
            )


def transition_energies(
    model: WorldModel, situation: Situation, states: Tensor, actions: Tensor
) -> Tensor:
    """u (N, H) of N futures: states (N, H, P, dimension) under actions.

    actions: (N, H, width) numbers or ids, or probabilities (N, H, width, values). Differentiable in
    states and, where they are no ids, in actions.
    """
    seen = situation.states.to(states)
    frames = torch.cat([seen.expand(len(states), *seen.shape), states], 1)
    observed = frames[:, :-1].flatten(1, 2)
    size = resolved.group_size(model.config)
    last = slice((situation.num_frames - 1) * size, observed.shape[1])
    embedded = model.embed_observed(observed, situation.conditions(actions))
    if model.config.model.kind == "baseline":
        predicted = model.prediction_of(model.network(embedded, None), observed)[:, last]
        distances = (states.flatten(1, 2) - predicted).square().sum(-1) / 2
        return distances.unflatten(1, (-1, size)).sum(-1)
    network = model.energy_network
    landscape = network.num_landscapes - 1
    context = network.encode_context(embedded, landscape).visible_to(last)
    candidates = model.state_space().embed(states.flatten(1, 2)).vectors
    energy = network.energy(candidates, context, landscape)
    alpha = model.step_size.detach().squeeze(0).clamp(min=MIN_STEP_SIZE).to(energy.dtype)
    return alpha * energy.unflatten(1, (-1, size)).sum(-1)


def joint_gradients(
    model: WorldModel,
    situation: Situation,
    states: Tensor,
    actions: Tensor,
    pull,
    goal_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(J (N,), dJ/d states, dJ/d actions) of J = U + goal_weight * pull(states, actions).

    Futures are independent, so that the gradient of the sum is that of each.
    """
    with torch.enable_grad():
        x = states.detach().requires_grad_()
        a = actions.detach().requires_grad_()
        total = transition_energies(model, situation, x, a).sum(1) + goal_weight * pull(x, a)
        of_states, of_actions = torch.autograd.grad(total.sum(), [x, a])
    return total.detach(), of_states, of_actions
