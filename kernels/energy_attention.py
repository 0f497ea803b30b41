"""Attention of the predicted stream: every query sees a causal context and one key of its own, under a single softmax.

    p_t attends to  o_1 .. o_(t + offset)  and to itself:   softmax([q_t k_1, .., q_t k_(t + offset), q_t k*_t]) [v_1, .., v*_t]

The observed stream never enters as a query, so its keys and values are ordinary first-order tensors: the inner gradient of a
refinement step runs through q, k* and v* only, and the context's keys and values collect their gradients in the outer pass.

Three levels, each of which keeps row statistics and recomputes the weights, so that no S x C tensor outlives a block of rows:
    forward          O, L = logsumexp of a row's scores
    inner gradient   dq, dk*, dv* of a cotangent G on O, itself differentiable
    double backward  the gradients of <A, dq> + <B*, dk*> + <C*, dv*>; a third derivative raises

With s the scale, P = exp(S - L), D = rowsum(G O), dP = G V', dS = P (dP - D), and * for the own column (all products without a sign are
elementwise):
    dq = s (dS K + ds* k*)      dk* = s ds* q      dv* = p* G      dK = s dS' q      dV = P' G
    Sdot = s A K'     sd* = s (A.k* + q.B*)     mu = rowsum(P Sdot) + p* sd*
    dG   = (P Sdot) V + p* (sd* v* + C*) - mu O                         phi = rowsum(G dG)
    Z    = P ((Sdot - mu) (dP - D) - phi)     z* = p* ((sd* - mu) (dp* - D) + G.C* - phi)
    gq   = s (Z K + z* k* + ds* B*)   gk* = s (z* q + ds* A)   gv* = p* (sd* - mu) G
    gK   = s (Z' q + dS' A)           gV  = (P (Sdot - mu))' G
"""
from __future__ import annotations

import torch
from torch import Tensor

from .contract import is_inner_gradient, refuse_graph

BACKENDS = ("auto", "reference")
ROWS = 128          # query rows of a block: a block of scores stays in a CPU's cache, and later blocks skip no more than half a block


def energy_attention(q: Tensor, k_self: Tensor, v_self: Tensor, k_context: Tensor, v_context: Tensor, *,
                     scale: float | None = None, context_offset: int = 0, backend: str = "auto") -> Tensor:
    """Output (B, H, S, d) of the predicted stream's attention, differentiable twice with respect to all five tensors.

    q, k_self, v_self: (B, H, S, d); k_context, v_context: (B, H_kv, C, d) with H % H_kv == 0; one floating dtype and device.
    Query t sees context keys j <= t + context_offset, and its own key. scale: default d ** -0.5.

    Contract (contract.py): a backward under create_graph=True is the inner gradient of a refinement step. It yields the gradients of q,
    k_self and v_self, and none for the context; those come, from both levels, with the ordinary backward. A third derivative raises.
    Raises ValueError for shapes, dtypes or a backend that do not fit.
    """
    _check(q, k_self, v_self, k_context, v_context, context_offset, backend)
    return _Attention.apply(q, k_self, v_self, k_context, v_context, q.shape[-1] ** -0.5 if scale is None else scale, context_offset)


def energy_attention_definition(q: Tensor, k_self: Tensor, v_self: Tensor, k_context: Tensor, v_context: Tensor, *,
                                scale: float | None = None, context_offset: int = 0) -> Tensor:
    """The definition in plain operations, for tests and readers."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys, values = (u.repeat_interleave(q.shape[1] // u.shape[1], 1) for u in (k_context, v_context))
    scores = scale * q @ keys.transpose(-1, -2)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(context_offset + 1)
    own = scale * (q * k_self).sum(-1, keepdim=True)
    weights = torch.cat([own, scores.masked_fill(future, float("-inf"))], -1).softmax(-1)
    return weights[..., 1:] @ values + weights[..., :1] * v_self


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k_self, v_self, k_context, v_context, scale, offset):
        out, log_normalizer = torch.empty_like(v_self), q.new_empty(q.shape[:-1], dtype=_wide(q.dtype))
        for block in _blocks(q, k_context, scale, offset):
            own = scale * _dot(block.rows(q), block.rows(k_self))
            scores = block.scores(q)
            row_max = torch.maximum(scores.amax(-1, keepdim=True), own) if block.seen else own
            weights, own_weight = (scores - row_max).exp_(), (own - row_max).exp_()
            total = weights.sum(-1, keepdim=True) + own_weight
            mixed = weights.to(q.dtype) @ block.keys(v_context) + own_weight * block.rows(v_self)
            block.write(out, mixed / total)
            block.write(log_normalizer.unsqueeze(-1), row_max + total.log())
        ctx.save_for_backward(q, k_self, v_self, k_context, v_context, out, log_normalizer)
        ctx.scale, ctx.offset = scale, offset
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k_self, v_self, k_context, v_context, out, log_normalizer = ctx.saved_tensors
        if is_inner_gradient():
            return *_InnerGradient.apply(grad, q, k_self, v_self, k_context, v_context, out.detach(), log_normalizer, ctx.scale, ctx.offset), \
                None, None, None, None
        return *_first_order(grad, q, k_self, v_self, k_context, v_context, out, log_normalizer, ctx.scale, ctx.offset,
                             with_context=ctx.needs_input_grad[3] or ctx.needs_input_grad[4]), None, None


class _InnerGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, q, k_self, v_self, k_context, v_context, out, log_normalizer, scale, offset):
        ctx.save_for_backward(grad, q, k_self, v_self, k_context, v_context, out, log_normalizer)
        ctx.scale, ctx.offset = scale, offset
        ctx.set_materialize_grads(False)
        return _first_order(grad, q, k_self, v_self, k_context, v_context, out, log_normalizer, scale, offset, with_context=False)[:3]

    @staticmethod
    def backward(ctx, a, b_self, c_self):
        refuse_graph("energy_attention")
        if a is None and b_self is None and c_self is None:
            return (None,) * 10
        q = ctx.saved_tensors[1]
        a, b_self, c_self = (torch.zeros_like(q) if u is None else u for u in (a, b_self, c_self))
        return *_second_order(a, b_self, c_self, *ctx.saved_tensors, ctx.scale, ctx.offset), None, None, None, None


def _first_order(grad, q, k_self, v_self, k_context, v_context, out, log_normalizer, scale, offset, *, with_context: bool):
    """(dq, dk*, dv*, dK or None, dV or None)."""
    dq, dk_self, dv_self = torch.empty_like(q), torch.empty_like(q), torch.empty_like(v_self)
    dk, dv = (torch.zeros(u.shape, dtype=_wide(u.dtype), device=u.device) if with_context else None for u in (k_context, v_context))
    for block in _blocks(q, k_context, scale, offset):
        Q, G, own_key, own_value = (block.rows(u) for u in (q, grad, k_self, v_self))
        L, D = block.rows(log_normalizer.unsqueeze(-1)), _dot(G, block.rows(out))
        own_weight = (scale * _dot(Q, own_key) - L).exp_()
        own_slope = own_weight * (_dot(G, own_value) - D)
        P = (block.scores(q) - L).exp_()
        dS = ((G @ block.keys(v_context).transpose(-1, -2)).to(P.dtype) - D).mul_(P).to(q.dtype)
        block.write(dq, scale * (dS @ block.keys(k_context) + own_slope * own_key))
        block.write(dk_self, scale * own_slope * Q)
        block.write(dv_self, own_weight * G)
        if with_context:
            block.keys(dk).add_(dS.transpose(-1, -2) @ Q, alpha=scale)
            block.keys(dv).add_(P.to(q.dtype).transpose(-1, -2) @ G)
    return dq, dk_self, dv_self, *(None if u is None else u.to(q.dtype) for u in (dk, dv))


def _second_order(a, b_self, c_self, grad, q, k_self, v_self, k_context, v_context, out, log_normalizer, scale, offset):
    """Gradients of <a, dq> + <b*, dk*> + <c*, dv*> with respect to (G, q, k*, v*, K, V)."""
    g_grad, g_q, g_k_self, g_v_self = (torch.empty_like(u) for u in (grad, q, k_self, v_self))
    g_k, g_v = (torch.zeros(u.shape, dtype=_wide(u.dtype), device=u.device) for u in (k_context, v_context))
    for block in _blocks(q, k_context, scale, offset):
        Q, G, A, B, C, O, own_key, own_value = (block.rows(u) for u in (q, grad, a, b_self, c_self, out, k_self, v_self))
        K, V = block.keys(k_context), block.keys(v_context)
        L, D = block.rows(log_normalizer.unsqueeze(-1)), _dot(G, O)
        own_weight = (scale * _dot(Q, own_key) - L).exp_()
        own_tangent = scale * (_dot(A, own_key) + _dot(Q, B))
        own_slope = _dot(G, own_value) - D
        P = (block.scores(q) - L).exp_()
        tangent = (A @ K.transpose(-1, -2)).to(P.dtype).mul_(scale)                     # Sdot
        mu = (P * tangent).sum(-1, keepdim=True) + own_weight * own_tangent
        centred, own_centred = tangent.sub_(mu).mul_(P), own_weight * (own_tangent - mu)       # P (Sdot - mu)
        # (P Sdot) V + p* sd* v* - mu O, with sum P = 1: the centred weights already hold the -mu O
        moved = centred.to(q.dtype) @ V + own_centred * own_value + own_weight * C
        phi = _dot(G, moved)
        slope = (G @ V.transpose(-1, -2)).to(P.dtype) - D                               # dP - D
        Z = (centred * slope).addcmul_(P, phi, value=-1).to(q.dtype)
        own_Z = own_centred * own_slope + own_weight * (_dot(G, C) - phi)
        dS, own_dS = slope.mul_(P).to(q.dtype), own_weight * own_slope
        block.write(g_grad, moved)
        block.write(g_q, scale * (Z @ K + own_Z * own_key + own_dS * B))
        block.write(g_k_self, scale * (own_Z * Q + own_dS * A))
        block.write(g_v_self, own_centred * G)
        block.keys(g_k).add_(Z.transpose(-1, -2) @ Q + dS.transpose(-1, -2) @ A, alpha=scale)
        block.keys(g_v).add_(centred.to(q.dtype).transpose(-1, -2) @ G)
    return g_grad, g_q, g_k_self, g_v_self, g_k.to(q.dtype), g_v.to(q.dtype)


class _Block:
    """Query rows first .. last - 1 of every head, and the context keys the last of them sees; heads of a group share one product."""

    def __init__(self, first: int, last: int, seen: int, q: Tensor, k_context: Tensor, scale: float, offset: int):
        self.first, self.last, self.seen, self.scale, self.offset = first, last, seen, scale, offset
        self.k_context, self.groups = k_context, q.shape[1] // k_context.shape[1]

    def rows(self, x: Tensor) -> Tensor:
        """(B, H, S, n) -> (B, H_kv, group * rows, n)."""
        x = x[:, :, self.first:self.last]
        return x if self.groups == 1 else x.unflatten(1, (-1, self.groups)).flatten(2, 3)

    def write(self, x: Tensor, rows: Tensor) -> None:
        """The inverse: put (B, H_kv, group * rows, n) where they belong."""
        if self.groups > 1:
            rows = rows.unflatten(2, (self.groups, -1)).flatten(1, 2)
        x[:, :, self.first:self.last] = rows

    def keys(self, x: Tensor) -> Tensor:
        """The context rows that are seen, (B, H_kv, seen, d)."""
        return x[:, :, :self.seen]

    def scores(self, q: Tensor) -> Tensor:
        """scale * q K' (B, H_kv, group * rows, seen), -inf where the future is."""
        scores = (self.rows(q) @ self.keys(self.k_context).transpose(-1, -2)).to(_wide(q.dtype)).mul_(self.scale)
        if self.seen > self.first + self.offset + 1:
            last_seen = torch.arange(self.first, self.last, device=q.device)[:, None] + self.offset
            future = torch.arange(self.seen, device=q.device) > last_seen
            scores.unflatten(2, (self.groups, -1)).masked_fill_(future, float("-inf"))
        return scores


def _blocks(q: Tensor, k_context: Tensor, scale: float, offset: int):
    for first in range(0, q.shape[2], ROWS):
        last = min(first + ROWS, q.shape[2])
        yield _Block(first, last, min(k_context.shape[2], last + offset), q, k_context, scale, offset)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Row-wise inner product (..., 1), in the precision of statistics."""
    return (x * y).sum(-1, keepdim=True, dtype=_wide(x.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The precision of sums and statistics: float32 for half precisions."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _check(q: Tensor, k_self: Tensor, v_self: Tensor, k_context: Tensor, v_context: Tensor, offset: int, backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"energy_attention: backend is {backend!r}; allowed: {', '.join(BACKENDS)}")
    own = {"q": q, "k_self": k_self, "v_self": v_self}
    context = {"k_context": k_context, "v_context": v_context}
    for name, tensor in {**own, **context}.items():
        if tensor.ndim != 4:
            raise ValueError(f"energy_attention: {name} has shape {tuple(tensor.shape)}; expected 4 dimensions (batch, heads, positions, head dimension)")
        if tensor.dtype != q.dtype or tensor.device != q.device or not q.dtype.is_floating_point:
            raise ValueError(f"energy_attention: {name} is {tensor.dtype} on {tensor.device}, q is {q.dtype} on {q.device}; "
                             "all five must share one floating dtype and one device")
    for name, tensor in own.items():
        if tensor.shape != q.shape:
            raise ValueError(f"energy_attention: {name} has shape {tuple(tensor.shape)}, q has {tuple(q.shape)}; they must be equal")
    B, H, S, d = q.shape
    if k_context.shape != v_context.shape or k_context.shape[0] != B or k_context.shape[3] != d:
        raise ValueError(f"energy_attention: k_context has shape {tuple(k_context.shape)} and v_context {tuple(v_context.shape)}; "
                         f"q {tuple(q.shape)} needs both to be ({B}, H_kv, C, {d})")
    if k_context.shape[1] == 0 or H % k_context.shape[1]:
        raise ValueError(f"energy_attention: {k_context.shape[1]} key/value heads for {H} query heads; must divide them")
    if offset < 0:
        raise ValueError(f"energy_attention: context_offset is {offset}; must be 0 or more")
