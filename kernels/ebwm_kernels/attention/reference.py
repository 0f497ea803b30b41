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

Tensors come as (B, H, S, d) and (B, H_kv, C, d); inside they are (N, group, S, d) and (N, C, d)
with N = B H_kv: heads that share keys are rows of one product. What is S x C is touched as few
times as possible and in place; scales go to what is S x d. Half precisions are computed in float32.
Source: derived for this project by differentiating the softmax twice; the test is plain autograd in
float64.
"""

from __future__ import annotations

from typing import NamedTuple, overload

import torch
from torch import Tensor

from ebwm_kernels.attention.row_blocks import Block, Columns, blocks
from ebwm_kernels.attention.visibility import Shape


class Cotangents(NamedTuple):
    """On dQ, dK, dV, dk*, dv*, shaped as these; dK and dV, or those of the own key, may both be
    None (zero).
    """

    query: Tensor
    key: Tensor | None
    value: Tensor | None
    k_self: Tensor | None
    v_self: Tensor | None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_self: Tensor | None,
    v_self: Tensor | None,
    first_visible: Tensor | None,
    shape: Shape,
) -> tuple[Tensor, Tensor]:
    """(O (B, H, S, d_v), L (B, H, S) in the precision of statistics)."""
    q4 = _by_key_head(q, k)
    keys = _columns(k, k_self, shape, k)
    values = _columns(v, v_self, shape, k)
    ks = _one_per_row(k_self, k, shape)
    vs = _one_per_row(v_self, k, shape)
    out = q4.new_empty(*q4.shape[:-1], v.shape[-1])
    log_normalizer = q4.new_empty(*q4.shape[:-1], 1)
    own = None
    if ks is not None:
        own = _dot(q4, ks).mul_(shape.scale)
    for block in blocks(q.shape[2], k.shape[2], first_visible, shape):
        weights = block.scores(q4, keys)
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
        block.write(out, mixed.div_(divisor))
        block.write(log_normalizer, total.log_().add_(row_max))
    out = out.to(q.dtype).view(*q.shape[:-1], v.shape[-1])
    return out, log_normalizer.view(q.shape[:-1])


def gradient(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_self: Tensor | None,
    v_self: Tensor | None,
    first_visible: Tensor | None,
    out: Tensor,
    log_normalizer: Tensor,
    shape: Shape,
    *,
    with_keys: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dQ, dK, dV, dk*, dv*): dK and dV None without `with_keys`, dk* and dv* None without own
    keys.
    """
    grad4 = _by_key_head(grad, k)
    q4 = _by_key_head(q, k)
    ks = _one_per_row(k_self, k, shape)
    vs = _one_per_row(v_self, k, shape)
    out4 = _by_key_head(out, k)
    keys = _columns(k, k_self, shape, k)
    values = _columns(v, v_self, shape, k)
    scale = shape.scale
    log_normalizer = log_normalizer.reshape(*q4.shape[:-1], 1)
    dq = torch.empty_like(q4)
    dk = Columns(_zeros_like(keys.context) if with_keys else None, _zeros_like(keys.own))
    dv = Columns(_zeros_like(values.context) if with_keys else None, _zeros_like(values.own))
    D = _dot(grad4, out4)
    for block in blocks(q.shape[2], k.shape[2], first_visible, shape):
        Q, G = block.rows(q4), block.rows(grad4)
        P = block.weights(q4, keys, log_normalizer)
        dS = block.against("dP", G, values).sub_(block.rows(D)).mul_(P)
        block.write(dq, block.mix("moved", dS, keys), scale)
        block.collect(dk, dS, Q, scale)
        block.collect(dv, P, G)
    dk_self = dk.own
    dv_self = dv.own
    if ks is not None and vs is not None:
        own_weight = _dot(q4, ks).mul_(scale).sub_(log_normalizer).exp_()
        own_dS = _dot(grad4, vs).sub_(D).mul_(own_weight).mul_(scale)
        dq.addcmul_(ks, own_dS)
        dk_self = own_dS * q4
        dv_self = own_weight * grad4
    return (
        _shaped_as(q, dq),
        _shaped_as(k, dk.context),
        _shaped_as(v, dv.context),
        _shaped_as(k_self, dk_self),
        _shaped_as(v_self, dv_self),
    )


class _OwnKey(NamedTuple):
    """What a direction does to the queries' own keys, where these are one per row.

    key (without the mean of the others), value, and what is added to them, b and c: (N, group, S,
    d). weight p* and tangent sd* / s: (N, group, S, 1).
    """

    key: Tensor
    value: Tensor
    b: Tensor
    c: Tensor
    weight: Tensor
    tangent: Tensor


class _Direction(NamedTuple):
    """Attention at a point, and A, B, C, b*, c* there: cotangents of the gradient, or tangents.

    Keys without their mean (centred) enter Sdot and gQ: Sdot - mu does not see what all keys of a
    row share, and Z of a row sums to zero. Exact, and it keeps a large common vector out of the
    rounding.
    """

    q: Tensor
    keys: Columns
    centred: Columns
    values: Columns
    a: Tensor
    b: Columns
    c: Columns
    own: _OwnKey | None
    log_normalizer: Tensor


class _Moved(NamedTuple):
    """What a direction does to a block of rows.

    P: the weights. centred: P (Sdot - mu) / s. own_centred: the same of an own key, one per row.
    output: the change of O, gG of the formulas.
    """

    P: Tensor
    centred: Tensor
    own_centred: Tensor | None
    output: Tensor


def _direction(
    directions: Cotangents,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_self: Tensor | None,
    v_self: Tensor | None,
    log_normalizer: Tensor,
    shape: Shape,
) -> _Direction:
    if k_self is not None and (directions.k_self is None or directions.v_self is None):
        raise ValueError("attention: own keys need the cotangents of both, keys and values")
    a = _by_key_head(directions.query, k)
    q4 = _by_key_head(q, k)
    k3 = _flat(k)
    keys = Columns(k3, _own_columns(k_self, shape, k))
    values = _columns(v, v_self, shape, k)
    b = _columns(directions.key, directions.k_self, shape, k)
    c = _columns(directions.value, directions.v_self, shape, k)
    mean = k3.mean(1, keepdim=True)
    centred = Columns(k3 - mean, None if keys.own is None else keys.own - mean[:, None])
    log_normalizer = log_normalizer.reshape(*q4.shape[:-1], 1)
    own = None
    ks = _one_per_row(k_self, k, shape)
    vs = _one_per_row(v_self, k, shape)
    b_self = _one_per_row(directions.k_self, k, shape)
    c_self = _one_per_row(directions.v_self, k, shape)
    if ks is not None and vs is not None and b_self is not None and c_self is not None:
        ks_centred = ks - mean[:, None]
        own = _OwnKey(
            key=ks_centred,
            value=vs,
            b=b_self,
            c=c_self,
            weight=_dot(q4, ks).mul_(shape.scale).sub_(log_normalizer).exp_(),
            tangent=_dot(a, ks_centred).add_(_dot(q4, b_self)),
        )
    return _Direction(q4, keys, centred, values, a, b, c, own, log_normalizer)


def _moved(block: Block, at: _Direction, scale: float) -> _Moved:
    """Pass 1 over a block: O's change along a direction, and the weights' (over s)."""
    own = at.own
    P = block.weights(at.q, at.keys, at.log_normalizer)
    tangent = block.against("centred", block.rows(at.a), at.centred)
    if at.b.exist:
        tangent.add_(block.against("cross", block.rows(at.q), at.b))
    centred = tangent.mul_(P)
    mu = centred.sum(-1, keepdim=True)
    if own is not None:
        mu.addcmul_(block.rows(own.weight), block.rows(own.tangent))
    centred.addcmul_(P, mu, value=-1)  # P (Sdot - mu)
    # (P Sdot) V + p* sd* v* - mu O, with sum P = 1: the centred weights already hold the -mu O
    output = block.mix("moved", centred, at.values)
    own_centred = None
    if own is None:
        output.mul_(scale)
    else:
        own_weight = block.rows(own.weight)
        own_centred = (block.rows(own.tangent) - mu).mul_(own_weight)
        output.addcmul_(block.rows(own.value), own_centred).mul_(scale)
        output.addcmul_(block.rows(own.c), own_weight)
    if at.c.exist:
        output.add_(block.mix("mixed", P, at.c))
    return _Moved(P, centred, own_centred, output)


class _OwnSecondOrder(NamedTuple):
    """Of own keys that are one per row, for the double backward, (N, group, S, 1): dp* - D, G.c*,
    p* (sd* - mu), and Z, the last two filled by the blocks.
    """

    dP_minus_D: Tensor
    grad_c: Tensor
    centred: Tensor
    Z: Tensor


def double_backward(
    cotangents: Cotangents,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_self: Tensor | None,
    v_self: Tensor | None,
    first_visible: Tensor | None,
    out: Tensor,
    log_normalizer: Tensor,
    shape: Shape,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(gG, gQ, gK, gV, gk*, gv*), the last two None without own keys.

    Sdot, mu and Z here are those above over s.
    """
    at = _direction(cotangents, q, k, v, k_self, v_self, log_normalizer, shape)
    grad4 = _by_key_head(grad, k)
    out4 = _by_key_head(out, k)
    own, scale = at.own, shape.scale
    g_grad = torch.empty_like(grad4)
    g_q = torch.empty_like(at.q)
    g_k = torch.zeros_like(_flat(k))
    g_v = torch.zeros_like(_flat(v))
    into_k = Columns(g_k, _zeros_like(at.keys.own))
    into_v = Columns(g_v, _zeros_like(at.values.own))
    D = _dot(grad4, out4)
    second = None
    if own is not None:
        second = _OwnSecondOrder(
            dP_minus_D=_dot(grad4, own.value).sub_(D),
            grad_c=_dot(grad4, own.c),
            centred=torch.empty_like(D),
            Z=torch.empty_like(D),
        )
    for block in blocks(q.shape[2], k.shape[2], first_visible, shape):
        Q, G, A = block.rows(at.q), block.rows(grad4), block.rows(at.a)
        moved = _moved(block, at, scale)
        P, centred = moved.P, moved.centred
        phi = _dot(G, moved.output)
        block.write(g_grad, moved.output)
        dP_minus_D = block.against("dP", G, at.values).sub_(block.rows(D))
        dS = torch.mul(dP_minus_D, P, out=block.scratch("dS", P.shape, P))
        Z = dP_minus_D.mul_(centred).addcmul_(P, phi / -scale)
        if at.c.exist:
            Z.addcmul_(P, block.against("cross", G, at.c), value=1 / scale)
        block.write(g_q, block.mix("moved", Z, at.centred), scale**2)
        if at.b.exist:
            block.add(g_q, block.mix("moved", dS, at.b), scale)
        if own is not None and second is not None and moved.own_centred is not None:
            block.write(second.centred, moved.own_centred, scale)
            own_Z = (block.rows(second.grad_c) - phi).mul_(block.rows(own.weight))
            own_Z.add_(moved.own_centred * block.rows(second.dP_minus_D), alpha=scale)
            block.write(second.Z, own_Z)
        block.collect(into_k, Z, Q, scale**2)
        block.collect(into_k, dS, A, scale)
        block.collect(into_v, centred, G, scale)
    g_k_self = into_k.own
    g_v_self = into_v.own
    if own is not None and second is not None:
        second.Z.mul_(scale)
        own_dS = second.dP_minus_D.mul_(own.weight).mul_(scale)
        g_q.addcmul_(own.key, second.Z).addcmul_(own.b, own_dS)
        g_k_self = torch.addcmul(second.Z * at.q, at.a, own_dS)
        g_v_self = second.centred * grad4
    return (
        _shaped_as(grad, g_grad),
        _shaped_as(q, g_q),
        _shaped_as(k, g_k),
        _shaped_as(v, g_v),
        _shaped_as(k_self, g_k_self),
        _shaped_as(v_self, g_v_self),
    )


def tangent(
    tangents: Cotangents,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_self: Tensor | None,
    v_self: Tensor | None,
    first_visible: Tensor | None,
    out: Tensor,
    log_normalizer: Tensor,
    shape: Shape,
) -> Tensor:
    """Tangent of O (B, H, S, d_v) for tangents of Q, K, V, k*, v*: gG of the formulas, with these
    as A, B, C, b*, c*.
    """
    at = _direction(tangents, q, k, v, k_self, v_self, log_normalizer, shape)
    moved = at.q.new_empty(*at.q.shape[:-1], v.shape[-1])
    for block in blocks(q.shape[2], k.shape[2], first_visible, shape):
        block.write(moved, _moved(block, at, shape.scale).output)
    return _shaped_as(out, moved)


def _columns(context: Tensor | None, own: Tensor | None, shape: Shape, k: Tensor) -> Columns:
    """What belongs to the columns of a row; own keys are among them with groups only."""
    return Columns(_flat(context), _own_columns(own, shape, k))


def _own_columns(own: Tensor | None, shape: Shape, k: Tensor) -> Tensor | None:
    """What belongs to own keys that are columns: with groups."""
    return _by_key_head(own, k) if shape.group_size > 1 else None


def _one_per_row(own: Tensor | None, k: Tensor, shape: Shape) -> Tensor | None:
    """What belongs to own keys that are one per row: without groups."""
    return _by_key_head(own, k) if shape.group_size == 1 else None


def _zeros_like(x: Tensor | None) -> Tensor | None:
    return None if x is None else torch.zeros_like(x)


@overload
def _by_key_head(x: Tensor, k: Tensor) -> Tensor: ...
@overload
def _by_key_head(x: None, k: Tensor) -> None: ...
def _by_key_head(x: Tensor | None, k: Tensor) -> Tensor | None:
    """(B, H, S, d) -> (B * H_kv, group, S, d), contiguous, in the precision of sums."""
    if x is None:
        return None
    grouped = x.reshape(-1, x.shape[1] // k.shape[1], *x.shape[2:])
    return grouped.to(wide_dtype(x.dtype)).contiguous()


@overload
def _flat(x: Tensor) -> Tensor: ...
@overload
def _flat(x: None) -> None: ...
def _flat(x: Tensor | None) -> Tensor | None:
    """(B, H_kv, C, d) -> (B * H_kv, C, d), in the precision of sums."""
    if x is None:
        return None
    return x.reshape(-1, *x.shape[2:]).to(wide_dtype(x.dtype))


@overload
def _shaped_as(like: Tensor, x: Tensor) -> Tensor: ...
@overload
def _shaped_as(like: Tensor | None, x: Tensor | None) -> Tensor | None: ...
def _shaped_as(like: Tensor | None, x: Tensor | None) -> Tensor | None:
    """A result in the shape and precision of the tensor it is the gradient of."""
    if x is None or like is None:
        return None
    return x.to(like.dtype).view(like.shape)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Row-wise inner product (..., 1)."""
    return (x * y).sum(-1, keepdim=True)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of sums and statistics: float32 for half precisions."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
