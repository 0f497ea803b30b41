"""The attention of this package in Triton: which kernels a level launches, and on what. The
kernels are in query_kernels.py, second_query_kernels.py and key_kernels.py.

    forward            _forward
    gradient           _gradient_query; _gradient_key over groups of own keys, and over the context
    double_backward    _tangent; _second_own, or _second_key over groups of own keys;
                       _second_query; _second_key over the context
    tangent            _tangent

No kernel writes where another program writes, so there are no atomics and results are the same
every time. A query's first weight comes from its own key, where it has a single one, else from
the first key that it sees.

float16 overflows above 65504: P Sdot, dS and Z are rounded to the inputs' type for the matrix
products, and grow with gradients and cotangents. Nothing checks for it, since that would wait for
the GPU. Steep energies (large steps, large losses) belong in bfloat16.
"""

from __future__ import annotations

from torch import Tensor

from ebwm_kernels.attention.key_kernels import _gradient_key, _second_key
from ebwm_kernels.attention.launches import Call, ready
from ebwm_kernels.attention.query_kernels import _forward, _gradient_query
from ebwm_kernels.attention.reference import Cotangents
from ebwm_kernels.attention.second_query_kernels import _second_own, _second_query, _tangent
from ebwm_kernels.attention.visibility import Shape


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_self: Tensor | None,
    v_self: Tensor | None,
    first_visible: Tensor | None,
    shape: Shape,
) -> tuple[Tensor, Tensor]:
    """As reference.forward."""
    call = Call(q, k, v, k_self, v_self, first_visible, shape)
    out, log_normalizer = call.like_outputs(), call.statistic()
    call.over_rows(
        _forward,
        call.q,
        call.k,
        call.v,
        call.k_self,
        call.v_self,
        call.first_visible,
        out,
        log_normalizer,
        OWN=call.own,
    )
    return out, log_normalizer


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
    """As reference.gradient."""
    call = Call(q, k, v, k_self, v_self, first_visible, shape)
    grad, out, log_normalizer = ready(grad), ready(out), ready(log_normalizer)
    dq, delta = call.like_queries(), call.statistic()
    dk_self = call.like_queries() if call.own else None
    dv_self = call.like_outputs() if call.own else None
    call.over_rows(
        _gradient_query,
        call.q,
        call.k,
        call.v,
        call.k_self,
        call.v_self,
        call.first_visible,
        out,
        log_normalizer,
        grad,
        dq,
        dk_self,
        dv_self,
        delta,
        OWN=call.own,
    )
    if call.own_groups:
        call.over_own_keys(
            _gradient_key,
            call.q,
            call.k_self,
            call.v_self,
            None,
            log_normalizer,
            grad,
            delta,
            dk_self,
            dv_self,
        )
    dk = call.like_keys() if with_keys else None
    dv = call.like_values() if with_keys else None
    if with_keys:
        call.over_keys(
            _gradient_key,
            call.q,
            call.k,
            call.v,
            call.last_row,
            log_normalizer,
            grad,
            delta,
            dk,
            dv,
        )
    return dq, dk, dv, dk_self, dv_self


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
    """As reference.tangent."""
    call = Call(q, k, v, k_self, v_self, first_visible, shape)
    return _tangent_of(call, _ready(tangents), None, ready(out), ready(log_normalizer), None)


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
    """As reference.double_backward."""
    call = Call(q, k, v, k_self, v_self, first_visible, shape)
    grad, out, log_normalizer = ready(grad), ready(out), ready(log_normalizer)
    cotangents = _ready(cotangents)
    a, b, c, b_self, c_self = cotangents
    has_keys = b is not None
    mu, phi, delta = call.statistic(), call.statistic(), call.statistic()
    g_grad = _tangent_of(call, cotangents, grad, out, log_normalizer, (mu, phi, delta))
    statistics = (mu, phi, delta)
    g_k_self = call.like_queries() if call.own else None
    g_v_self = call.like_outputs() if call.own else None
    z = ds = None
    if call.own_groups:
        call.over_own_keys(
            _second_key,
            call.q,
            call.k_self,
            call.v_self,
            None,
            log_normalizer,
            grad,
            a,
            b_self,
            c_self,
            *statistics,
            g_k_self,
            g_v_self,
            KEYS=True,
        )
    elif call.own:
        z, ds = call.statistic(), call.statistic()
        call.over_rows(
            _second_own,
            call.q,
            call.k_self,
            call.v_self,
            log_normalizer,
            grad,
            a,
            b_self,
            c_self,
            *statistics,
            g_k_self,
            g_v_self,
            z,
            ds,
        )
    g_q = call.like_queries()
    call.over_rows(
        _second_query,
        call.q,
        call.k,
        call.v,
        call.k_self,
        call.v_self,
        call.first_visible,
        log_normalizer,
        grad,
        a,
        b,
        c,
        b_self,
        c_self,
        *statistics,
        z,
        ds,
        g_q,
        OWN=call.own,
        KEYS=has_keys,
        with_keys=has_keys,
    )
    g_k, g_v = call.like_keys(), call.like_values()
    call.over_keys(
        _second_key,
        call.q,
        call.k,
        call.v,
        call.last_row,
        log_normalizer,
        grad,
        a,
        b,
        c,
        *statistics,
        g_k,
        g_v,
        KEYS=has_keys,
        with_keys=has_keys,
    )
    return g_grad, g_q, g_k, g_v, g_k_self, g_v_self


def _ready(cotangents: Cotangents) -> Cotangents:
    return Cotangents(
        ready(cotangents.query),
        ready(cotangents.key),
        ready(cotangents.value),
        ready(cotangents.k_self),
        ready(cotangents.v_self),
    )


def _tangent_of(
    call: Call,
    tangents: Cotangents,
    grad: Tensor | None,
    out: Tensor,
    log_normalizer: Tensor,
    statistics: tuple[Tensor, Tensor, Tensor] | None,
) -> Tensor:
    """The tangent of O; with `statistics`, which it fills, for the double backward of `grad`."""
    moved = call.like_outputs()
    has_keys = tangents.key is not None
    call.over_rows(
        _tangent,
        call.q,
        call.k,
        call.v,
        call.k_self,
        call.v_self,
        call.first_visible,
        out,
        log_normalizer,
        grad,
        *tangents,
        moved,
        *(statistics or (None, None, None)),
        OWN=call.own,
        KEYS=has_keys,
        SECOND=statistics is not None,
        with_keys=has_keys,
    )
    return moved
