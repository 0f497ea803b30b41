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

Inside, tensors are (N, group, S, d) and (N, C, d) with N = B * H_kv: heads that share keys are rows of one product. What is S x C is
touched as few times as possible and in place; scales go to what is S x d.
"""
from __future__ import annotations

import torch
from torch import Tensor

from .contract import is_inner_gradient, refuse_graph

BACKENDS = ("auto", "reference")
ROWS = 64           # query rows of a block: a block of scores stays in a CPU's cache, and few of its columns are in the future


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
    own = (u.reshape(-1, q.shape[1] // k_context.shape[1], *q.shape[2:]) for u in (q, k_self, v_self))
    context = (u.reshape(-1, *u.shape[2:]) for u in (k_context, v_context))
    return _Attention.apply(*own, *context, q.shape[-1] ** -0.5 if scale is None else scale, context_offset).view(q.shape)


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
        out, log_normalizer = torch.empty_like(v_self), q.new_empty((*q.shape[:-1], 1), dtype=_wide(q.dtype))
        own = _dot(q, k_self).mul_(scale)
        for block in _blocks(q, k_context, scale, offset):
            own_score, weights = block.rows(own), block.scores(q, k_context)
            row_max = torch.maximum(weights.amax(-1, keepdim=True), own_score) if block.seen else own_score
            weights, own_weight = weights.sub_(row_max).exp_(), (own_score - row_max).exp_()
            total = weights.sum(-1, keepdim=True).add_(own_weight)
            mixed = block.product("mixed", weights, block.keys(v_context)).addcmul_(_widen(block.rows(v_self)), own_weight)
            block.write(out, mixed.div_(total))
            block.write(log_normalizer, total.log_().add_(row_max))
        ctx.save_for_backward(q, k_self, v_self, k_context, v_context, out, log_normalizer)
        ctx.scale, ctx.offset = scale, offset
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k_self, v_self, k_context, v_context, out, log_normalizer = ctx.saved_tensors
        if is_inner_gradient():
            inner = _InnerGradient.apply(grad, q, k_self, v_self, k_context, v_context, out.detach(), log_normalizer, ctx.scale, ctx.offset)
            return *inner, None, None, None, None
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
        saved = ctx.saved_tensors           # read once: a checkpoint recomputes for each reading
        a, b_self, c_self = (torch.zeros_like(saved[1]) if u is None else u for u in (a, b_self, c_self))
        return *_second_order(a, b_self, c_self, *saved, ctx.scale, ctx.offset), None, None, None, None


def _first_order(grad, q, k_self, v_self, k_context, v_context, out, log_normalizer, scale, offset, *, with_context: bool):
    """(dq, dk*, dv*, dK or None, dV or None)."""
    grad = grad.contiguous()
    dq = torch.empty(q.shape, dtype=_wide(q.dtype), device=q.device)
    dk, dv = (torch.zeros(u.shape, dtype=_wide(u.dtype), device=u.device) if with_context else None for u in (k_context, v_context))
    D = _dot(grad, out)
    own_weight = _dot(q, k_self).mul_(scale).sub_(log_normalizer).exp_()
    own_slope = _dot(grad, v_self).sub_(D).mul_(own_weight).mul_(scale)
    for block in _blocks(q, k_context, scale, offset):
        Q, G = block.rows(q), block.rows(grad)
        P = block.weights(q, k_context, log_normalizer)
        dS = block.product("slope", G, block.keys(v_context).mT).sub_(block.rows(D)).mul_(P)
        block.write(dq, block.product("moved", dS, block.keys(k_context)), scale)
        if with_context:
            block.keys(dk).add_(block.product("keys", dS.mT, Q), alpha=scale)
            block.keys(dv).add_(block.product("keys", P.mT, G))
    dq.addcmul_(_widen(k_self), own_slope)
    return tuple(None if u is None else u.to(q.dtype) for u in (dq, own_slope * q, own_weight * grad, dk, dv))


def _second_order(a, b_self, c_self, grad, q, k_self, v_self, k_context, v_context, out, log_normalizer, scale, offset):
    """Gradients of <a, dq> + <b*, dk*> + <c*, dv*> with respect to (G, q, k*, v*, K, V). Sdot, mu, Z here are those above over s."""
    a, b_self, c_self, grad = (u.contiguous() for u in (a, b_self, c_self, grad))
    wide = {"dtype": _wide(q.dtype), "device": q.device}
    g_grad, g_q = torch.empty(q.shape, **wide), torch.empty(q.shape, **wide)
    own_centred, own_Z = torch.empty_like(log_normalizer), torch.empty_like(log_normalizer)
    g_k, g_v = torch.zeros(k_context.shape, **wide), torch.zeros(v_context.shape, **wide)
    D = _dot(grad, out)
    own_weight = _dot(q, k_self).mul_(scale).sub_(log_normalizer).exp_()
    own_tangent = _dot(a, k_self).add_(_dot(q, b_self))                                 # sd*
    own_slope = _dot(grad, v_self).sub_(D)                                              # dp* - D
    grad_c = _dot(grad, c_self)
    for block in _blocks(q, k_context, scale, offset):
        Q, G, A = (block.rows(u) for u in (q, grad, a))
        K, V = block.keys(k_context), block.keys(v_context)
        weight, tangent = block.rows(own_weight), block.rows(own_tangent)
        P = block.weights(q, k_context, log_normalizer)
        centred = block.product("centred", A, K.mT).mul_(P)
        mu = torch.addcmul(centred.sum(-1, keepdim=True), weight, tangent)
        centred.addcmul_(P, mu, value=-1)                                               # P (Sdot - mu)
        centred_own = tangent.sub(mu).mul_(weight)
        # (P Sdot) V + p* sd* v* - mu O, with sum P = 1: the centred weights already hold the -mu O
        moved = block.product("moved", centred, V).addcmul_(_widen(block.rows(v_self)), centred_own)
        moved = moved.mul_(scale).addcmul_(_widen(block.rows(c_self)), weight)
        phi = _dot(G, moved)
        slope = block.product("slope", G, V.mT).sub_(block.rows(D))                     # dP - D
        dS = torch.mul(slope, P, out=block.scratch("dS", P.shape, P))
        Z = slope.mul_(centred).addcmul_(P, phi / -scale)
        block.write(g_grad, moved)
        block.write(g_q, block.product("moved", Z, K), scale**2)
        block.write(own_centred, centred_own, scale)
        block.write(own_Z, (block.rows(grad_c) - phi).mul_(weight).add_(centred_own * block.rows(own_slope), alpha=scale))
        block.keys(g_k).add_(block.product("keys", Z.mT, Q), alpha=scale**2).add_(block.product("keys", dS.mT, A), alpha=scale)
        block.keys(g_v).add_(block.product("keys", centred.mT, G), alpha=scale)
    own_Z.mul_(scale)
    own_dS = own_slope.mul_(own_weight).mul_(scale)
    g_q.addcmul_(_widen(k_self), own_Z).addcmul_(_widen(b_self), own_dS)
    g_k_self = torch.addcmul(own_Z * q, _widen(a), own_dS)
    return tuple(u.to(q.dtype) for u in (g_grad, g_q, g_k_self, own_centred * grad, g_k, g_v))


class _Block:
    """Query rows first .. last - 1 of every head, and the context keys the last of them sees; heads of a group share one product."""

    def __init__(self, first: int, last: int, seen: int, scale: float, offset: int, buffers: dict[tuple, Tensor]):
        self.first, self.last, self.seen, self.scale, self.offset, self.buffers = first, last, seen, scale, offset, buffers

    def rows(self, x: Tensor) -> Tensor:
        """(N, group, S, n) -> (N, group * rows, n)."""
        return x[:, :, self.first:self.last].flatten(1, 2)

    def write(self, x: Tensor, rows: Tensor, factor: float = 1.0) -> None:
        """The inverse: put factor * (N, group * rows, n) where they belong."""
        place = x[:, :, self.first:self.last]
        rows = rows.view(place.shape)
        place.copy_(rows) if factor == 1 else torch.mul(_widen(rows), factor, out=place)

    def keys(self, x: Tensor) -> Tensor:
        """The context rows that are seen, (N, seen, d)."""
        return x[:, :self.seen]

    def scratch(self, name: str, shape: torch.Size, like: Tensor) -> Tensor:
        """Memory that the next block uses again: it is still in the cache, and the allocator's holes stay few."""
        buffer, numel = self.buffers.get((name, like.dtype)), shape.numel()
        if buffer is None or buffer.numel() < numel:
            buffer = self.buffers[name, like.dtype] = like.new_empty(numel)
        return buffer[:numel].view(shape)

    def product(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """left @ right in scratch memory: computed in right's precision, returned in that of statistics."""
        out = self.scratch(name, torch.Size((*left.shape[:2], right.shape[2])), right)
        return _widen(torch.bmm(left.to(right.dtype), right, out=out))

    def scores(self, q: Tensor, k_context: Tensor) -> Tensor:
        """scale * q K' (N, group * rows, seen), -inf where the future is."""
        return self._mask(self.product("P", self.rows(q), self.keys(k_context).mT).mul_(self.scale), q.shape[1])

    def weights(self, q: Tensor, k_context: Tensor, log_normalizer: Tensor) -> Tensor:
        """P (N, group * rows, seen) = exp(scale * q K' - L), 0 where the future is."""
        scores = self.product("P", self.rows(q), self.keys(k_context).mT)
        return self._mask(torch.add(-self.rows(log_normalizer), scores, alpha=self.scale, out=scores), q.shape[1]).exp_()

    def _mask(self, scores: Tensor, num_groups: int) -> Tensor:
        """scores (N, group * rows, seen) with -inf where the future is."""
        known = self.first + self.offset + 1                # these columns every row sees
        if self.seen > known:
            future = torch.ones(self.last - self.first, self.seen - known, dtype=torch.bool, device=scores.device).triu()
            scores.unflatten(1, (num_groups, -1))[..., known:].masked_fill_(future, float("-inf"))
        return scores


def _blocks(q: Tensor, k_context: Tensor, scale: float, offset: int):
    buffers: dict[tuple, Tensor] = {}
    for first in reversed(range(0, q.shape[2], ROWS)):          # the last block sees most: its buffers fit all
        last = min(first + ROWS, q.shape[2])
        yield _Block(first, last, min(k_context.shape[1], last + offset), scale, offset, buffers)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Row-wise inner product (..., 1), in the precision of statistics."""
    return (x * y).sum(-1, keepdim=True, dtype=_wide(x.dtype))


def _widen(x: Tensor) -> Tensor:
    return x.to(_wide(x.dtype))


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
            raise ValueError(f"energy_attention: {name} has shape {tuple(tensor.shape)}; expected 4 dimensions "
                             "(batch, heads, positions, head dimension)")
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
