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
from ebwm_kernels.attention.launches import Call, empty_for, ready
from ebwm_kernels.attention.query_kernels import _forward, _gradient_query
from ebwm_kernels.attention.second_query_kernels import _second_own, _second_query, _tangent
from ebwm_kernels.attention.tensors import Cotangents, Gradients, Inputs, Output, SecondGradients
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
    output = Output(ready(output.out), ready(output.log_normalizer))
    _tangent_into(moved, call, _ready(tangents), None, output, None)
    return moved


def double_backward(
    cotangents: Cotangents, grad: Tensor, inputs: Inputs, output: Output, shape: Shape
) -> SecondGradients:
    """As reference.double_backward."""
    call = Call(inputs, shape)
    result = SecondGradients(
        grad=empty_for(grad),
        q=empty_for(inputs.q),
        k=empty_for(inputs.k),
        v=empty_for(inputs.v),
        k_self=empty_for(inputs.k_self),
        v_self=empty_for(inputs.v_self),
    )
    grad = ready(grad)
    output = Output(ready(output.out), ready(output.log_normalizer))
    a, b, c, b_self, c_self = _ready(cotangents)
    statistics = (call.statistic(), call.statistic(), call.statistic())
    cotangents = Cotangents(a, b, c, b_self, c_self)
    _tangent_into(result.grad, call, cotangents, grad, output, statistics)
    of_rows = (output.log_normalizer, grad, a)
    own = (*statistics, result.k_self, result.v_self)
    z = ds = None
    if call.own_groups:
        call.over_own_keys(_second_key, *call.own_keys, *of_rows, b_self, c_self, *own, KEYS=True)
    elif call.own:
        z, ds = call.statistic(), call.statistic()
        own_tensors = (call.q, call.k_self, call.v_self)
        call.over_rows(_second_own, *own_tensors, *of_rows, b_self, c_self, *own, z, ds)
    has_keys = {"KEYS": b is not None, "with_keys": b is not None}
    call.over_rows(
        _second_query,
        *call.tensors,
        *of_rows,
        b,
        c,
        b_self,
        c_self,
        *statistics,
        z,
        ds,
        result.q,
        OWN=call.own,
        **has_keys,
    )
    context = call.context_keys
    call.over_keys(
        _second_key, *context, *of_rows, b, c, *statistics, result.k, result.v, **has_keys
    )
    return result


def _ready(cotangents: Cotangents) -> Cotangents:
    return Cotangents(ready(cotangents.query), *(ready(x) for x in cotangents[1:]))


def _tangent_into(
    moved: Tensor,
    call: Call,
    tangents: Cotangents,
    grad: Tensor | None,
    output: Output,
    statistics: tuple[Tensor, Tensor, Tensor] | None,
) -> None:
    """Write the tangent of O; with `statistics`, which it fills, for the double backward of
    `grad`.
    """
    has_keys = tangents.key is not None
    call.over_rows(
        _tangent,
        *call.tensors,
        *output,
        grad,
        *tangents,
        moved,
        *(statistics or (None, None, None)),
        OWN=call.own,
        KEYS=has_keys,
        SECOND=statistics is not None,
        with_keys=has_keys,
    )
