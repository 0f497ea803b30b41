"""A vocabulary's passes over states (rows, V) by the kernels of vocabulary_kernels.py.

What PyTorch does in ten readings and writings (a copy in float32, a sum, the maximum, a gather, the
softmax, its maximum, a rounding, two scatters, a scaling; more with clamps and through the softmax)
is one kernel that reads its operands twice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ebwm_kernels.fused import launches
from ebwm_kernels.fused.launches import Tile
from ebwm_kernels.fused.vocabulary_kernels import (
    _round_rows,
    _softmax_gradient,
    _softmax_rows,
    _state_gradient,
    _step_gradient,
)

TILE = Tile(1, 2048, 8)
THROUGH_TILE = Tile(1, 1024, 8)  # through the softmax, sums of more kinds take registers


class Rows(NamedTuple):
    """state x', p, residual (rows, V) as far as asked for, and normalizer (rows, 2):
    max(x') and the sum of exp(x' - max).

    loss: a scalar, 0 without targets. z_term: the z-loss's part of it, None without one.
    """

    state: Tensor | None
    p: Tensor | None
    residual: Tensor | None
    loss: Tensor
    z_term: Tensor | None = None
    normalizer: Tensor | None = None


class Form(NamedTuple):
    """Of a step: bounds as those of formulas.Clamps, and the z-loss's weight; constants of a run,
    and so of its program.
    """

    change: float | None = None
    state: float | None = None
    soft: float | None = None
    z_weight: float = 0.0


PLAIN_SUM = Form()


def softmax_rows(
    move: Tensor,
    start: Tensor | None,
    *,
    dtype: torch.dtype,
    through: Tensor | None = None,
    form: Form = PLAIN_SUM,
    target: Tensor | None = None,
    share: Tensor | None = None,
    keep_state: Tensor | bool = False,
    keep_p: Tensor | bool = False,
    keep_normalizer: bool = False,
    residual_dtype: torch.dtype | None = None,
    scaled: bool = False,
    overwrite_move: bool = False,
) -> Rows:
    """The step's pass over rows: move and start (rows, V), target (rows,) int64, share (rows,).

    Of a start that is one number, seen by all rows and columns, nothing else is read. through p
    (rows, V): the move goes through the softmax, p * (move - p.move).

    dtype: of states, p and the loss. keep_..: memory for it, which may be that of start for p, or
    whether to make some. residual_dtype: of the residual, None where it is not asked for; with
    overwrite_move it takes move's memory where that has its dtype. scaled: the residual is the
    gradient of the loss by the move.
    """
    num_rows, size = move.shape
    state = _memory(keep_state, move, dtype)
    p = _memory(keep_p, move, dtype)
    residual = None
    if residual_dtype == move.dtype and overwrite_move:
        residual = move
    elif residual_dtype is not None:
        residual = torch.empty(num_rows, size, dtype=residual_dtype, device=move.device)

    def per_row(wanted: bool) -> Tensor | None:
        return torch.empty(num_rows, dtype=dtype, device=move.device) if wanted else None

    losses = per_row(target is not None)
    z_terms = per_row(target is not None and form.z_weight > 0)
    normalizer = None
    if keep_normalizer:
        normalizer = torch.empty(num_rows, 2, dtype=dtype, device=move.device)
    again = ("MOVE", "START", "GIVEN_P") if p is not None or residual is not None else ()
    if through is not None:
        again += ("MOVE", "GIVEN_P")
    launches.launch(
        _softmax_rows,
        num_rows,
        {"MOVE": move, "START": start, "GIVEN_P": through, "TARGET": target, "SHARE": share},
        {
            "STATE": state,
            "P": p,
            "RESIDUAL": residual,
            "LOSS": losses,
            "Z_TERM": z_terms,
            "NORMALIZER": normalizer,
        },
        tile=TILE if through is None else THROUGH_TILE,
        again=again,
        V=size,
        **_constants_of(start, through, form),
        HAS_TARGET=target is not None,
        KEEP_STATE=state is not None,
        KEEP_P=p is not None,
        KEEP_RESIDUAL=residual is not None,
        KEEP_NORMALIZER=keep_normalizer,
        SCALED=scaled,
        ACC=sums_of(dtype),
    )
    loss = move.new_zeros((), dtype=dtype) if losses is None else losses.sum()
    z_term = None if z_terms is None else z_terms.sum()
    return Rows(state, p, residual, loss, z_term, normalizer)


def rounded_residual(p: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """p - onehot(target) (rows, V), rounded to a half precision after the subtraction."""
    num_rows, size = p.shape
    residual = torch.empty_like(p, dtype=dtype)
    column_tiles = launches.num_tiles(size, TILE.columns)
    launches.launch(
        _round_rows,
        num_rows * column_tiles,
        {"P": p, "TARGET": target},
        {"RESIDUAL": residual},
        tile=TILE,
        V=size,
        COLUMN_TILES=column_tiles,
    )
    return residual


def softmax_gradient(
    x: Tensor,
    normalizer: Tensor,
    *,
    of_embedded: Tensor | None,
    of_p: Tensor | None,
    of_x: Tensor | None,
) -> Tensor:
    """The gradient of states x (rows, V), normalizer (rows, 2) as in Rows.

    of_embedded, of_p: of softmax(x), which are added; of_x: what else arrives at x. All (rows, V).
    """
    dx = torch.empty_like(x)
    num_rows, size = x.shape
    reads = {"X": x, "NORMALIZER": normalizer}
    reads |= {"OF_EMBEDDED": of_embedded, "OF_P": of_p, "OF_X": of_x}
    launches.launch(
        _softmax_gradient,
        num_rows,
        reads,
        {"DX": dx},
        tile=TILE,
        again=("X", "OF_EMBEDDED", "OF_P"),
        V=size,
        HAS_EMBEDDED=of_embedded is not None,
        HAS_P=of_p is not None,
        HAS_X=of_x is not None,
        ACC=sums_of(x.dtype),
    )
    return dx


def state_gradient(
    x: Tensor,
    normalizer: Tensor,
    *,
    target: Tensor,
    share: Tensor,
    of_loss: Tensor,
    of_x: Tensor | None,
    z_weight: float,
    keep: bool,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor]:
    """(the gradient of states x (rows, V), the same rounded to dtype); the first where `keep`.

    normalizer (rows, 2): as in Rows; target (rows,) int64, share (rows,): of the cross-entropy;
    of_loss (): the loss's gradient; of_x (rows, V): what else arrives at x.
    """
    num_rows, size = x.shape
    in_dtype = dtype == x.dtype
    dx = torch.empty_like(x) if keep or in_dtype else None
    rounded = None if in_dtype else torch.empty_like(x, dtype=dtype)
    column_tiles = launches.num_tiles(size, TILE.columns)
    reads = {"X": x, "NORMALIZER": normalizer, "TARGET": target, "SHARE": share}
    launches.launch(
        _state_gradient,
        num_rows * column_tiles,
        reads | {"OF_LOSS": of_loss, "OF_X": of_x},
        {"DX": dx, "ROUNDED": rounded},
        tile=TILE,
        V=size,
        COLUMN_TILES=column_tiles,
        Z_WEIGHT=z_weight,
        HAS_X=of_x is not None,
        KEEP_DX=dx is not None,
        KEEP_ROUNDED=rounded is not None,
        ACC=sums_of(x.dtype),
    )
    if rounded is None:
        assert dx is not None, "it was asked for"
        rounded = dx
    return dx, rounded


class StepGradients(NamedTuple):
    """Of a step's move, in its dtype, and where they are asked for of its start and of p, all
    (rows, V).
    """

    of_move: Tensor
    of_start: Tensor | None
    of_p: Tensor | None


def step_gradient(
    move: Tensor,
    start: Tensor | None,
    *,
    dtype: torch.dtype,
    through: Tensor | None,
    form: Form,
    normalizer: Tensor | None,
    target: Tensor | None,
    share: Tensor | None,
    of_loss: Tensor | None,
    of_state: Tensor | None,
    keep_start: bool,
    keep_p: bool,
) -> StepGradients:
    """The gradients of a step with clamps or through the softmax; arguments as in softmax_rows.

    normalizer (rows, 2), target, share: of its loss, with of_loss () its gradient; None without
    one. of_state (rows, V): what else arrives at x', or None. keep_..: whether it is asked for.
    """
    num_rows, size = move.shape
    of_move = torch.empty_like(move)
    of_start, of_p = (
        torch.empty(num_rows, size, dtype=dtype, device=move.device) if keep else None
        for keep in (keep_start, keep_p)
    )
    read = {"MOVE": move, "START": start, "GIVEN_P": through}
    read |= {"NORMALIZER": normalizer, "TARGET": target, "SHARE": share}
    read |= {"OF_LOSS": of_loss, "OF_STATE": of_state}
    again = ()
    if through is not None:
        again = ("MOVE", "GIVEN_P", "MOVE", "GIVEN_P", "START", "OF_STATE")
    launches.launch(
        _step_gradient,
        num_rows,
        read,
        {"OF_MOVE": of_move, "OF_START": of_start, "OF_P": of_p},
        tile=TILE if through is None else THROUGH_TILE,
        again=again,
        V=size,
        **_constants_of(start, through, form),
        HAS_LOSS=of_loss is not None,
        HAS_STATE=of_state is not None,
        KEEP_START=keep_start,
        KEEP_P=keep_p,
        ACC=sums_of(dtype),
    )
    return StepGradients(of_move, of_start, of_p)


def _constants_of(start: Tensor | None, through: Tensor | None, form: Form) -> dict:
    """What a step is, as constants of its programs."""
    return {
        "HAS_START": start is not None,
        "ONE_NUMBER": start is not None and is_one_number(start),
        "THROUGH": through is not None,
        "ONE_P": through is not None and is_one_number(through),
        "CHANGE": form.change or 0.0,
        "BOUND": form.state or 0.0,
        "SOFT": form.soft or 0.0,
        "Z_WEIGHT": form.z_weight,
    }


def is_one_number(x: Tensor) -> bool:
    """Whether a tensor is one number that all its places show."""
    return not any(x.stride())


def sums_of(dtype: torch.dtype):
    """What a kernel adds in, of states in dtype."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def _memory(keep: Tensor | bool, like: Tensor, dtype: torch.dtype) -> Tensor | None:
    if isinstance(keep, Tensor):
        return keep.view(like.shape)
    return torch.empty(like.shape, dtype=dtype, device=like.device) if keep else None
