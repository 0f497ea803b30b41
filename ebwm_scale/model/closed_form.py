"""A block and its first-order gradient in closed form, for candidates at the end of a context.

The same formulas as training (blocks.py), for rows (B, K, D): K candidates for the next position
of each of B contexts. First order only, so a step needs no graph: a block's forward keeps what its
backward reads, and no operation is left that a single row would not need. That is where the time
goes when one token is generated; what it saves over autograd on the same keys and values is
in results/closed_form.json (1.6 to 1.7 times on two CPU cores).

    block       n = norm(p);  q, k, v = rotated heads of n;  s = [q K, q k];  P = softmax(s)
                a = Wo (P [V, v]);  p' = p + a
                m = norm(p');  u = W1 m;  t = W3 m;  p'' = p' + W2 (silu(u) t)
    gradient G  h = W2^T G;  du = h t silu'(u);  dt = h silu(u)
                G' = G + norm^T(W1^T du + W3^T dt)
                o = heads of Wo^T G';  dP = [o V, o v];  ds = P (dP - sum P dP)
                dq = ds [K, k];  dk = ds_self q;  dv = P_self o
                G'' = G' + norm^T(Wq^T dq + Wk^T dk + Wv^T dv)
    qk_norm     q and k are normed heads, rotated: dq and dk pass the norm's transposed too
    groups      the K rows are candidates of P rows each, one after the other: k and v of a row are
                its whole group's, (P, d), so q k, P v, dP and ds have P own columns; dk and dv of
                a row collect from the rows of its group
    no own keys q alone is projected, and k, v, dk, dv and their columns are not there
    adaLN       shifts, scales and gates at their places
    head        dE/dn = w - (A + A^T) n / 2 - s (M^T e + e);  dE/de directly: -s (M n + n + C h)
                (energy_head.py)

Legend: B contexts, K candidates, P rows per candidate (1 without groups), D width, H heads, H_kv
key/value heads, d head dimension, C entries of a context.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ebwm_scale.model.blocks import Block
from ebwm_scale.model.energy_transformer import EnergyTransformer
from ebwm_scale.model.norm import Modulation, RMSNorm, modulate


class Kept(NamedTuple):
    """What the backward of a block reads.

    H_kv groups of heads are folded into rows: q, k_self, v_self (B, H_kv, groups K, d), weights
    (B, H_kv, groups K, C + P); without own keys k_self and v_self are None, and weights have C
    columns. p, middle (B, K, D); u, t (B, K, F). q_heads (B, H, K, d), k_heads (B, H_kv, K, d): in
    front of their norms, where they are normed.
    """

    p: Tensor
    middle: Tensor
    q: Tensor
    k_self: Tensor | None
    v_self: Tensor | None
    weights: Tensor
    u: Tensor
    t: Tensor
    q_heads: Tensor | None
    k_heads: Tensor | None


def block_forward(
    layer: Block,
    p: Tensor,
    factors: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    modulation: Modulation | None,
    near_own: Tensor | None = None,
) -> tuple[Tensor, Kept]:
    """Candidates p (B, K, D) through a block.

    keys, values (B, H_kv, C, d); factors: rotations of the candidates' position, complex
    (B, 1, 1, d / 2), with groups of every row's, (B, 1, K, d / 2); mask (B, 1, 1 or K, C): True is
    not seen. near_own (P, P): which of its group a row sees; None: all.
    """
    normed = attention_input(layer, p, modulation)
    attention = layer.attention
    if attention.own_keys:
        heads = _heads(layer, normed)
        attended, q, k_self, v_self, weights = attend_with_self(
            *_ready_heads(layer, heads, factors),
            *(keys, values, mask, attention.group_size, near_own),
        )
        q_heads, k_heads = heads[:2]
    else:
        q_heads = _split_heads(attention.wq(normed), attention.head_dimension)
        k_self, v_self, k_heads = None, None, None
        attended, q, weights = attend(
            _ready(q_heads, attention.q_norm, factors), keys, values, mask
        )
    change = attention.wo(merge_heads(attended))
    if modulation is not None:
        change = change * modulation.attention_gate
    middle = p + change
    change, u, t = feed_forward(layer, middle, modulation)
    if attention.q_norm is None:
        q_heads, k_heads = None, None
    kept = Kept(p, middle, q, k_self, v_self, weights, u, t, q_heads, k_heads)
    return middle + change, kept


def block_backward(
    layer: Block,
    gradient: Tensor,
    kept: Kept,
    factors: Tensor,
    keys: Tensor,
    values: Tensor,
    modulation: Modulation | None,
) -> Tensor:
    """dE/dp of dE/dp'' (B, K, D)."""
    change = _feed_forward_backward(layer, gradient, kept, modulation)
    gradient = gradient + norm_backward(change, kept.middle, layer.ffn_norm)
    change = _attention_backward(layer, gradient, kept, factors, keys, values, modulation)
    return gradient + norm_backward(change, kept.p, layer.attention_norm)


def head_forward(
    network: EnergyTransformer,
    p: Tensor,
    final: tuple[Tensor, Tensor] | None,
    embedded: Tensor,
    readout: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(energies (B, K), n (B, K, D)) of p (B, K, D) behind the blocks.

    final, embedded, readout: as `network.energy_head` takes them.
    """
    normed = norm(network.norm, p)
    if final is not None:
        normed = modulate(normed, *final)
    return network.energy_of_normed(normed, embedded, readout), normed


def head_backward(
    network: EnergyTransformer,
    p: Tensor,
    normed: Tensor,
    final: tuple[Tensor, Tensor] | None,
    embedded: Tensor,
    readout: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """(dE/dp, dE/d embedded directly or None), (B, K, D) each; normed: n of head_forward."""
    gradient = None
    direct = None
    if network.content is not None:
        gradient, direct = network.content.gradients(normed, embedded, readout)
    if network.head is not None:
        weight = network.head.weight[0]
        gradient = weight if gradient is None else gradient + weight
    assert gradient is not None, "a term reads the predicted stream"
    if final is not None:
        _, scale = final
        gradient = gradient * (1 + scale)
    return norm_backward(gradient.expand_as(p), p, network.norm), direct


def _feed_forward_backward(
    layer: Block, gradient: Tensor, kept: Kept, modulation: Modulation | None
) -> Tensor:
    """What the feed-forward adds to the gradient, before its norm."""
    weights = layer.feed_forward
    u = _wide(kept.u)
    t = _wide(kept.t)
    if modulation is not None:
        gradient = gradient * modulation.feed_forward_gate
    h = gradient @ weights.w2.weight
    sigmoid = u.sigmoid()
    silu = u * sigmoid
    du = h * t * (sigmoid + silu * (1 - sigmoid))
    dt = h * silu
    change = du.to(h.dtype) @ weights.w1.weight + dt.to(h.dtype) @ weights.w3.weight
    if modulation is not None:
        change = change * (1 + modulation.feed_forward_scale)
    return change


def _attention_backward(
    layer: Block,
    gradient: Tensor,
    kept: Kept,
    factors: Tensor,
    keys: Tensor,
    values: Tensor,
    modulation: Modulation | None,
) -> Tensor:
    """What the attention adds to the gradient, before its norm."""
    attention = layer.attention
    B, K = gradient.shape[:2]
    H, H_kv, d = attention.num_heads, attention.num_kv_heads, attention.head_dimension
    if modulation is not None:
        gradient = gradient * modulation.attention_gate
    o = (gradient @ attention.wo.weight).view(B, K, H, d).transpose(1, 2)
    o = o.unflatten(1, (H_kv, -1)).flatten(2, 3)
    if kept.k_self is None or kept.v_self is None:
        ds = _softmax_backward(kept.weights, o @ values.transpose(-1, -2))
        dq = (ds @ keys * d**-0.5).view(B, H, K, d)
        dq = _ready_backward(dq, kept.q_heads, attention.q_norm, factors)
        return _modulated_backward(merge_heads(dq) @ attention.wq.weight, modulation)
    P = attention.group_size
    own = own_scores(o, kept.v_self, P)
    ds = _softmax_backward(kept.weights, torch.cat([o @ values.transpose(-1, -2), own], -1))
    ds_self = ds[..., -P:]
    if P == 1:
        dq = torch.addcmul(ds[..., :-1] @ keys, ds_self, kept.k_self) * d**-0.5
        dk = ds_self * kept.q
        dv = kept.weights[..., -1:] * o
    else:
        dq = (ds[..., :-P] @ keys + _of_own(ds_self, kept.k_self)) * d**-0.5
        dk = _to_own(ds_self, kept.q)
        dv = _to_own(kept.weights[..., -P:], o)
    if H > H_kv:  # all heads of a group share the candidate's key and value
        dk = dk.unflatten(2, (-1, K)).sum(2)
        dv = dv.unflatten(2, (-1, K)).sum(2)
    dq = _ready_backward(dq.view(B, H, K, d), kept.q_heads, attention.q_norm, factors)
    dk = _ready_backward(dk, kept.k_heads, attention.k_norm, factors)
    change = (
        merge_heads(dq) @ attention.wq.weight
        + merge_heads(dk) @ attention.wk.weight
        + merge_heads(dv) @ attention.wv.weight
    )
    return _modulated_backward(change, modulation)


def _softmax_backward(weights: Tensor, d_weights: Tensor) -> Tensor:
    """The gradient of the scores: P (dP - sum P dP)."""
    return weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True))


def _ready_backward(
    gradient: Tensor, heads: Tensor | None, head_norm: RMSNorm | None, factors: Tensor
) -> Tensor:
    """The transposed of `_ready`; heads: what it was given, where there is a norm."""
    gradient = rotate(gradient, factors.conj())
    if head_norm is None:
        return gradient
    assert heads is not None, "they are normed"
    return norm_backward(gradient, heads, head_norm)


def _modulated_backward(change: Tensor, modulation: Modulation | None) -> Tensor:
    """The gradient in front of the attention's modulation."""
    return change if modulation is None else change * (1 + modulation.attention_scale)


def attend(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention (B, H, K, d) of rows q (B, H, K, d) over keys, values (B, H_kv, C, d).

    mask (B, 1, 1 or K, C): True is not seen. Returns (that, q, weights), the last two as Kept has
    them.
    """
    shape = q.shape
    q, scores = _scores(q, keys, mask)
    weights = scores.softmax(-1)
    return (weights @ values).view(shape), q, weights


def attend_with_self(
    q: Tensor,
    k_self: Tensor,
    v_self: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    group_size: int = 1,
    near_own: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `attend`, where each row also sees its own key and value k_self, v_self (B, H_kv, K, d).

    With groups: those of its group, or of them those that near_own (P, P) says.
    Returns ((B, H, K, d), q, k_self, v_self, weights), the last four as Kept has them.
    """
    shape = q.shape
    groups = shape[1] // keys.shape[1]
    q, scores = _scores(q, keys, mask)
    if groups > 1:
        k_self = k_self[:, :, None].expand(-1, -1, groups, -1, -1).flatten(2, 3)
        v_self = v_self[:, :, None].expand(-1, -1, groups, -1, -1).flatten(2, 3)
    of_own = own_scores(q, k_self, group_size)
    if near_own is not None:
        of_own = of_own.unflatten(-2, (-1, group_size)).masked_fill(~near_own, -torch.inf)
        of_own = of_own.flatten(-3, -2)
    weights = torch.cat([scores, of_own], -1).softmax(-1)
    if group_size == 1:
        out = torch.addcmul(weights[..., :-1] @ values, weights[..., -1:], v_self)
    else:
        out = weights[..., :-group_size] @ values + _of_own(weights[..., -group_size:], v_self)
    return out.view(shape), q, k_self, v_self, weights


def own_scores(q: Tensor, k_self: Tensor, group_size: int) -> Tensor:
    """q k of rows (.., K, d) with the P keys of their group: (.., K, P)."""
    if group_size == 1:
        return (q * k_self).sum(-1, keepdim=True)
    scores = q.unflatten(-2, (-1, group_size)) @ k_self.unflatten(-2, (-1, group_size)).mT
    return scores.flatten(-3, -2)


def _of_own(weights: Tensor, values: Tensor) -> Tensor:
    """Sums (.., K, d) of the values (.., K, d) of a row's group by its weights (.., K, P)."""
    group_size = weights.shape[-1]
    grouped = weights.unflatten(-2, (-1, group_size)) @ values.unflatten(-2, (-1, group_size))
    return grouped.flatten(-3, -2)


def _to_own(weights: Tensor, rows: Tensor) -> Tensor:
    """The transposed of `_of_own`: what the rows (.., K, d) of a group give each of its rows."""
    group_size = weights.shape[-1]
    grouped = weights.unflatten(-2, (-1, group_size)).mT @ rows.unflatten(-2, (-1, group_size))
    return grouped.flatten(-3, -2)


def _scores(q: Tensor, keys: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(scaled q (B, H_kv, groups K, d), scores (B, H_kv, groups K, C)).

    Grouped heads are folded into the rows, so that keys and values are read in place.
    """
    groups = q.shape[1] // keys.shape[1]
    q = (q * q.shape[-1] ** -0.5).unflatten(1, (-1, groups)).flatten(2, 3)
    scores = q @ keys.transpose(-1, -2)
    if mask is not None:
        if mask.shape[2] > 1:
            mask = mask.repeat(1, 1, groups, 1)
        scores = scores.masked_fill_(mask, float("-inf"))
    return q, scores


def attention_input(layer: Block, x: Tensor, modulation: Modulation | None) -> Tensor:
    """What the attention's projections read of rows x (B, K, D)."""
    normed = norm(layer.attention_norm, x)
    if modulation is None:
        return normed
    return modulate(normed, modulation.attention_shift, modulation.attention_scale)


def project_heads(layer: Block, normed: Tensor, factors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, H, K, d), k and v (B, H_kv, K, d) of rows (B, K, D), as attention reads them."""
    return _ready_heads(layer, _heads(layer, normed), factors)


def _heads(layer: Block, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, H, K, d), k and v (B, H_kv, K, d) of rows (B, K, D), as they are projected."""
    attention = layer.attention
    q = _split_heads(attention.wq(normed), attention.head_dimension)
    k = _split_heads(attention.wk(normed), attention.head_dimension)
    v = _split_heads(attention.wv(normed), attention.head_dimension)
    return q, k, v


def _ready_heads(
    layer: Block, heads: tuple[Tensor, Tensor, Tensor], factors: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`_heads` with q and k normed, where the model says so, and rotated."""
    q, k, v = heads
    attention = layer.attention
    return _ready(q, attention.q_norm, factors), _ready(k, attention.k_norm, factors), v


def _ready(heads: Tensor, head_norm: RMSNorm | None, factors: Tensor) -> Tensor:
    """Queries or keys (B, heads, K, d), normed where the model says so, and rotated."""
    if head_norm is not None:
        heads = norm(head_norm, heads)
    return rotate(heads, factors)


def feed_forward(
    layer: Block, x: Tensor, modulation: Modulation | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(what it adds to x (B, K, D), u, t)."""
    normed = norm(layer.ffn_norm, x)
    if modulation is not None:
        normed = modulate(normed, modulation.feed_forward_shift, modulation.feed_forward_scale)
    u = layer.feed_forward.w1(normed)
    t = layer.feed_forward.w3(normed)
    change = layer.feed_forward.w2(F.silu(u) * t)
    if modulation is not None:
        change = change * modulation.feed_forward_gate
    return change, u, t


def norm(module: RMSNorm, x: Tensor) -> Tensor:
    """RMSNorm in few operations."""
    wide = _wide(x)
    return (wide * _inverse_rms(module, wide) * module.weight).to(x.dtype)


def norm_backward(gradient: Tensor, x: Tensor, module: RMSNorm) -> Tensor:
    """The gradient before an RMSNorm: r (h - n mean(h n)), h = g w, n = r x."""
    wide = _wide(x)
    h = _wide(gradient) * module.weight
    r = _inverse_rms(module, wide)
    projection = torch.linalg.vecdot(h, wide).unsqueeze(-1) * r.square() * (1 / wide.shape[-1])
    return ((h - wide * projection) * r).to(x.dtype)


def rotate(heads: Tensor, factors: Tensor) -> Tensor:
    """(B, H, K, d), rotated by complex factors that broadcast to (B, H, K, d / 2)."""
    pairs = torch.view_as_complex(_wide(heads).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * factors).flatten(-2).to(heads.dtype)


def merge_heads(heads: Tensor) -> Tensor:
    """(B, H, K, d) -> (B, K, H d)."""
    return heads.transpose(1, 2).flatten(2)


def _split_heads(x: Tensor, head_dimension: int) -> Tensor:
    """(B, K, H d) -> (B, H, K, d)."""
    return x.unflatten(-1, (-1, head_dimension)).transpose(1, 2)


def _inverse_rms(module: RMSNorm, x: Tensor) -> Tensor:
    """1 / sqrt(mean x^2 + epsilon) of rows, kept as (..., 1).

    An inner product is one operation; square and mean are four.
    """
    mean_square = torch.linalg.vecdot(x, x) * (1 / x.shape[-1])
    return (mean_square + module.epsilon).rsqrt_().unsqueeze(-1)


def _wide(x: Tensor) -> Tensor:
    """Half precision in float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
