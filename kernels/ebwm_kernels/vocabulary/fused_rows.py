"""The passes over states of a step, in Triton: what autograd.py calls in place of plain PyTorch.

A product writes W h in weight's dtype, float32 or not, and one kernel makes of it the state, its
softmax, its loss and what the next products read: in every update, with clamps and a z-loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ebwm_kernels.vocabulary.formulas import Clamps, state_dtype
from ebwm_kernels.vocabulary.softmax_cross_entropy import CrossEntropyRows


def softmax_and_rounded(x: Tensor, out: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(p, p in another dtype) of states x (rows, V); out: memory for p, x itself for example."""
    from ebwm_kernels.fused.vocabulary import softmax_rows

    rows = softmax_rows(
        _rows(x),
        None,
        dtype=x.dtype,
        keep_p=True if out is None else out,
        residual_dtype=None if dtype == x.dtype else dtype,
    )
    assert rows.p is not None, "it was asked for"
    return rows.p, rows.p if rows.residual is None else rows.residual


def probabilities_step(
    weight: Tensor,
    hidden: Tensor,
    probabilities: Tensor | None,
    out: Tensor | None,
    score: CrossEntropyRows | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As autograd._probabilities_step."""
    from ebwm_kernels.fused.vocabulary import softmax_rows

    dtype = state_dtype(weight)
    move = hidden.to(weight.dtype) @ weight.T
    keep_p: Tensor | bool = True if out is None else out
    if out is None and move.dtype == dtype:
        keep_p = move
    rows = softmax_rows(
        move,
        _given(probabilities),
        dtype=dtype,
        target=None if score is None else score.target,
        share=None if score is None else score.share,
        keep_p=keep_p,
        residual_dtype=None if weight.dtype == dtype else weight.dtype,
        overwrite_move=True,
    )
    assert rows.p is not None, "it was asked for"
    return rows.p, rows.loss, rows.p if rows.residual is None else rows.residual


def step(
    weight: Tensor,
    hidden: Tensor,
    probabilities: Tensor | None,
    x: Tensor | None,
    out: Tensor | None,
    clamps: Clamps,
) -> Tensor:
    """x' of formulas._step."""
    move = hidden.to(weight.dtype) @ weight.T
    start, through = (probabilities, None) if x is None else (x, probabilities)
    state, *_ = moved_state(move, start, through, clamps, None, state_dtype(weight), out=out)
    return state


def step_and_residual(
    weight: Tensor,
    hidden: Tensor,
    probabilities: Tensor | None,
    x: Tensor | None,
    out: Tensor | None,
    score: CrossEntropyRows,
    clamps: Clamps,
    *,
    needs_grad: bool,
    keep_state: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As autograd._step_and_residual."""
    from ebwm_kernels.fused.vocabulary import Form, softmax_rows

    dtype = state_dtype(weight)
    move = hidden.to(weight.dtype) @ weight.T
    memory: Tensor | bool = keep_state
    if keep_state and out is not None:
        memory = out
    rows = softmax_rows(
        move,
        _given(probabilities if x is None else x),
        dtype=dtype,
        through=None if x is None else _given(probabilities),
        form=Form(*clamps, score.z_weight),
        target=score.target,
        share=score.share,
        keep_state=memory,
        residual_dtype=weight.dtype if needs_grad else None,
        scaled=True,
        overwrite_move=True,
    )
    if rows.z_term is not None:
        score.z_term = rows.z_term
    state = move.new_empty(0, dtype=dtype) if rows.state is None else rows.state
    return state, rows.loss, rows.residual


def rounded_residual(score: CrossEntropyRows, p: Tensor, dtype: torch.dtype) -> Tensor:
    """As CrossEntropyRows.rounded_residual."""
    from ebwm_kernels.fused import vocabulary

    return vocabulary.rounded_residual(p, score.target, dtype)


def softmax_and_normalizer(
    x: Tensor, dtype: torch.dtype, *, keep_p: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(p where it is asked for, p in dtype, normalizer) of states x (rows, V)."""
    from ebwm_kernels.fused.vocabulary import softmax_rows

    in_dtype = dtype == x.dtype
    rows = softmax_rows(
        _rows(x),
        None,
        dtype=x.dtype,
        keep_p=keep_p or in_dtype,
        keep_normalizer=True,
        residual_dtype=None if in_dtype else dtype,
    )
    rounded = rows.p if in_dtype else rows.residual
    assert rounded is not None and rows.normalizer is not None, "they were asked for"
    return rows.p, rounded, rows.normalizer


def moved_state(
    move: Tensor,
    start: Tensor | None,
    through: Tensor | None,
    clamps: Clamps,
    score: CrossEntropyRows | None,
    dtype: torch.dtype,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x' in dtype, its loss, its normalizer where there is a score) of the move W h.

    through p: the move goes through the softmax. out: memory for x'.
    """
    from ebwm_kernels.fused.vocabulary import Form, softmax_rows

    rows = softmax_rows(
        move,
        _given(start),
        dtype=dtype,
        through=_given(through),
        form=Form(*clamps, 0.0 if score is None else score.z_weight),
        target=None if score is None else score.target,
        share=None if score is None else score.share,
        keep_state=True if out is None else out,
        keep_normalizer=score is not None,
    )
    if score is not None and rows.z_term is not None:
        score.z_term = rows.z_term
    assert rows.state is not None, "it was asked for"
    return rows.state, rows.loss, rows.normalizer


def step_gradient(
    move: Tensor,
    start: Tensor | None,
    through: Tensor | None,
    of_loss: Tensor | None,
    of_state: Tensor | None,
    *,
    clamps: Clamps,
    z_weight: float,
    dtype: torch.dtype,
    **given,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As fused.vocabulary.step_gradient."""
    from ebwm_kernels.fused import vocabulary

    return vocabulary.step_gradient(
        move,
        _given(start),
        dtype=dtype,
        through=_given(through),
        form=vocabulary.Form(*clamps, z_weight),
        of_loss=of_loss,
        of_state=None if of_state is None else _rows(of_state),
        **given,
    )


def pulled_back(
    of_state: Tensor,
    move: Tensor,
    start: Tensor | None,
    through: Tensor | None,
    clamps: Clamps,
) -> Tensor:
    """The gradient of the move alone, of that of x'."""
    gradients = step_gradient(
        move, start, through, None, of_state,
        clamps=clamps, z_weight=0.0, dtype=of_state.dtype, normalizer=None, target=None,
        share=None, keep_start=False, keep_p=False,
    )  # fmt: skip
    return gradients[0]


def softmax_gradient(
    x: Tensor,
    normalizer: Tensor,
    of_embedded: Tensor | None,
    of_p: Tensor | None,
    of_x: Tensor | None,
) -> Tensor:
    """As fused.vocabulary.softmax_gradient."""
    from ebwm_kernels.fused import vocabulary

    given = {"of_embedded": of_embedded, "of_p": of_p, "of_x": of_x}
    lying = {name: None if u is None else _rows(u) for name, u in given.items()}
    return vocabulary.softmax_gradient(_rows(x), normalizer, **lying)


def state_gradient(
    state: Tensor,
    normalizer: Tensor,
    target: Tensor,
    share: Tensor,
    of_loss: Tensor,
    of_state: Tensor | None,
    dtype: torch.dtype,
    *,
    z_weight: float,
    keep: bool,
) -> tuple[Tensor | None, Tensor]:
    """As fused.vocabulary.state_gradient."""
    from ebwm_kernels.fused import vocabulary

    return vocabulary.state_gradient(
        state,
        normalizer,
        target=target,
        share=share,
        of_loss=of_loss,
        of_x=None if of_state is None else _rows(of_state),
        z_weight=z_weight,
        keep=keep,
        dtype=dtype,
    )


def choose(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As fused.candidate_kernels.choose_rows."""
    from ebwm_kernels.fused import candidate_kernels

    return candidate_kernels.choose_rows(_rows(x), count)


def rest_gradient(
    x: Tensor,
    normalizer: Tensor,
    target: Tensor | None,
    of_tail: Tensor,
    of_target: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """As fused.candidate_kernels.rest_gradient."""
    from ebwm_kernels.fused import candidate_kernels

    cotangents = (_rows(of_tail), None if of_target is None else _rows(of_target))
    return candidate_kernels.rest_gradient(x, normalizer, target, *cotangents, dtype)


def _given(start: Tensor | None) -> Tensor | None:
    """What a step starts from: row by row in memory, or one number for all."""
    from ebwm_kernels.fused.vocabulary import is_one_number

    if start is None or is_one_number(start):
        return start
    return _rows(start)


def _rows(x: Tensor) -> Tensor:
    return x.contiguous()
