"""The attention of this package in plain PyTorch, level by level: the definition of what the Triton
kernels compute, and the CPU backend.

Every level keeps row statistics and recomputes the weights, so that no S x C tensor outlives a
block of query rows:
    forward           O, L = logsumexp of a row's scores
    gradient          dQ, dk*, dv*, dK, dV of a cotangent G on O
    double_backward   the gradients of <A, dQ> + <B, dK> + <C, dV> + <b*, dk*> + <c*, dv*>
                      with respect to G, Q, K, V, k*, v*
    tangent           of O, for tangents of Q, K, V, k*, v*: forward mode

With s the scale, P = exp(S - L), D = rowsum(G O), dP = G V', dS = P (dP - D), and * for a query's
own key, one more column of its row, where there is one (all products without a sign are
elementwise):
    dQ = s (dS K + ds* k*)      dK = s dS' Q      dV = P' G      dk* = s ds* q      dv* = p* G
    Sdot = s (A K' + Q B')      sd* = s (A.k* + q.b*)            mu = rowsum(P Sdot) + p* sd*
    gG   = (P Sdot) V + P C + p* (sd* v* + c*) - mu O            phi = rowsum(G gG)
    Z    = P ((Sdot - mu) (dP - D) + G C' - phi)
    z*   = p* ((sd* - mu) (dp* - D) + G.c* - phi)
    gQ   = s (Z K + dS B + z* k* + ds* b*)
    gK   = s (Z' Q + dS' A)                                      gV  = (P (Sdot - mu))' G
    gk*  = s (z* q + ds* A)                                      gv* = p* (sd* - mu) G

With groups the own keys are group_size more columns, and * stands for each: a row sums over them,
and a key over the rows of its group. There the formulas without * hold for all columns alike
(attention/row_blocks.py). What a row does not see has P = 0. A row that sees nothing has O = 0,
L = -inf, and no gradients.

Tensors come as (B, H, S, d) and (B, H_kv, C, d) in any layout (attention/tensors.py). Inside they
are (B, H_kv, group, S, d), where they lie, and (N, C, d) with N = B H_kv, of which products need
one batch dimension: heads that share keys are rows of one product. What is S x C is touched as few
times as possible and in place; scales go to what is S x d. Half precisions are computed in float32.
What a row does not see never reaches it, be it infinite (attention/isolation.py).
The second order is in attention/second_reference.py.
Source: derived for this project by differentiating the softmax twice; the test is plain autograd in
float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ebwm_kernels.attention.isolation import hidden_stays_hidden
from ebwm_kernels.attention.reference_columns import (
    by_key_head,
    columns,
    dot,
    one_per_row,
    rounded,
    statistics_by_key_head,
    wide_gradient,
    zeroed,
)
from ebwm_kernels.attention.row_blocks import Columns, blocks
from ebwm_kernels.attention.second_reference import double_backward, tangent
from ebwm_kernels.attention.tensors import Gradients, Inputs, Output, empty_output
from ebwm_kernels.attention.visibility import Shape

__all__ = ["double_backward", "forward", "gradient", "tangent"]


@hidden_stays_hidden
def forward(inputs: Inputs, shape: Shape, *, block_size: int | None = None) -> Output:
    """O (B, H, S, d_v), lying positions first, and L (B, H, S) in the precision of statistics."""
    q, k, v, k_self, v_self, first_visible = inputs
    q5 = by_key_head(q, k)
    keys = columns(k, k_self, shape, k)
    values = columns(v, v_self, shape, k)
    ks = one_per_row(k_self, k, shape)
    vs = one_per_row(v_self, k, shape)
    out = empty_output(q, v.shape[-1], q5.dtype)
    log_normalizer = q5.new_empty(*q.shape[:-1], 1)
    out5 = by_key_head(out, k)
    log_normalizer5 = by_key_head(log_normalizer, k)
    own = None
    if ks is not None:
        own = dot(q5, ks).mul_(shape.scale)
    for block in blocks(q.shape[2], k.shape[2], first_visible, shape, block_size):
        weights = block.scores(block.rows(q5), keys)
        if own is None or vs is None:
            row_max = weights.amax(-1, keepdim=True)
            if first_visible is not None:
                row_max.masked_fill_(row_max.isneginf(), 0)  # -inf - -inf is no number
            weights = weights.sub_(row_max).exp_()
            total = weights.sum(-1, keepdim=True)
            mixed = block.mix("mixed", weights, values)
        else:
            own_score = block.rows(own)
            row_max = torch.maximum(weights.amax(-1, keepdim=True), own_score)
            weights = weights.sub_(row_max).exp_()
            own_weight = (own_score - row_max).exp_()
            total = weights.sum(-1, keepdim=True).add_(own_weight)
            mixed = block.mix("mixed", weights, values)
            mixed.addcmul_(block.rows(vs), own_weight)
        divisor = total
        if first_visible is not None:
            divisor = total.masked_fill(total == 0, 1)
        block.write(out5, mixed.div_(divisor))
        block.write(log_normalizer5, total.log_().add_(row_max))
    return Output(out.to(q.dtype), log_normalizer.squeeze(-1))


@hidden_stays_hidden
def gradient(
    grad: Tensor,
    inputs: Inputs,
    output: Output,
    shape: Shape,
    *,
    with_keys: bool,
    block_size: int | None = None,
) -> Gradients:
    """dQ, dK, dV, dk*, dv*: dK and dV None without `with_keys`, dk* and dv* None without own
    keys.
    """
    q, k, v, k_self, v_self, first_visible = inputs
    q5 = by_key_head(q, k)
    grad5 = by_key_head(grad, k)
    ks = one_per_row(k_self, k, shape)
    vs = one_per_row(v_self, k, shape)
    keys = columns(k, k_self, shape, k)
    values = columns(v, v_self, shape, k)
    scale = shape.scale
    log_normalizer = statistics_by_key_head(output.log_normalizer, k)
    result = Gradients(
        q=wide_gradient(q),
        k=zeroed(wide_gradient(k)) if with_keys else None,
        v=zeroed(wide_gradient(v)) if with_keys else None,
        k_self=wide_gradient(k_self),
        v_self=wide_gradient(v_self),
    )
    dq5 = by_key_head(result.q, k)
    dk_self5 = by_key_head(result.k_self, k)
    dv_self5 = by_key_head(result.v_self, k)
    dk = Columns(result.k, None)
    dv = Columns(result.v, None)
    if keys.own is not None:
        dk = Columns(result.k, zeroed(dk_self5))
        dv = Columns(result.v, zeroed(dv_self5))
    D = dot(grad5, by_key_head(output.out, k))
    for block in blocks(q.shape[2], k.shape[2], first_visible, shape, block_size):
        Q, G = block.rows(q5), block.rows(grad5)
        P = block.weights(Q, keys, log_normalizer)
        dS = block.against("dP", G, values).sub_(block.rows(D)).mul_(P)
        block.write(dq5, block.mix("moved", dS, keys), scale)
        block.collect(dk, dS, Q, scale)
        block.collect(dv, P, G)
    if ks is not None and vs is not None:
        own_weight = dot(q5, ks).mul_(scale).sub_(log_normalizer).exp_()
        own_dS = dot(grad5, vs).sub_(D).mul_(own_weight).mul_(scale)
        dq5.addcmul_(ks, own_dS)
        torch.mul(own_dS, q5, out=dk_self5)
        torch.mul(own_weight, grad5, out=dv_self5)
    return rounded(result, q.dtype)
