"""The attention of this package in plain PyTorch, level by level: the definition of what the Triton
kernels compute, and the CPU backend.

Every level keeps row statistics and recomputes the weights, so that no S x C tensor outlives a
block of query rows:
    forward           O, L = logsumexp of a row's scores
    gradient          dQ, dk*, dv*, dK, dV of a cotangent G on O
    double_backward   the gradients of <A, dQ> + <B, dK> + <C, dV> + <b*, dk*> + <c*, dv*>
                      with respect to G, Q, K, V, k*, v*

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

Tensors come as (B, H, S, d) and (B, H_kv, C, d); inside they are (N, group, S, d) and (N, C, d)
with N = B H_kv: heads that share keys are rows of one product. What is S x C is touched as few
times as possible and in place; scales go to what is S x d. Half precisions are computed in float32.
Source: derived for this project by differentiating the softmax twice; the test is plain autograd in
float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# query rows of a block: a block of scores stays in a CPU's cache, and few of its columns are in the
# future
ROWS = 64


class Shape(NamedTuple):
    """What the tensors do not say.

    scale: of the scores. Query t sees keys j <= t + offset if causal, all of them otherwise.
    """

    scale: float
    offset: int
    causal: bool


class Cotangents(NamedTuple):
    """On dQ, dK, dV, dk*, dv*, shaped as these; dK and dV, or those of the own key, may both be
    None (zero).
    """

    query: Tensor
    key: Tensor | None
    value: Tensor | None
    own_key: Tensor | None
    own_value: Tensor | None


def forward(
    q: Tensor, k: Tensor, v: Tensor, k_self: Tensor | None, v_self: Tensor | None, shape: Shape
) -> tuple[Tensor, Tensor]:
    """(O (B, H, S, d), L (B, H, S) in the precision of statistics)."""
    (q4, ko, vo), (k3, v3) = _by_key_head(k, q, k_self, v_self), _flat(k, v)
    out, log_normalizer = torch.empty_like(q4), q4.new_empty(*q4.shape[:-1], 1)
    own = None if ko is None else _dot(q4, ko).mul_(shape.scale)
    for block in _blocks(q4, k3, shape):
        weights = block.scores(q4, k3)
        if own is None:
            row_max = weights.amax(-1, keepdim=True)
            weights = weights.sub_(row_max).exp_()
            total = weights.sum(-1, keepdim=True)
            mixed = block.product("mixed", weights, block.keys(v3))
        else:
            own_score = block.rows(own)
            row_max = (
                torch.maximum(weights.amax(-1, keepdim=True), own_score)
                if block.seen
                else own_score
            )
            weights, own_weight = weights.sub_(row_max).exp_(), (own_score - row_max).exp_()
            total = weights.sum(-1, keepdim=True).add_(own_weight)
            mixed = block.product("mixed", weights, block.keys(v3)).addcmul_(
                block.rows(vo), own_weight
            )
        block.write(out, mixed.div_(total))
        block.write(log_normalizer, total.log_().add_(row_max))
    return out.to(q.dtype).view(q.shape), log_normalizer.view(q.shape[:-1])


def gradient(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_self: Tensor | None,
    v_self: Tensor | None,
    out: Tensor,
    log_normalizer: Tensor,
    shape: Shape,
    *,
    with_keys: bool,
) -> tuple[Tensor | None, ...]:
    """(dQ, dK, dV, dk*, dv*): dK and dV None without `with_keys`, dk* and dv* None without an own
    key.
    """
    (grad4, q4, ko, vo, out4), (k3, v3) = _by_key_head(k, grad, q, k_self, v_self, out), _flat(k, v)
    scale, log_normalizer = shape.scale, log_normalizer.reshape(*q4.shape[:-1], 1)
    dq = torch.empty_like(q4)
    dk, dv = (torch.zeros_like(u) if with_keys else None for u in (k3, v3))
    D = _dot(grad4, out4)
    for block in _blocks(q4, k3, shape):
        Q, G = block.rows(q4), block.rows(grad4)
        P = block.weights(q4, k3, log_normalizer)
        dS = block.product("slope", G, block.keys(v3).mT).sub_(block.rows(D)).mul_(P)
        block.write(dq, block.product("moved", dS, block.keys(k3)), scale)
        if with_keys:
            block.keys(dk).add_(block.product("keys", dS.mT, Q), alpha=scale)
            block.keys(dv).add_(block.product("keys", P.mT, G))
    dk_own = dv_own = None
    if ko is not None:
        own_weight = _dot(q4, ko).mul_(scale).sub_(log_normalizer).exp_()
        own_slope = _dot(grad4, vo).sub_(D).mul_(own_weight).mul_(scale)
        dq.addcmul_(ko, own_slope)
        dk_own, dv_own = own_slope * q4, own_weight * grad4
    return tuple(
        None if u is None else u.to(q.dtype).view(like.shape)
        for u, like in ((dq, q), (dk, k), (dv, v), (dk_own, q), (dv_own, q))
    )


def double_backward(
    cotangents: Cotangents,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_self: Tensor | None,
    v_self: Tensor | None,
    out: Tensor,
    log_normalizer: Tensor,
    shape: Shape,
) -> tuple[Tensor | None, ...]:
    """(gG, gQ, gK, gV, gk*, gv*), the last two None without an own key.

    Sdot, mu and Z here are those above over s.

    Keys enter Sdot and gQ without their mean: Sdot - mu does not see what all keys of a row share,
    and Z of a row sums to zero. Exact, and it keeps a large common vector out of the rounding.
    """
    (a, b_self, c_self, grad4, q4, ko, vo, out4) = _by_key_head(
        k, cotangents.query, cotangents.own_key, cotangents.own_value, grad, q, k_self, v_self, out
    )
    k3, v3, b, c = _flat(k, v, cotangents.key, cotangents.value)
    scale, log_normalizer = shape.scale, log_normalizer.reshape(*q4.shape[:-1], 1)
    mean = k3.mean(1, keepdim=True)
    k3_centred = k3 - mean
    g_grad, g_q, g_k, g_v = (
        torch.empty_like(q4),
        torch.empty_like(q4),
        torch.zeros_like(k3),
        torch.zeros_like(v3),
    )
    D = _dot(grad4, out4)
    has_own = ko is not None
    if has_own:
        own_weight = _dot(q4, ko).mul_(scale).sub_(log_normalizer).exp_()
        ko_centred = ko - mean[:, None]
        own_tangent = _dot(a, ko_centred).add_(_dot(q4, b_self))  # sd*
        own_slope = _dot(grad4, vo).sub_(D)  # dp* - D
        own_centred, own_Z, grad_c = (
            torch.empty_like(log_normalizer),
            torch.empty_like(log_normalizer),
            _dot(grad4, c_self),
        )
    for block in _blocks(q4, k3, shape):
        Q, G, A = (block.rows(u) for u in (q4, grad4, a))
        K, V = block.keys(k3_centred), block.keys(v3)
        P = block.weights(q4, k3, log_normalizer)
        tangent = block.product("centred", A, K.mT)
        if b is not None:
            tangent.add_(block.product("cross", Q, block.keys(b).mT))
        centred = tangent.mul_(P)
        mu = centred.sum(-1, keepdim=True)
        if has_own:
            mu.addcmul_(block.rows(own_weight), block.rows(own_tangent))
        centred.addcmul_(P, mu, value=-1)  # P (Sdot - mu)
        # (P Sdot) V + p* sd* v* - mu O, with sum P = 1: the centred weights already hold the -mu O
        moved = block.product("moved", centred, V)
        if has_own:
            weight = block.rows(own_weight)
            centred_own = (block.rows(own_tangent) - mu).mul_(weight)
            moved.addcmul_(block.rows(vo), centred_own).mul_(scale).addcmul_(
                block.rows(c_self), weight
            )
        else:
            moved.mul_(scale)
        if c is not None:
            moved.add_(block.product("mixed", P, block.keys(c)))
        phi = _dot(G, moved)
        block.write(g_grad, moved)
        slope = block.product("slope", G, V.mT).sub_(block.rows(D))  # dP - D
        dS = torch.mul(slope, P, out=block.scratch("dS", P.shape, P))
        Z = slope.mul_(centred).addcmul_(P, phi / -scale)
        if c is not None:
            Z.addcmul_(P, block.product("cross", G, block.keys(c).mT), value=1 / scale)
        block.write(g_q, block.product("moved", Z, K), scale**2)
        if b is not None:
            block.add(g_q, block.product("moved", dS, block.keys(b)), scale)
        if has_own:
            block.write(own_centred, centred_own, scale)
            block.write(
                own_Z,
                (block.rows(grad_c) - phi)
                .mul_(weight)
                .add_(centred_own * block.rows(own_slope), alpha=scale),
            )
        block.keys(g_k).add_(block.product("keys", Z.mT, Q), alpha=scale**2).add_(
            block.product("keys", dS.mT, A), alpha=scale
        )
        block.keys(g_v).add_(block.product("keys", centred.mT, G), alpha=scale)
    g_k_own = g_v_own = None
    if has_own:
        own_Z.mul_(scale)
        own_dS = own_slope.mul_(own_weight).mul_(scale)
        g_q.addcmul_(ko_centred, own_Z).addcmul_(b_self, own_dS)
        g_k_own, g_v_own = torch.addcmul(own_Z * q4, a, own_dS), own_centred * grad4
    return tuple(
        None if u is None else u.to(q.dtype).view(like.shape)
        for u, like in ((g_grad, q), (g_q, q), (g_k, k), (g_v, v), (g_k_own, q), (g_v_own, q))
    )


class _Block:
    """Query rows first ..

    last - 1 of every head, and the keys the last of them sees; heads of a group share one product.
    """

    def __init__(self, first: int, last: int, seen: int, shape: Shape, buffers: dict[str, Tensor]):
        self.first, self.last, self.seen, self.shape, self.buffers = (
            first,
            last,
            seen,
            shape,
            buffers,
        )

    def rows(self, x: Tensor) -> Tensor:
        """(N, group, S, n) -> (N, group * rows, n)."""
        return x[:, :, self.first : self.last].flatten(1, 2)

    def write(self, x: Tensor, rows: Tensor, factor: float = 1.0) -> None:
        """The inverse: put factor * (N, group * rows, n) where they belong."""
        place = x[:, :, self.first : self.last]
        rows = rows.view(place.shape)
        place.copy_(rows) if factor == 1 else torch.mul(rows, factor, out=place)

    def add(self, x: Tensor, rows: Tensor, factor: float) -> None:
        place = x[:, :, self.first : self.last]
        place.add_(rows.view(place.shape), alpha=factor)

    def keys(self, x: Tensor) -> Tensor:
        """The keys that are seen, (N, seen, d)."""
        return x[:, : self.seen]

    def scratch(self, name: str, shape: torch.Size, like: Tensor) -> Tensor:
        """Memory that the next block uses again: it is still in the cache, and the allocator's
        holes stay few.
        """
        buffer, numel = self.buffers.get(name), shape.numel()
        if buffer is None or buffer.numel() < numel:
            buffer = self.buffers[name] = like.new_empty(numel)
        return buffer[:numel].view(shape)

    def product(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """left @ right in scratch memory."""
        return torch.bmm(
            left,
            right,
            out=self.scratch(name, torch.Size((*left.shape[:2], right.shape[2])), right),
        )

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """scale * q K' (N, group * rows, seen), -inf where the future is."""
        return self._mask(
            self.product("P", self.rows(q), self.keys(k).mT).mul_(self.shape.scale), q.shape[1]
        )

    def weights(self, q: Tensor, k: Tensor, log_normalizer: Tensor) -> Tensor:
        """P (N, group * rows, seen) = exp(scale * q K' - L), 0 where the future is."""
        scores = self.product("P", self.rows(q), self.keys(k).mT)
        return self._mask(
            torch.add(-self.rows(log_normalizer), scores, alpha=self.shape.scale, out=scores),
            q.shape[1],
        ).exp_()

    def _mask(self, scores: Tensor, num_groups: int) -> Tensor:
        """scores (N, group * rows, seen) with -inf where the future is."""
        known = self.first + self.shape.offset + 1  # these columns every row sees
        if self.shape.causal and self.seen > known:
            future = torch.ones(
                self.last - self.first, self.seen - known, dtype=torch.bool, device=scores.device
            ).triu()
            scores.unflatten(1, (num_groups, -1))[..., known:].masked_fill_(future, float("-inf"))
        return scores


def _blocks(q: Tensor, k: Tensor, shape: Shape):
    buffers: dict[str, Tensor] = {}
    for first in reversed(
        range(0, q.shape[2], ROWS)
    ):  # the last block sees most: its buffers fit all
        last = min(first + ROWS, q.shape[2])
        yield _Block(
            first,
            last,
            min(k.shape[1], last + shape.offset) if shape.causal else k.shape[1],
            shape,
            buffers,
        )


def _by_key_head(k: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """(B, H, S, d) -> (B * H_kv, group, S, d), contiguous, in the precision of sums."""
    return [
        None
        if u is None
        else u.reshape(-1, u.shape[1] // k.shape[1], *u.shape[2:])
        .to(wide_dtype(u.dtype))
        .contiguous()
        for u in tensors
    ]


def _flat(*tensors: Tensor | None) -> list[Tensor | None]:
    """(B, H_kv, C, d) -> (B * H_kv, C, d), in the precision of sums."""
    return [
        None if u is None else u.reshape(-1, *u.shape[2:]).to(wide_dtype(u.dtype)) for u in tensors
    ]


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Row-wise inner product (..., 1)."""
    return (x * y).sum(-1, keepdim=True)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of sums and statistics: float32 for half precisions."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
