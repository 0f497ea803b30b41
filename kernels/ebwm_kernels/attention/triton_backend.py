"""The attention of this package in Triton: which kernels a level launches, and on what. The
kernels are in query_kernels.py, second_query_kernels.py and key_kernels.py.

    forward            _forward
    gradient           _gradient_query; _gradient_key over groups of own keys, and over the context
    double_backward    up: _tangent
                       down: _second_own, or _second_key over groups of own keys; _second_query;
                       _second_key over the context
    tangent            _tangent

Its second half takes the ordinary backward with it where that is at hand (joint.py).

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
from ebwm_kernels.attention.launches import Call, empty_for, ready
from ebwm_kernels.attention.query_kernels import _forward, _gradient_query
from ebwm_kernels.attention.second_query_kernels import _second_own, _second_query, _tangent
from ebwm_kernels.attention.tensors import (
    Cotangents,
    Gradients,
    Inputs,
    Output,
    SecondGradients,
    Statistics,
)
from ebwm_kernels.attention.visibility import Shape


def forward(inputs: Inputs, shape: Shape) -> Output:
    """As reference.forward."""
    call = Call(inputs, shape)
    output = Output(call.empty_output(), call.statistic())
    call.over_rows(_forward, *call.tensors, *output, OWN=call.own)
    return output


def gradient(
    grad: Tensor, inputs: Inputs, output: Output, shape: Shape, *, with_keys: bool
) -> Gradients:
    """As reference.gradient."""
    call = Call(inputs, shape)
    grad, out, log_normalizer = ready(grad), ready(output.out), ready(output.log_normalizer)
    result = Gradients(
        q=empty_for(inputs.q),
        k=empty_for(inputs.k) if with_keys else None,
        v=empty_for(inputs.v) if with_keys else None,
        k_self=empty_for(inputs.k_self),
        v_self=empty_for(inputs.v_self),
    )
    delta = call.statistic()
    call.over_rows(
        _gradient_query,
        *call.tensors,
        out,
        log_normalizer,
        grad,
        result.q,
        result.k_self,
        result.v_self,
        delta,
        OWN=call.own,
    )
    of_rows = (log_normalizer, grad, delta)
    if call.own_groups:
        call.over_own_keys(_gradient_key, *call.own_keys, *of_rows, result.k_self, result.v_self)
    if with_keys:
        call.over_keys(_gradient_key, *call.context_keys, *of_rows, result.k, result.v)
    return result


def tangent(tangents: Cotangents, inputs: Inputs, output: Output, shape: Shape) -> Tensor:
    """As reference.tangent."""
    call = Call(inputs, shape)
    moved = call.empty_output()
    _tangent_into(moved, call, tangents, None, output, None)
    return moved


def double_backward(
    cotangents: Cotangents, grad: Tensor, inputs: Inputs, output: Output, shape: Shape
) -> SecondGradients:
    """As reference.double_backward."""
    at = (inputs, output, shape)
    g_grad, statistics = double_backward_up(cotangents, grad, *at)
    rest = double_backward_down(cotangents, grad, None, statistics, *at, with_keys=True)
    assert rest.k is not None and rest.v is not None, "they were asked for"
    return SecondGradients(g_grad, rest.q, rest.k, rest.v, rest.k_self, rest.v_self)


def double_backward_up(
    cotangents: Cotangents, grad: Tensor, inputs: Inputs, output: Output, shape: Shape
) -> tuple[Tensor, Statistics]:
    """gG, and what the second half needs (joint.py)."""
    call = Call(inputs, shape)
    g_grad = empty_for(grad)
    statistics = Statistics(call.statistic(), call.statistic(), call.statistic())
    _tangent_into(g_grad, call, cotangents, grad, output, statistics)
    return g_grad, statistics


def double_backward_down(
    cotangents: Cotangents,
    grad: Tensor,
    g_out: Tensor | None,
    statistics: Statistics,
    inputs: Inputs,
    output: Output,
    shape: Shape,
    *,
    with_keys: bool,
) -> Gradients:
    """gQ, gK, gV, gk*, gv*, with what the ordinary backward of g_out adds (joint.py).

    g_out: (B, H, S, d_v) or None; only for own keys, one per query, whose kernel makes rho.
    """
    call = Call(inputs, shape)
    is_single = call.own and not call.own_groups
    assert g_out is None or is_single, "joint.may_join"
    result = Gradients(
        q=empty_for(inputs.q),
        k=empty_for(inputs.k) if with_keys else None,
        v=empty_for(inputs.v) if with_keys else None,
        k_self=empty_for(inputs.k_self),
        v_self=empty_for(inputs.v_self),
    )
    a, b, c, b_self, c_self = _ready(cotangents)
    out, log_normalizer = ready(output.out), ready(output.log_normalizer)
    rho = None if g_out is None else call.statistic()
    of_rows = (log_normalizer, ready(grad), ready(g_out), a)
    numbers = (*statistics, rho)
    is_joint = {"JOINT": g_out is not None}
    z = ds = None
    if call.own_groups:
        own = (*numbers, result.k_self, result.v_self)
        own_cotangents = (b_self, c_self)
        call.over_own_keys(
            _second_key, *call.own_keys, *of_rows, *own_cotangents, *own, KEYS=True, JOINT=False
        )
    elif call.own:
        z, ds = call.statistic(), call.statistic()
        call.over_rows(
            _second_own,
            *(call.q, call.k_self, call.v_self, out),
            *of_rows,
            *(b_self, c_self, *numbers, result.k_self, result.v_self, z, ds),
            **is_joint,
        )
    flags = {"KEYS": b is not None, "with_keys": b is not None, **is_joint}
    call.over_rows(
        _second_query,
        *call.tensors,
        *of_rows,
        *(b, c, b_self, c_self, *numbers, z, ds, result.q),
        OWN=call.own,
        **flags,
    )
    if with_keys:
        of_keys = (b, c, *numbers, result.k, result.v)
        call.over_keys(_second_key, *call.context_keys, *of_rows, *of_keys, **flags)
    return result


def _ready(cotangents: Cotangents) -> Cotangents:
    return Cotangents(ready(cotangents.query), *(ready(x) for x in cotangents[1:]))


def _tangent_into(
    moved: Tensor,
    call: Call,
    tangents: Cotangents,
    grad: Tensor | None,
    output: Output,
    statistics: Statistics | None,
) -> None:
    """Write the tangent of O; with `statistics`, which it fills, for the double backward of
    `grad`.
    """
    tangents = _ready(tangents)
    has_keys = tangents.key is not None
    call.over_rows(
        _tangent,
        *call.tensors,
        *(ready(output.out), ready(output.log_normalizer)),
        ready(grad),
        *tangents,
        moved,
        *(statistics or (None, None, None)),
        OWN=call.own,
        KEYS=has_keys,
        SECOND=statistics is not None,
        with_keys=has_keys,
    )
