"""Steps of a vocabulary state that carries a graph (refinement.graph full), with fused passes: the
loss of a later step has a gradient of an earlier one's state.

    embed      x -> x, p, e = p W       p = softmax(x)
    descend    h, start -> x' = start + W h, and its loss; with clamps, or through the softmax
               h, start, p -> x' = start + p * (u - p.u), u = W h

What they compute is api.py's `vocabulary_embed_reference` and `vocabulary_descend_reference` with
the cross-entropy of CrossEntropyRows; plain autograd of those reads and writes tensors of the
state's size three times as often. Kept are x, rounded p and
normalizers; a backward makes of them

    of x:    p * (g - p.g) + what else arrives,    g = (gradient of e) W^T + gradient of p
    of x':   r = (p' - onehot(y)) / n + what arrives from the next step; of h: r W

With clamps or through the softmax u is kept too, and r is pulled back to u, start and p by a kernel
that finds the slopes again (fused/vocabulary_kernels.py).

`embed` returns x under another name, and what reads that one adds its gradient in the kernel that
computes the rest. First order, as all of the vocabulary's operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ebwm_kernels.autograd_rules import refuse_graph, refuse_transforms, without_autocast
from ebwm_kernels.vocabulary import fused_rows
from ebwm_kernels.vocabulary.autograd import _accumulate_matmul
from ebwm_kernels.vocabulary.formulas import NO_CLAMPS, Clamps, state_dtype
from ebwm_kernels.vocabulary.softmax_cross_entropy import CrossEntropyRows

# What is differentiable in every mode, by operation.
PLAIN = {
    "embed_with_graph": "vocabulary.api.vocabulary_embed_reference",
    "descend_with_graph": "vocabulary.api.vocabulary_descend_reference",
}


@without_autocast
def embed_with_graph(
    x: Tensor, weight: Tensor, *, keep_p: bool, grad_buffer: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(x, p or None, e) of states x (rows, V) and weight (V, D): e (rows, D) in weight's dtype.

    keep_p: whether p is asked for, (rows, V) with a graph. grad_buffer (V, D): receives weight's
    gradient, by addition, in the backward; autograd gets none.
    """
    refuse_transforms("embed_with_graph", PLAIN["embed_with_graph"])
    x, p, embedded = _Embed.apply(x, weight, keep_p, grad_buffer)
    return x, p if keep_p else None, embedded


@without_autocast
def descend_with_graph(
    weight: Tensor,
    hidden: Tensor,
    targets: Tensor | None,
    *,
    start: Tensor | None = None,
    through: Tensor | None = None,
    clamps: Clamps = NO_CLAMPS,
    count: Tensor | float | None = None,
    grad_buffer: Tensor | None = None,
    z_weight: float = 0.0,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(x' = start + hidden @ weight.T, its loss, the z-loss's part of it without a graph).

    weight (V, D); hidden (rows, D); start (rows, V) or None; targets (rows,) int64 or None, and no
    loss then. through p (rows, V), with its own graph: the move goes through the softmax. clamps,
    count and z_weight as in `vocabulary_descend`, grad_buffer as in `embed_with_graph`.
    """
    refuse_transforms("descend_with_graph", PLAIN["descend_with_graph"])
    state, loss, z_term = _Descend.apply(
        weight, hidden, targets, start, through, clamps, count, grad_buffer, z_weight
    )
    if targets is None:
        return state, None, None
    return state, loss, z_term if z_weight else None


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, keep_p, grad_buffer):
        ctx.set_materialize_grads(False)
        p, rounded, normalizer = fused_rows.softmax_and_normalizer(x, weight.dtype, keep_p=keep_p)
        ctx.save_for_backward(x, weight, rounded, normalizer)
        ctx.grad_buffer = grad_buffer
        kept = p if p is not None else x.new_empty(0)
        return x.view_as(x), kept, rounded @ weight

    @staticmethod
    @without_autocast
    def backward(ctx, of_x, of_p, of_embedded):
        _refuse_second_derivative("embed_with_graph", of_x, of_p, of_embedded)
        x, weight, rounded, normalizer = ctx.saved_tensors
        moves = grad_weight = None
        if of_embedded is not None:
            moves = of_embedded @ weight.T
            if ctx.needs_input_grad[1]:
                grad_weight = _accumulate_matmul(ctx.grad_buffer, rounded.T, of_embedded)
        if moves is None and of_p is None:
            return of_x, grad_weight, None, None
        grad_x = fused_rows.softmax_gradient(x, normalizer, moves, of_p, of_x)
        return grad_x, grad_weight, None, None


class _Descend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, hidden, targets, start, through, clamps, count, grad_buffer, z_weight):
        ctx.set_materialize_grads(False)
        dtype = state_dtype(weight)
        score = None
        if targets is not None:
            score = CrossEntropyRows(targets, count, dtype, z_weight)
        move = hidden.to(weight.dtype) @ weight.T
        state, loss, normalizer = fused_rows.moved_state(move, start, through, clamps, score, dtype)
        z_term = state.new_zeros(()) if score is None else score.z_term
        ctx.is_sum = through is None and clamps == NO_CLAMPS
        ctx.has_targets = score is not None
        scored = (None, None) if score is None else (score.target, score.share)
        kept = (state, None, None) if ctx.is_sum else (move, start, through)
        ctx.save_for_backward(weight, hidden, normalizer, *scored, *kept)
        ctx.grad_buffer, ctx.z_weight, ctx.clamps = grad_buffer, z_weight, clamps
        ctx.mark_non_differentiable(z_term)
        return state, loss, z_term

    @staticmethod
    @without_autocast
    def backward(ctx, of_state, of_loss, _):
        _refuse_second_derivative("descend_with_graph", of_state, of_loss)
        weight, hidden, *kept = ctx.saved_tensors
        if not ctx.has_targets:
            of_loss = None  # of a loss that no step has
        if of_state is None and of_loss is None:
            return (None,) * 9
        of_move, of_start, of_p = _of_step(ctx, weight.dtype, kept, of_loss, of_state)
        grad_weight = grad_hidden = None
        if ctx.needs_input_grad[0]:
            right = hidden.to(weight.dtype)
            grad_weight = _accumulate_matmul(ctx.grad_buffer, of_move.T, right)
        if ctx.needs_input_grad[1]:
            grad_hidden = (of_move @ weight).to(hidden.dtype)
        return grad_weight, grad_hidden, None, of_start, of_p, None, None, None, None


def _of_step(
    ctx, dtype: torch.dtype, kept: list[Any], of_loss: Tensor | None, of_state: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of the move W h, in dtype, of start and of p. kept: as _Descend keeps it."""
    normalizer, target, share, *step = kept
    needs_start, needs_p = ctx.needs_input_grad[3:5]
    if not ctx.is_sum:
        move, start, through = step
        return fused_rows.step_gradient(
            move, start, through, of_loss, of_state,
            clamps=ctx.clamps, z_weight=ctx.z_weight, dtype=state_dtype(move),
            normalizer=normalizer, target=target, share=share,
            keep_start=needs_start, keep_p=needs_p,
        )  # fmt: skip
    if of_loss is None:
        assert of_state is not None, "something has a gradient"
        return of_state.to(dtype), of_state if needs_start else None, None
    state, *_ = step
    of_start, of_move = fused_rows.state_gradient(
        state, normalizer, target, share, of_loss, of_state, dtype,
        z_weight=ctx.z_weight, keep=needs_start,
    )  # fmt: skip
    return of_move, of_start if needs_start else None, None


def _refuse_second_derivative(operation: str, *gradients: Tensor | None) -> None:
    refuse_graph(operation, PLAIN[operation])
    refuse_transforms(operation, PLAIN[operation], *gradients)
