"""One refinement step of a vocabulary state in each of the three updates, with clamps: see api.py
for the formulas.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Clamps(NamedTuple):
    """Bounds, above zero, on the absolute change of each number of a state in a step, and on its
    absolute value after it; None: no bound. soft: c of c tanh(x / c), which the state becomes after
    the other two: a bound with a slope everywhere.
    """

    change: float | None = None
    state: float | None = None
    soft: float | None = None


NO_CLAMPS = Clamps()


def clamped_step(x: Tensor | None, move: Tensor, clamps: Clamps) -> Tensor:
    """x + move within the clamps, differentiable; x None: zeros."""
    if clamps.change is not None:
        move = move.clamp(-clamps.change, clamps.change)
    state = move if x is None else x + move
    if clamps.state is not None:
        state = state.clamp(-clamps.state, clamps.state)
    if clamps.soft is not None:
        state = clamps.soft * (state / clamps.soft).tanh()
    return state


def state_dtype(weight: Tensor) -> torch.dtype:
    """What states, losses and sums of gradients are kept in."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _move(
    weight: Tensor,
    hidden: Tensor,
    probabilities: Tensor | None,
    x: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """x' (rows, V)."""
    start = probabilities if x is None else x
    hidden = hidden.to(weight.dtype)
    dtype = state_dtype(weight)
    if out is None:
        out = torch.empty(len(hidden), len(weight), dtype=dtype, device=weight.device)
    through_softmax = x is not None and probabilities is not None
    if weight.dtype == dtype and not through_softmax and start is not None:
        return torch.addmm(start, hidden, weight.T, out=out)
    if weight.dtype == dtype:
        move = torch.mm(hidden, weight.T, out=out)
    else:
        move = out.copy_(hidden @ weight.T)
    if x is not None and probabilities is not None:
        _through_softmax_(probabilities, move)
    return move if start is None else move.add_(start)


def _step(
    weight: Tensor,
    hidden: Tensor,
    probabilities: Tensor | None,
    x: Tensor | None,
    out: Tensor | None,
    clamps: Clamps,
) -> tuple[Tensor, Tensor | None]:
    """(x' (rows, V), its slope (rows, V) by x + move, or None for 1 everywhere).

    The slope of hard clamps alone is boolean: where none binds.
    """
    if clamps == NO_CLAMPS:
        return _move(weight, hidden, probabilities, x, out), None
    start = probabilities if x is None else x
    free = None
    move = _move(weight, hidden, None, None, out)
    if x is not None and probabilities is not None:
        _through_softmax_(probabilities, move)
    if clamps.change is not None:
        free = _within(move, clamps.change)
        move.clamp_(-clamps.change, clamps.change)
    state = move if start is None else move.add_(start)
    if clamps.state is not None:
        inside = _within(state, clamps.state)
        free = inside if free is None else free.logical_and_(inside)
        state.clamp_(-clamps.state, clamps.state)
    if clamps.soft is not None:
        state.div_(clamps.soft).tanh_()
        slope = 1 - state.square()
        free = slope if free is None else slope.mul_(free)
        state.mul_(clamps.soft)
    return state, free


def _through_softmax_(probabilities: Tensor, u: Tensor) -> Tensor:
    """The softmax's Jacobian, which is symmetric, times u (rows, V), in place: p * (u - p.u)."""
    return u.sub_(torch.linalg.vecdot(probabilities, u)[:, None]).mul_(probabilities)


def _within(x: Tensor, bound: float) -> Tensor:
    return x.ge(-bound).logical_and_(x.le(bound))
