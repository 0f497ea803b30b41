"""The observed stream as a cache: keys and values of every layer, computed once, one position appended at a time; rows of different lengths.

    prefill(observed)                K, V of all observed positions                        once per prompt
    append(observed)                 K, V of one more position                             once per accepted token or frame
    energy(predicted)                E of candidates for the next position, given them     any number of candidates
    energy_and_gradient(predicted)   E and dE/d predicted                                  once per refinement step

The same formulas as training (transformer.py, energy.py), for rows that stand at the end of their own context. Row b sees the first lengths[b] entries of its
cache; what lies behind is masked. First order only, so a step needs no graph: a block's forward keeps what its closed-form backward reads, and no operation is left
that a single row would not need. That is where the time goes when one token is generated.

    block       n = norm(p);  q, k, v = rotated heads of n;  s = [q K, q k];  P = softmax(s);  a = Wo (P [V, v]);  p' = p + a
                m = norm(p'); u = W1 m;  t = W3 m;  p'' = p' + W2 (silu(u) t)
    gradient G  h = W2^T G;  du = h t silu'(u);  dt = h silu(u);  G' = G + norm^T(W1^T du + W3^T dt)
                o = heads of Wo^T G';  dP = [o V, o v];  ds = P (dP - sum P dP);  dq = ds [K, k];  dk = ds_own q;  dv = P_own o
                G'' = G' + norm^T(Wq^T dq + Wk^T dk + Wv^T dv)                             adaLN: shifts, scales and gates at their places
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .baseline import BaselineTransformer
from .energy import EnergyTransformer
from .transformer import Block, Modulation, RMSNorm, modulate


class ObservedCache:
    """Of one landscape. capacity: observed positions at most.  positions_computed counts them, for tests and reports."""

    def __init__(
        self, network: EnergyTransformer | BaselineTransformer, capacity: int, landscape: int = 0
    ):
        self.network, self.landscape = network, landscape
        self.is_energy = isinstance(network, EnergyTransformer)
        self.offset = int(
            self.is_energy and network.conditioning == "time_embed"
        )  # a token in front of the context
        self.capacity = capacity + self.offset
        self.modulations = (
            network.modulations_of(landscape, predicted=False)[0]
            if self.is_energy
            else [None] * len(network.layers)
        )
        self.keys: list[Tensor] = []  # per layer (B, H_kv, capacity, d)
        self.values: list[Tensor] = []
        self.lengths: Tensor | None = None  # (B,) entries of each row, the token in front included
        self.longest = 0  # the largest of them
        self.positions_computed = 0

    @torch.no_grad()
    def prefill(self, observed: Tensor, lengths: Tensor) -> Tensor | None:
        """observed (B, S, D), right-padded to the longest; lengths (B,) >= 1. A baseline's hidden state (B, D) at each row's last position."""
        if self.offset:
            token = self.network.landscape_embedding.weight[self.landscape].expand(
                len(observed), 1, -1
            )
            observed = torch.cat([token, observed], 1)
        self.lengths = lengths.to(observed.device) + self.offset
        self.longest = int(self.lengths.max())
        self.keys, self.values = [], []
        rotary = self.network.rotary(observed.shape[1], observed)
        for index, (layer, modulation) in enumerate(zip(self.network.layers, self.modulations)):
            keys, values = layer.keys_values(observed, rotary, modulation)
            for store, new in ((self.keys, keys), (self.values, values)):
                whole = new.new_zeros(*new.shape[:2], self.capacity, new.shape[3])
                whole[:, :, : new.shape[2]] = new
                store.append(whole)
            if not self.is_energy or index + 1 < len(self.network.layers):
                observed = layer.observe(observed, keys, values, rotary, modulation)
        self.positions_computed += int(lengths.sum())
        if not self.is_energy:
            return self.network.norm(observed[torch.arange(len(observed)), self.lengths - 1])
        return None

    @torch.no_grad()
    def append(self, observed: Tensor) -> Tensor | None:
        """observed (B, D): the next position of every row. A baseline's hidden state (B, D) there. ValueError when a row is full."""
        if self.longest >= self.capacity:
            raise ValueError(
                f"a row of the cache has {self.longest - self.offset} positions, its capacity is {self.capacity - self.offset}: prefill again"
            )
        x, rows = observed[:, None], torch.arange(len(observed), device=observed.device)
        factors = self._factors(self.lengths, x)
        self.longest += 1
        mask = self._mask(self.lengths + 1)
        for index, (layer, modulation) in enumerate(zip(self.network.layers, self.modulations)):
            normed = _attention_input(layer, x, modulation)
            q, k, v = _heads_of(layer, normed, factors)
            self.keys[index][rows, :, self.lengths] = k[:, :, 0]
            self.values[index][rows, :, self.lengths] = v[:, :, 0]
            if not self.is_energy or index + 1 < len(self.network.layers):
                out, _ = attend_rows(q, *self._seen(index), mask)
                x = x + _gated(
                    layer.attention.wo(_rows(out)), modulation and modulation.attention_gate
                )
                x = x + _feed_forward(layer, x, modulation)[0]
        self.lengths = self.lengths + 1
        self.positions_computed += len(observed)
        return None if self.is_energy else _norm(self.network.norm, x[:, 0])

    @torch.no_grad()
    def energy(self, predicted: Tensor, landscape: int) -> Tensor:
        """Energies (B, K) of K candidates per row (B, K, D) for the position after its last."""
        return self._sweep(predicted, landscape, with_gradient=False)[0]

    @torch.no_grad()
    def energy_and_gradient(self, predicted: Tensor, landscape: int) -> tuple[Tensor, Tensor]:
        """(E (B, K), dE/d predicted (B, K, D)) of K candidates per row (B, K, D)."""
        return self._sweep(predicted, landscape, with_gradient=True)

    def select(self, rows: Tensor) -> "ObservedCache":
        """The cache of some rows; it shares nothing with this one."""
        part = ObservedCache(self.network, self.capacity - self.offset, self.landscape)
        part.keys, part.values = ([u[rows] for u in store] for store in (self.keys, self.values))
        part.lengths = self.lengths[rows]
        part.longest = int(part.lengths.max())
        return part

    def _sweep(
        self, p: Tensor, landscape: int, *, with_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        network = self.network
        modulations, final = network.modulations_of(landscape, predicted=True)
        factors, mask, kept = self._factors(self.lengths, p), self._mask(self.lengths), []
        for index, (layer, modulation) in enumerate(zip(network.layers, modulations)):
            p, block = _forward(layer, p, factors, *self._seen(index), mask, modulation)
            kept.append(block)
        normed = _norm(network.norm, p)
        energy = network.head(normed if final is None else modulate(normed, *final)).squeeze(-1)
        if not with_gradient:
            return energy, None
        slope = network.head.weight[0] if final is None else network.head.weight[0] * (1 + final[1])
        gradient = _norm_gradient(slope.expand_as(p), p, network.norm)
        for index in reversed(range(len(kept))):
            gradient = _backward(
                network.layers[index],
                gradient,
                kept.pop(),
                factors,
                *self._seen(index),
                modulations[index],
            )
        return energy, gradient

    def _seen(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer as far as any row has them."""
        return self.keys[index][:, :, : self.longest], self.values[index][:, :, : self.longest]

    def _factors(self, positions: Tensor, like: Tensor) -> Tensor:
        """Rotations of one position per row, for all its candidates: complex (B, 1, 1, d / 2)."""
        table = self.network.rotary(self.capacity + 2, like).factors
        return torch.view_as_complex(table[positions])[:, None, None]

    def _mask(self, lengths: Tensor) -> Tensor | None:
        """(B, 1, 1, longest) True where a row has no entry; None where every row has all."""
        if bool((lengths == self.longest).all()):
            return None
        return (torch.arange(self.longest, device=lengths.device) >= lengths[:, None])[
            :, None, None
        ]


class _Kept(NamedTuple):
    """What the backward of a block reads. H_kv groups of heads are folded into rows: q, k, v (B, H_kv, groups K, d), weights (B, H_kv, groups K, seen + 1)."""

    p: Tensor
    middle: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    weights: Tensor
    u: Tensor
    t: Tensor


def attend_rows(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    k_own: Tensor | None = None,
    v_own: Tensor | None = None,
) -> tuple[Tensor, tuple]:
    """Rows q (B, H, K, d) over keys, values (B, H_kv, C, d), and each its own key and value (B, H_kv, K, d) where given.

    mask (B, 1, 1, C): True is not seen. Returns ((B, H, K, d), (q, k, v, weights) as _Kept has them). Grouped heads are folded into the rows, so that keys
    and values are read in place.
    """
    B, H, K, d = q.shape
    groups = H // keys.shape[1]
    q = (q * d**-0.5).unflatten(1, (-1, groups)).flatten(2, 3)
    scores = q @ keys.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill_(mask, float("-inf"))
    if k_own is None:
        return (scores.softmax(-1) @ values).view(B, H, K, d), ()
    if groups > 1:
        k_own, v_own = (
            u[:, :, None].expand(-1, -1, groups, -1, -1).flatten(2, 3) for u in (k_own, v_own)
        )
    weights = torch.cat([scores, (q * k_own).sum(-1, keepdim=True)], -1).softmax(-1)
    out = torch.addcmul(weights[..., :-1] @ values, weights[..., -1:], v_own)
    return out.view(B, H, K, d), (q, k_own, v_own, weights)


def _forward(
    layer: Block,
    p: Tensor,
    factors: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    modulation: Modulation | None,
) -> tuple[Tensor, _Kept]:
    """Candidates (B, K, D) through a block."""
    q, k, v = _heads_of(layer, _attention_input(layer, p, modulation), factors)
    out, attention = attend_rows(q, keys, values, mask, k, v)
    middle = p + _gated(layer.attention.wo(_rows(out)), modulation and modulation.attention_gate)
    change, u, t = _feed_forward(layer, middle, modulation)
    return middle + change, _Kept(p, middle, *attention, u, t)


def _backward(
    layer: Block,
    gradient: Tensor,
    kept: _Kept,
    factors: Tensor,
    keys: Tensor,
    values: Tensor,
    modulation: Modulation | None,
) -> Tensor:
    """dE/d p from dE/d p'' (B, K, D)."""
    attention, feed_forward, half = (
        layer.attention,
        layer.feed_forward,
        kept.u.dtype in (torch.bfloat16, torch.float16),
    )
    u, t = (kept.u.float(), kept.t.float()) if half else (kept.u, kept.t)
    h = _gated(gradient, modulation and modulation.feed_forward_gate) @ feed_forward.w2.weight
    sigmoid = u.sigmoid()
    silu = u * sigmoid
    du, dt = h * t * (sigmoid + silu * (1 - sigmoid)), h * silu
    change = du.to(h.dtype) @ feed_forward.w1.weight + dt.to(h.dtype) @ feed_forward.w3.weight
    gradient = gradient + _norm_gradient(
        _gated(change, None if modulation is None else 1 + modulation.feed_forward_scale),
        kept.middle,
        layer.ffn_norm,
    )

    B, K = gradient.shape[:2]
    H, H_kv, d = attention.num_heads, attention.num_kv_heads, attention.head_dimension
    o = (
        (_gated(gradient, modulation and modulation.attention_gate) @ attention.wo.weight)
        .view(B, K, H, d)
        .transpose(1, 2)
        .unflatten(1, (H_kv, -1))
        .flatten(2, 3)
    )
    slope = torch.cat([o @ values.transpose(-1, -2), (o * kept.v).sum(-1, keepdim=True)], -1)
    ds = kept.weights * (slope - (kept.weights * slope).sum(-1, keepdim=True))
    dq = torch.addcmul(ds[..., :-1] @ keys, ds[..., -1:], kept.k) * d**-0.5
    dk, dv = (
        (u.unflatten(2, (-1, K)).sum(2) if H > H_kv else u)
        for u in (ds[..., -1:] * kept.q, kept.weights[..., -1:] * o)
    )
    back = factors.conj()
    dq, dk = _rotated(dq.view(B, H, K, d), back), _rotated(dk, back)
    change = (
        _rows(dq) @ attention.wq.weight
        + _rows(dk) @ attention.wk.weight
        + _rows(dv) @ attention.wv.weight
    )
    return gradient + _norm_gradient(
        _gated(change, None if modulation is None else 1 + modulation.attention_scale),
        kept.p,
        layer.attention_norm,
    )


def _attention_input(layer: Block, x: Tensor, modulation: Modulation | None) -> Tensor:
    normed = _norm(layer.attention_norm, x)
    return (
        normed
        if modulation is None
        else modulate(normed, modulation.attention_shift, modulation.attention_scale)
    )


def _heads_of(layer: Block, normed: Tensor, factors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, H, K, d), k and v (B, H_kv, K, d) of rows (B, K, D); q and k rotated."""
    attention = layer.attention
    q, k, v = (
        linear(normed).unflatten(-1, (-1, attention.head_dimension)).transpose(1, 2)
        for linear in (attention.wq, attention.wk, attention.wv)
    )
    return _rotated(q, factors), _rotated(k, factors), v


def _feed_forward(
    layer: Block, x: Tensor, modulation: Modulation | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(what it adds to x, u, t)."""
    normed = _norm(layer.ffn_norm, x)
    if modulation is not None:
        normed = modulate(normed, modulation.feed_forward_shift, modulation.feed_forward_scale)
    u, t = layer.feed_forward.w1(normed), layer.feed_forward.w3(normed)
    return (
        _gated(layer.feed_forward.w2(F.silu(u) * t), modulation and modulation.feed_forward_gate),
        u,
        t,
    )


def _gated(x: Tensor, gate: Tensor | None) -> Tensor:
    return x if gate is None else x * gate


def _rows(heads: Tensor) -> Tensor:
    """(B, H, K, d) -> (B, K, H d)."""
    return heads.transpose(1, 2).flatten(2)


def _rotated(heads: Tensor, factors: Tensor) -> Tensor:
    wide = heads.float() if heads.dtype in (torch.bfloat16, torch.float16) else heads
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * factors).flatten(-2).to(heads.dtype)


def _norm(norm: RMSNorm, x: Tensor) -> Tensor:
    wide = _wide(x)
    return (wide * _root(norm, wide) * norm.weight).to(x.dtype)


def _norm_gradient(gradient: Tensor, x: Tensor, norm: RMSNorm) -> Tensor:
    """The way back through an RMSNorm: r (h - n mean(h n)), h = g w, n = r x."""
    wide, h = _wide(x), _wide(gradient) * norm.weight
    r = _root(norm, wide)
    slope = torch.linalg.vecdot(h, wide).unsqueeze(-1) * r.square() * (1 / wide.shape[-1])
    return ((h - wide * slope) * r).to(x.dtype)


def _root(norm: RMSNorm, x: Tensor) -> Tensor:
    """1 / sqrt(mean x^2 + epsilon) of rows, kept as (..., 1). An inner product is one operation; square and mean are four."""
    return (torch.linalg.vecdot(x, x) * (1 / x.shape[-1]) + norm.epsilon).rsqrt_().unsqueeze(-1)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
