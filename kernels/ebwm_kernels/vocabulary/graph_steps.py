"""Steps of a vocabulary state that carries a graph (refinement.graph full), with fused passes: the
loss of a later step has a gradient of an earlier one's state.

    embed      x -> x, p, e = p W       p = softmax(x)
    descend    h, start -> x' = start + W h, and its loss

What they compute is api.py's `vocabulary_embed_reference` and `vocabulary_descend_reference` with
the cross-entropy of CrossEntropyRows; plain autograd of those reads and writes tensors of the
state's size three times as often. Kept are x, rounded p and
normalizers; a backward makes of them

    of x:    p * (g - p.g) + what else arrives,    g = (gradient of e) W^T + gradient of p
    of x':   r = (p' - onehot(y)) / n + what arrives from the next step; of h: r W

`embed` returns x under another name, and what reads that one adds its gradient in the kernel that
computes the rest. First order, as all of the vocabulary's operations. Without clamps, and where x'
is a sum: other steps are plain autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ebwm_kernels.autograd_rules import refuse_graph, refuse_transforms, without_autocast
from ebwm_kernels.vocabulary import fused_rows
from ebwm_kernels.vocabulary.autograd import _accumulate_matmul
from ebwm_kernels.vocabulary.formulas import NO_CLAMPS, state_dtype
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
    count: Tensor | float | None = None,
    grad_buffer: Tensor | None = None,
    z_weight: float = 0.0,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(x' = start + hidden @ weight.T, its loss, the z-loss's part of it without a graph).

    weight (V, D); hidden (rows, D); start (rows, V) or None; targets (rows,) int64 or None, and no
    loss then; count and z_weight as in `vocabulary_descend`, grad_buffer as in `embed_with_graph`.
    """
    refuse_transforms("descend_with_graph", PLAIN["descend_with_graph"])
    state, loss, z_term = _Descend.apply(
        weight, hidden, targets, start, count, grad_buffer, z_weight
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
    def forward(ctx, weight, hidden, targets, start, count, grad_buffer, z_weight):
        ctx.set_materialize_grads(False)
        score = None
        if targets is None:
            normalizer = None
            state = fused_rows.step(weight, hidden, None, start, None, NO_CLAMPS)
            loss = z_term = state.new_zeros(())
        else:
            score = CrossEntropyRows(targets, count, state_dtype(weight), z_weight)
            state, loss, normalizer = fused_rows.scored_state(weight, hidden, start, score)
            z_term = score.z_term
        kept = (None, None) if score is None else (score.target, score.share)
        ctx.save_for_backward(weight, hidden, state, normalizer, *kept)
        ctx.grad_buffer, ctx.z_weight = grad_buffer, z_weight
        ctx.mark_non_differentiable(z_term)
        return state, loss, z_term

    @staticmethod
    @without_autocast
    def backward(ctx, of_state, of_loss, _):
        _refuse_second_derivative("descend_with_graph", of_state, of_loss)
        weight, hidden, state, normalizer, target, share = ctx.saved_tensors
        needs_start = ctx.needs_input_grad[3]
        if of_state is None and of_loss is None:
            return (None,) * 7
        if of_loss is None or target is None:
            if of_state is None:  # of a loss that no step has
                return (None,) * 7
            grad, rounded = of_state, of_state.to(weight.dtype)
        else:
            grad, rounded = fused_rows.state_gradient(
                state, normalizer, target, share, of_loss, of_state, weight.dtype,
                z_weight=ctx.z_weight, keep=needs_start,
            )  # fmt: skip
        grad_weight = grad_hidden = None
        if ctx.needs_input_grad[0]:
            right = hidden.to(weight.dtype)
            grad_weight = _accumulate_matmul(ctx.grad_buffer, rounded.T, right)
        if ctx.needs_input_grad[1]:
            grad_hidden = (rounded @ weight).to(hidden.dtype)
        return grad_weight, grad_hidden, None, grad if needs_start else None, None, None, None


def _refuse_second_derivative(operation: str, *gradients: Tensor | None) -> None:
    refuse_graph(operation, PLAIN[operation])
    refuse_transforms(operation, PLAIN[operation], *gradients)
