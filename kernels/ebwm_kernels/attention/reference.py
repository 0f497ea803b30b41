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

from collections.abc import Iterator
from typing import NamedTuple, overload

import torch
from torch import Tensor

from ebwm_kernels.attention.visibility import Shape

# query rows of a block: a block of scores stays in a CPU's cache, and few of its columns are in the
# future
ROWS = 64


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
    """(O (B, H, S, d), L (B, H, S) in the precision of statistics)."""
    _not_yet(first_visible, shape)
    q4 = _by_key_head(q, k)
    ks = _by_key_head(k_self, k)
    vs = _by_key_head(v_self, k)
    k3 = _flat(k)
    v3 = _flat(v)
    out = torch.empty_like(q4)
    log_normalizer = q4.new_empty(*q4.shape[:-1], 1)
    own = None
    if ks is not None:
        own = _dot(q4, ks).mul_(shape.scale)
    for block in _blocks(q4, k3, shape):
        weights = block.scores(q4, k3)
        if own is None or vs is None:
            row_max = weights.amax(-1, keepdim=True)
            weights = weights.sub_(row_max).exp_()
            total = weights.sum(-1, keepdim=True)
            mixed = block.product("mixed", weights, block.keys(v3))
        else:
            own_score = block.rows(own)
            row_max = own_score
            if block.seen:
                row_max = torch.maximum(weights.amax(-1, keepdim=True), own_score)
            weights = weights.sub_(row_max).exp_()
            own_weight = (own_score - row_max).exp_()
            total = weights.sum(-1, keepdim=True).add_(own_weight)
            mixed = block.product("mixed", weights, block.keys(v3))
            mixed.addcmul_(block.rows(vs), own_weight)
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
    first_visible: Tensor | None,
    out: Tensor,
    log_normalizer: Tensor,
    shape: Shape,
    *,
    with_keys: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dQ, dK, dV, dk*, dv*): dK and dV None without `with_keys`, dk* and dv* None without an own
    key.
    """
    _not_yet(first_visible, shape)
    grad4 = _by_key_head(grad, k)
    q4 = _by_key_head(q, k)
    ks = _by_key_head(k_self, k)
    vs = _by_key_head(v_self, k)
    out4 = _by_key_head(out, k)
    k3 = _flat(k)
    v3 = _flat(v)
    scale = shape.scale
    log_normalizer = log_normalizer.reshape(*q4.shape[:-1], 1)
    dq = torch.empty_like(q4)
    dk = torch.zeros_like(k3) if with_keys else None
    dv = torch.zeros_like(v3) if with_keys else None
    D = _dot(grad4, out4)
    for block in _blocks(q4, k3, shape):
        Q, G = block.rows(q4), block.rows(grad4)
        P = block.weights(q4, k3, log_normalizer)
        dS = block.product("dP", G, block.keys(v3).mT).sub_(block.rows(D)).mul_(P)
        block.write(dq, block.product("moved", dS, block.keys(k3)), scale)
        if dk is not None and dv is not None:
            block.keys(dk).add_(block.product("keys", dS.mT, Q), alpha=scale)
            block.keys(dv).add_(block.product("keys", P.mT, G))
    dk_self = None
    dv_self = None
    if ks is not None and vs is not None:
        own_weight = _dot(q4, ks).mul_(scale).sub_(log_normalizer).exp_()
        own_dS = _dot(grad4, vs).sub_(D).mul_(own_weight).mul_(scale)
        dq.addcmul_(ks, own_dS)
        dk_self = own_dS * q4
        dv_self = own_weight * grad4
    return (
        _shaped_as(q, dq),
        _shaped_as(k, dk),
        _shaped_as(v, dv),
        _shaped_as(q, dk_self),
        _shaped_as(q, dv_self),
    )


class _OwnKeys(NamedTuple):
    """What the double backward knows of the queries' own keys before its blocks of rows.

    key (without the mean of the others), value, and the cotangents b*, c*: (N, group, S, d).
    weight p*, tangent sd* / s, dP_minus_D dp* - D, grad_c G.c*: (N, group, S, 1). centred
    p* (sd* - mu) and Z: the same, filled by the blocks.
    """

    key: Tensor
    value: Tensor
    b: Tensor
    c: Tensor
    weight: Tensor
    tangent: Tensor
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
    """(gG, gQ, gK, gV, gk*, gv*), the last two None without an own key.

    Sdot, mu and Z here are those above over s.

    Keys enter Sdot and gQ without their mean: Sdot - mu does not see what all keys of a row share,
    and Z of a row sums to zero. Exact, and it keeps a large common vector out of the rounding.
    """
    _not_yet(first_visible, shape)
    a = _by_key_head(cotangents.query, k)
    b_self = _by_key_head(cotangents.k_self, k)
    c_self = _by_key_head(cotangents.v_self, k)
    grad4 = _by_key_head(grad, k)
    q4 = _by_key_head(q, k)
    ks = _by_key_head(k_self, k)
    vs = _by_key_head(v_self, k)
    out4 = _by_key_head(out, k)
    k3 = _flat(k)
    v3 = _flat(v)
    b = _flat(cotangents.key)
    c = _flat(cotangents.value)
    scale = shape.scale
    log_normalizer = log_normalizer.reshape(*q4.shape[:-1], 1)
    mean = k3.mean(1, keepdim=True)
    k3_centred = k3 - mean
    g_grad = torch.empty_like(q4)
    g_q = torch.empty_like(q4)
    g_k = torch.zeros_like(k3)
    g_v = torch.zeros_like(v3)
    D = _dot(grad4, out4)
    own = None
    if ks is not None and vs is not None:
        if b_self is None or c_self is None:
            raise ValueError("double_backward: an own key needs both of its cotangents")
        weight = _dot(q4, ks).mul_(scale).sub_(log_normalizer).exp_()
        ks_centred = ks - mean[:, None]
        own = _OwnKeys(
            key=ks_centred,
            value=vs,
            b=b_self,
            c=c_self,
            weight=weight,
            tangent=_dot(a, ks_centred).add_(_dot(q4, b_self)),
            dP_minus_D=_dot(grad4, vs).sub_(D),
            grad_c=_dot(grad4, c_self),
            centred=torch.empty_like(log_normalizer),
            Z=torch.empty_like(log_normalizer),
        )
    for block in _blocks(q4, k3, shape):
        Q, G, A = block.rows(q4), block.rows(grad4), block.rows(a)
        K, V = block.keys(k3_centred), block.keys(v3)
        P = block.weights(q4, k3, log_normalizer)
        tangent = block.product("centred", A, K.mT)
        if b is not None:
            tangent.add_(block.product("cross", Q, block.keys(b).mT))
        centred = tangent.mul_(P)
        mu = centred.sum(-1, keepdim=True)
        if own is not None:
            mu.addcmul_(block.rows(own.weight), block.rows(own.tangent))
        centred.addcmul_(P, mu, value=-1)  # P (Sdot - mu)
        # (P Sdot) V + p* sd* v* - mu O, with sum P = 1: the centred weights already hold the -mu O
        moved = block.product("moved", centred, V)
        own_centred = None
        if own is None:
            moved.mul_(scale)
        else:
            own_weight = block.rows(own.weight)
            own_centred = (block.rows(own.tangent) - mu).mul_(own_weight)
            moved.addcmul_(block.rows(own.value), own_centred).mul_(scale)
            moved.addcmul_(block.rows(own.c), own_weight)
            block.write(own.centred, own_centred, scale)
        if c is not None:
            moved.add_(block.product("mixed", P, block.keys(c)))
        phi = _dot(G, moved)
        block.write(g_grad, moved)
        dP_minus_D = block.product("dP", G, V.mT).sub_(block.rows(D))
        dS = torch.mul(dP_minus_D, P, out=block.scratch("dS", P.shape, P))
        Z = dP_minus_D.mul_(centred).addcmul_(P, phi / -scale)
        if c is not None:
            Z.addcmul_(P, block.product("cross", G, block.keys(c).mT), value=1 / scale)
        block.write(g_q, block.product("moved", Z, K), scale**2)
        if b is not None:
            block.add(g_q, block.product("moved", dS, block.keys(b)), scale)
        if own is not None and own_centred is not None:
            own_Z = (block.rows(own.grad_c) - phi).mul_(block.rows(own.weight))
            own_Z.add_(own_centred * block.rows(own.dP_minus_D), alpha=scale)
            block.write(own.Z, own_Z)
        block.keys(g_k).add_(block.product("keys", Z.mT, Q), alpha=scale**2).add_(
            block.product("keys", dS.mT, A), alpha=scale
        )
        block.keys(g_v).add_(block.product("keys", centred.mT, G), alpha=scale)
    g_k_self = None
    g_v_self = None
    if own is not None:
        own.Z.mul_(scale)
        own_dS = own.dP_minus_D.mul_(own.weight).mul_(scale)
        g_q.addcmul_(own.key, own.Z).addcmul_(own.b, own_dS)
        g_k_self = torch.addcmul(own.Z * q4, a, own_dS)
        g_v_self = own.centred * grad4
    return (
        _shaped_as(q, g_grad),
        _shaped_as(q, g_q),
        _shaped_as(k, g_k),
        _shaped_as(v, g_v),
        _shaped_as(q, g_k_self),
        _shaped_as(q, g_v_self),
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
    """Tangent of O for tangents of Q, K, V, k*, v*: gG of the formulas with these as A, B, C, b*,
    c*.
    """
    raise NotImplementedError


def _not_yet(first_visible: Tensor | None, shape: Shape) -> None:
    if first_visible is not None or shape.group_size > 1 or shape.context_group > 1:
        raise NotImplementedError


class _Block:
    """Query rows first .. last - 1 of every head, and the keys that the last of them sees.

    Heads of a group share one product.
    """

    def __init__(self, first: int, last: int, seen: int, shape: Shape, buffers: dict[str, Tensor]):
        self.first = first
        self.last = last
        self.seen = seen
        self.shape = shape
        self.buffers = buffers

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


def _blocks(q: Tensor, k: Tensor, shape: Shape) -> Iterator[_Block]:
    buffers: dict[str, Tensor] = {}
    # The last block comes first: it sees most, so its buffers fit all.
    for first in reversed(range(0, q.shape[2], ROWS)):
        last = min(first + ROWS, q.shape[2])
        seen = k.shape[1]
        if shape.causal:
            seen = min(seen, last + shape.offset)
        yield _Block(first, last, seen, shape, buffers)


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
def _shaped_as(like: Tensor, x: None) -> None: ...
def _shaped_as(like: Tensor, x: Tensor | None) -> Tensor | None:
    """A result in the shape and precision of the tensor it is the gradient of."""
    if x is None:
        return None
    return x.to(like.dtype).view(like.shape)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Row-wise inner product (..., 1)."""
    return (x * y).sum(-1, keepdim=True)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of sums and statistics: float32 for half precisions."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
