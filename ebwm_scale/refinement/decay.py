"""Decay: a step forgets a share of where it was, so that the energy has a minimum to end at.

Along the network's energy alone a workspace and the logits of a state can move on for ever: the
energy is about linear in their lengths. With `refinement.decay` c a step is

    x <- (1 - c) x - alpha dE/d..        z <- (1 - c) z - beta dE/dz

which is the step along an energy with two more terms:

    E + c / alpha R(x) + c / beta |z|^2 / 2

With `refinement.momentum` mu the steps add up to 1 / (1 - mu) of their length, and what a step
forgets does not: there c is replaced by (1 - mu) c, and the minimum is again where steps end.

R is the states' `decay_energy` (model/states.py). alpha and beta in it are the model's: where a
step is of another size, x and z decay by as much more or less. The energies that are shown are E.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ebwm_scale.refinement.acceptance import added_by_decay
from ebwm_scale.refinement.loop import MIN_STEP_SIZE


def decay_energy(model, x: Tensor, z: Tensor | None) -> Tensor:
    """What decay adds to the energies (B, K) of states x (B, K, size) and workspaces z."""
    refinement = model.config.refinement
    alpha = model.step_size.detach().squeeze(0).clamp(min=MIN_STEP_SIZE)
    added = added_by_decay(refinement, model.state_space(), alpha, model.workspace(), x, z)
    return torch.zeros_like(x[..., 0]) + added
