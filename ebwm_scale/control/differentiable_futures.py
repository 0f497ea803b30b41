"""Futures with a graph: imagined frames that are differentiable in the actions.

What futures.py imagines, with the same numbers, by the formulas of training: each frame's
refinement is part of the graph, and each imagined frame is observed by the next ones. For planners
that go down the gradient of a cost through a model's rollout. It takes the memory of all steps and
frames.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ebwm_scale.config import resolved
from ebwm_scale.control.futures import Situation
from ebwm_scale.control.joint_energy import refuse_without_joint_energy
from ebwm_scale.inference.initial_states import NextPositionSampler
from ebwm_scale.inference.thinking import ThinkingConfig
from ebwm_scale.refinement.loop import MIN_STEP_SIZE
from ebwm_scale.refinement.step_plan import INFERENCE_STEP, step_scale
from ebwm_scale.world_model import WorldModel

_STEP = dataclasses.replace(INFERENCE_STEP, needs_graph=True, keep_graph=True)


def differentiable_futures(
    model: WorldModel,
    situation: Situation,
    actions: Tensor,
    thinking: ThinkingConfig = ThinkingConfig(),
) -> Tensor:
    """States (N, H, P, dimension) under actions (N, H, width), or probabilities of ids.

    Every trained step is taken, with the trained step size. Raises UserError for a model with
    refinement.reencode or state.workspace.
    """
    refuse_without_joint_energy(model)
    frames = situation.states.expand(len(actions), *situation.states.shape)
    conditions = situation.conditions(actions)
    imagined = []
    for step in range(actions.shape[1]):
        seen = situation.num_frames + step
        own = {name: values[:, :seen] for name, values in conditions.items()}
        imagined.append(_next_frame(model, frames, own, thinking))
        frames = torch.cat([frames, imagined[-1][:, None].to(frames)], 1)
    return torch.stack(imagined, 1)


def _next_frame(
    model: WorldModel, frames: Tensor, conditions: dict[str, Tensor], thinking: ThinkingConfig
) -> Tensor:
    """(N, P, dimension) after frames (N, T, P, dimension)."""
    observed = frames.flatten(1, 2)
    size = resolved.group_size(model.config)
    last = slice(observed.shape[1] - size, observed.shape[1])
    embedded = model.embed_observed(observed, conditions)
    if model.config.model.kind == "baseline":
        return model.prediction_of(model.network(embedded, None), observed)[:, last]
    refinement = model.config.refinement
    network, space = model.energy_network, model.state_space()
    ids = torch.zeros(len(frames), dtype=torch.int64)
    noise = NextPositionSampler(model, thinking.seed, ids, ids + last.start, 1, size)
    x = noise.initial(observed[:, last])
    alpha = model.step_size.detach().squeeze(0).clamp(min=MIN_STEP_SIZE)
    contexts = {}
    for step, landscape in enumerate(model.landscapes(refinement.num_steps)):
        key = network.context_key(landscape)
        if key not in contexts:
            contexts[key] = network.encode_context(embedded, landscape).visible_to(last)
        entered = space.embed(x)
        vectors = entered.vectors
        if not vectors.requires_grad:  # of frozen parameters and frames that were seen
            vectors = vectors.requires_grad_()
        energy = network.energy(vectors, contexts[key], landscape)
        (slope,) = torch.autograd.grad(energy.sum(), [vectors], create_graph=True)
        damped = step_scale(refinement, step)
        if refinement.decay:
            entered = entered.decayed(1 - refinement.decay * damped)
        state = space.update(entered, slope, alpha * damped, None, _STEP).state
        assert isinstance(state, Tensor), "frames move as a whole"
        x = state
    return x
