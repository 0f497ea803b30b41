"""Momentum: a step goes on with a share mu of the one before it (`refinement.momentum`).

    m_i = mu m_(i-1) - alpha dE/de        (B, S, D): what moves a state, in front of its map
    v_i = mu v_(i-1) - beta dE/dz         (B, S, width): what moves a workspace

The first step starts at rest, m_0 = v_0 = 0, also from a state that replay restarts. Mirror steps,
probabilities and frames move by W m_i. Their map W is linear, so that is the momentum of the state
itself, of as many numbers as a row has in the network and not V. `logits` move through the softmax
as it is now: by P W m_i, of the softmax's derivatives P at x_i.

Where thinking undoes a step, the next one starts at rest.
"""

from __future__ import annotations

import torch
from torch import Tensor


def carried_from(motion: Tensor | None, momentum: float) -> Tensor | None:
    """What a step goes on with, of the motion of the one before it; None at rest."""
    if motion is None or momentum == 0:
        return None
    return momentum * motion


def motion_of(
    energy_grad: Tensor, alpha: Tensor, carried: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """m_i (B, S, D), in the states' dtype; energy_grad (B, S, D): dE/de."""
    return plus_carried(-alpha * energy_grad.to(dtype), carried)


def plus_carried(change: Tensor, carried: Tensor | None) -> Tensor:
    """A step's change with what it goes on with."""
    return change if carried is None else change + carried


def at_rest_where(undone: Tensor, motion: Tensor | None) -> Tensor | None:
    """A motion (B, K, ..) that starts again in rows (B, K) whose step was undone."""
    if motion is None:
        return None
    return motion.masked_fill(undone[..., None], 0)
