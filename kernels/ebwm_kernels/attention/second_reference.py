"""The second order of the reference, and the tangent: formulas and letters are those at the top of
attention/reference.py.

Keys without a mean key enter Sdot and gQ: Sdot - mu does not see what all keys of a row share, and
Z of a row sums to zero. Exact for any constant of a row, and it keeps a large common vector out of
the rounding. The mean is over keys that the row sees, so that no other key reaches it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ebwm_kernels.attention.isolation import hidden_stays_hidden
from ebwm_kernels.attention.reference_columns import (
    by_key_head,
    columns,
    dot,
    flat_keys,
    one_per_row,
    rounded,
    statistics_by_key_head,
    wide_gradient,
    zeroed,
)
from ebwm_kernels.attention.row_blocks import Block, Columns, block_rows, blocks
from ebwm_kernels.attention.tensors import (
    Cotangents,
    Inputs,
    Output,
    SecondGradients,
    empty_output,
)
from ebwm_kernels.attention.visibility import Shape, last_visible_of

MEAN_KEYS = 16  # at most so many keys make a mean key


class _OwnKey(NamedTuple):
    """What a direction does to the queries' own keys, where these are one per row.

    key (without the mean key), value, and what is added to them, b and c: (B, H_kv, group, S, d).
    weight p* and tangent sd* / s: (B, H_kv, group, S, 1).
    """

    key: Tensor
    value: Tensor
    b: Tensor
    c: Tensor
    weight: Tensor
    tangent: Tensor


class _Direction(NamedTuple):
    """Attention at a point, and A, B, C, b*, c* there: cotangents of the gradient, or tangents.

    mean_key: (B, H_kv, 1, S, d), of keys that a row sees, or (.., 1, d) for all rows. centred:
    keys without it, which `centred_for` fills in for each block where rows differ.
    """

    q: Tensor
    keys: Columns
    mean_key: Tensor
    centred: Columns
    values: Columns
    a: Tensor
    b: Columns
    c: Columns
    own: _OwnKey | None
    log_normalizer: Tensor

    def centred_for(self, block: Block) -> Columns:
        """The keys of a block without the mean key of its rows."""
        if self.mean_key.shape[-2] == 1:
            return self.centred
        mean = self.mean_key[..., block.first : block.first + 1, :]
        if self.keys.context is not None and self.centred.context is not None:
            seen = self.keys.context[:, block.seen]
            of_head = mean.flatten(0, 1).flatten(1, 2)
            torch.sub(seen, of_head, out=self.centred.context[:, block.seen])
        if self.keys.own is not None and self.centred.own is not None:
            own = self.keys.own[..., block.own_places, :]
            torch.sub(own, mean, out=self.centred.own[..., block.own_places, :])
        return self.centred


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
    inputs: Inputs,
    log_normalizer: Tensor,
    shape: Shape,
    block_size: int | None,
) -> _Direction:
    q, k, v, k_self, v_self, first_visible = inputs
    if k_self is not None and (directions.k_self is None or directions.v_self is None):
        raise ValueError("attention: own keys need the cotangents of both, keys and values")
    a = by_key_head(directions.query, k)
    q5 = by_key_head(q, k)
    keys = columns(k, k_self, shape, k)
    values = columns(v, v_self, shape, k)
    b = columns(directions.key, directions.k_self, shape, k)
    c = columns(directions.value, directions.v_self, shape, k)
    log_normalizer = statistics_by_key_head(log_normalizer, k)
    if first_visible is None:
        mean_key = _mean_of_first_keys(k, last_visible_of(0, k.shape[2], shape))
        context = flat_keys(k) - mean_key.flatten(0, 1).flatten(1, 2)
        centred = Columns(context, None if keys.own is None else keys.own - mean_key)
    else:
        mean_key = _mean_key_per_row(k, q.shape[2], first_visible, shape, block_size)
        context = torch.empty_like(flat_keys(k))
        centred = Columns(context, None if keys.own is None else torch.empty_like(keys.own))
    own = None
    ks = one_per_row(k_self, k, shape)
    vs = one_per_row(v_self, k, shape)
    b_self = one_per_row(directions.k_self, k, shape)
    c_self = one_per_row(directions.v_self, k, shape)
    if ks is not None and vs is not None and b_self is not None and c_self is not None:
        ks_centred = ks - mean_key
        own = _OwnKey(
            key=ks_centred,
            value=vs,
            b=b_self,
            c=c_self,
            weight=dot(q5, ks).mul_(shape.scale).sub_(log_normalizer).exp_(),
            tangent=dot(a, ks_centred).add_(dot(q5, b_self)),
        )
    return _Direction(q5, keys, mean_key, centred, values, a, b, c, own, log_normalizer)


def _mean_of_first_keys(k: Tensor, count: int) -> Tensor:
    """(B, H_kv, 1, 1, d): the mean of the first keys, of which every row sees `count`."""
    count = min(count, MEAN_KEYS)
    return by_key_head(k[:, :, :count], k).mean(-2, keepdim=True)


def _mean_key_per_row(
    k: Tensor, num_rows: int, first_visible: Tensor, shape: Shape, block_size: int | None
) -> Tensor:
    """(B, H_kv, 1, S, d): the mean of the first keys that all rows of a row's block see; zeros
    where there are none.
    """
    num_keys = k.shape[2]
    wide = by_key_head(k, k)
    means = wide.new_empty(*wide.shape[:3], num_rows, k.shape[3])
    for first, last in block_rows(num_rows, shape.group_size, block_size):
        end = last_visible_of(first, num_keys, shape)
        places = first_visible[:, last - 1 : last] + torch.arange(MEAN_KEYS, device=k.device)
        is_common = places < end  # (B, MEAN_KEYS)
        places = places.clamp(max=num_keys - 1).long()
        index = places[:, None, None, :, None].expand(*wide.shape[:3], -1, k.shape[3])
        found = wide.gather(3, index)
        found = found.masked_fill(~is_common[:, None, None, :, None], 0)
        count = is_common.sum(1).clamp(min=1)[:, None, None, None, None]
        means[..., first:last, :] = found.sum(3, keepdim=True) / count
    return means


def _moved(block: Block, Q: Tensor, A: Tensor, at: _Direction, scale: float) -> _Moved:
    """Pass 1 over a block: O's change along a direction, and the weights' (over s). Q and A: the
    block's rows.
    """
    own = at.own
    P = block.weights(Q, at.keys, at.log_normalizer)
    tangent = block.against("centred", A, at.centred_for(block))
    if at.b.exist:
        tangent.add_(block.against("cross", Q, at.b))
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
    """Of own keys that are one per row, for the double backward, (B, H_kv, group, S, 1): dp* - D,
    G.c*, p* (sd* - mu), and Z, the last two filled by the blocks.
    """

    dP_minus_D: Tensor
    grad_c: Tensor
    centred: Tensor
    Z: Tensor


@hidden_stays_hidden
def double_backward(
    cotangents: Cotangents,
    grad: Tensor,
    inputs: Inputs,
    output: Output,
    shape: Shape,
    *,
    block_size: int | None = None,
) -> SecondGradients:
    """gG, gQ, gK, gV, gk*, gv*, the last two None without own keys.

    Sdot, mu and Z here are those above over s.
    """
    q, k, v, k_self, v_self, first_visible = inputs
    at = _direction(cotangents, inputs, output.log_normalizer, shape, block_size)
    grad5 = by_key_head(grad, k)
    own, scale = at.own, shape.scale
    result = SecondGradients(
        grad=wide_gradient(grad),
        q=wide_gradient(q),
        k=zeroed(wide_gradient(k)),
        v=zeroed(wide_gradient(v)),
        k_self=wide_gradient(k_self),
        v_self=wide_gradient(v_self),
    )
    g_grad5 = by_key_head(result.grad, k)
    g_q5 = by_key_head(result.q, k)
    g_k_self5 = by_key_head(result.k_self, k)
    g_v_self5 = by_key_head(result.v_self, k)
    into_k = Columns(result.k, None)
    into_v = Columns(result.v, None)
    if at.keys.own is not None:
        into_k = Columns(result.k, zeroed(g_k_self5))
        into_v = Columns(result.v, zeroed(g_v_self5))
    D = dot(grad5, by_key_head(output.out, k))
    second = None
    if own is not None:
        second = _OwnSecondOrder(
            dP_minus_D=dot(grad5, own.value).sub_(D),
            grad_c=dot(grad5, own.c),
            centred=torch.empty_like(D),
            Z=torch.empty_like(D),
        )
    for block in blocks(q.shape[2], k.shape[2], first_visible, shape, block_size):
        Q, G, A = block.rows(at.q), block.rows(grad5), block.rows(at.a)
        moved = _moved(block, Q, A, at, scale)
        P, centred = moved.P, moved.centred
        phi = dot(G, moved.output)
        block.write(g_grad5, moved.output)
        dP_minus_D = block.against("dP", G, at.values).sub_(block.rows(D))
        dS = torch.mul(dP_minus_D, P, out=block.scratch("dS", P.shape, P))
        Z = dP_minus_D.mul_(centred).addcmul_(P, phi / -scale)
        if at.c.exist:
            Z.addcmul_(P, block.against("cross", G, at.c), value=1 / scale)
        block.write(g_q5, block.mix("moved", Z, at.centred), scale**2)
        if at.b.exist:
            block.add(g_q5, block.mix("moved", dS, at.b), scale)
        if own is not None and second is not None and moved.own_centred is not None:
            block.write(second.centred, moved.own_centred, scale)
            own_Z = (block.rows(second.grad_c) - phi).mul_(block.rows(own.weight))
            own_Z.add_(moved.own_centred * block.rows(second.dP_minus_D), alpha=scale)
            block.write(second.Z, own_Z)
        block.collect(into_k, Z, Q, scale**2)
        block.collect(into_k, dS, A, scale)
        block.collect(into_v, centred, G, scale)
    if own is not None and second is not None:
        second.Z.mul_(scale)
        own_dS = second.dP_minus_D.mul_(own.weight).mul_(scale)
        g_q5.addcmul_(own.key, second.Z).addcmul_(own.b, own_dS)
        torch.addcmul(second.Z * at.q, at.a, own_dS, out=g_k_self5)
        torch.mul(second.centred, grad5, out=g_v_self5)
    return rounded(result, q.dtype)


@hidden_stays_hidden
def tangent(
    tangents: Cotangents,
    inputs: Inputs,
    output: Output,
    shape: Shape,
    *,
    block_size: int | None = None,
) -> Tensor:
    """Tangent of O (B, H, S, d_v), lying positions first, for tangents of Q, K, V, k*, v*: gG of
    the formulas, with these as A, B, C, b*, c*.
    """
    q, k, v = inputs[:3]
    at = _direction(tangents, inputs, output.log_normalizer, shape, block_size)
    moved = empty_output(q, v.shape[-1], at.q.dtype)
    moved5 = by_key_head(moved, k)
    for block in blocks(q.shape[2], k.shape[2], inputs.first_visible, shape, block_size):
        rows = _moved(block, block.rows(at.q), block.rows(at.a), at, shape.scale)
        block.write(moved5, rows.output)
    return moved.to(q.dtype)
