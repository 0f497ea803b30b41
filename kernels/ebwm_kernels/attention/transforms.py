"""Attention under torch.func's transforms (grad, vjp, jvp, vmap, hessian, ..) and forward mode.

PyTorch's transforms know autograd.Functions, and drop a tangent that reaches a custom operator. So
ops.py comes here where a transform is active, and only there: torch.compile differentiates nested
Functions wrongly, and the operators ask the engine which gradients are wanted.

    Attention        q, K, V [, k*, v*]         -> O, L
    Gradient         G, the same                -> dQ, dK, dV [, dk*, dv*]
    DoubleBackward   A, B, C [, b*, c*], G, ..  -> gG, gQ, gK, gV [, gk*, gv*]
    Tangent          Q., K., V. [, k*., v*.]    -> O.  (a dot is a direction)

The Hessian of <G, O> in q, K, V, k*, v* is symmetric, and DoubleBackward multiplies by it. So these
four are closed under differentiation up to the second order:

                     backward (reverse)                   jvp (forward)
    Attention        Gradient                             Tangent
    Gradient         DoubleBackward                       Gradient of G., plus DoubleBackward of the
                                                          directions, without its gG
    Tangent          Gradient of the directions,          none: forward over forward raises
                     DoubleBackward of q, K, V, ..
    DoubleBackward   none: a third derivative raises      none: the same

Under vmap the mapped dimension becomes part of the batch. O and L enter as constants: the formulas
(reference.py) hold what depends on them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function

from ebwm_kernels.attention.tensors import Inputs
from ebwm_kernels.autograd_rules import no_third_derivative

NUM_TENSORS = len(Inputs._fields)  # what every level is given, and None where it is absent
NUM_DIFFERENTIABLE = NUM_TENSORS - 1  # all but first_visible


def attend_under_transforms(inputs: Inputs, rest: tuple) -> Tensor:
    """Output (B, H, S, d of values), as `ops.attend`; rest: the numbers of Shape, and the backend.

    Raises RuntimeError where a third derivative or forward mode over forward mode is asked for.
    """
    return Attention.apply(*inputs, rest)[0]


class Attention(Function):
    @staticmethod
    def forward(*inputs):
        *tensors, rest = inputs
        return torch.ops.ebwm.attention(*tensors, *rest)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.rest = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.save_for_forward(*tensors, *output)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * (NUM_TENSORS + 1)
        with_keys = any(ctx.needs_input_grad[1:3])
        result = Gradient.apply(grad, *_constants(ctx), (*ctx.rest, with_keys))
        return *_without_absent(result, ctx.saved_tensors[3]), None, None

    @staticmethod
    def jvp(ctx, *tangents):
        saved = _constants(ctx)
        tangents = _zeros_for_none(tangents[:NUM_DIFFERENTIABLE], saved)
        return Tangent.apply(*tangents, *saved, ctx.rest), None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _mapped(Attention, info, in_dims, inputs)


class Gradient(Function):
    """What does not exist comes out empty."""

    @staticmethod
    def forward(*inputs):
        grad, *saved, (*rest, with_keys) = inputs
        return torch.ops.ebwm.attention_gradient(grad, *saved, *rest, with_keys, False)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.rest = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        grad, *saved = ctx.saved_tensors
        if all(u is None for u in cotangents):
            return (None,) * (len(saved) + 2)
        *rest, with_keys = ctx.rest
        if not with_keys:
            cotangents = (cotangents[0], None, None, *cotangents[3:])
        cotangents = _zeros_for_none(cotangents, saved, keys=with_keys)
        g_grad, *others = DoubleBackward.apply(*cotangents, grad, *saved, rest)
        return g_grad, *_without_absent(others, saved[3]), None, None, None, None

    @staticmethod
    def jvp(ctx, grad_tangent, *tangents):
        grad, *saved = ctx.saved_tensors
        *rest, with_keys = ctx.rest
        given = tangents[:NUM_DIFFERENTIABLE]
        parts = []
        if any(u is not None for u in given):
            directions = _zeros_for_none(given, saved)
            moved = list(DoubleBackward.apply(*directions, grad, *saved, rest)[1:])
            if not with_keys:
                moved[1:3] = (grad.new_zeros(0), grad.new_zeros(0))
            parts.append(moved)
        if grad_tangent is not None:
            parts.append(Gradient.apply(grad_tangent, *saved, ctx.rest))
        return tuple(sum(summands[1:], summands[0]) for summands in zip(*parts))

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _mapped(Gradient, info, in_dims, inputs)


class DoubleBackward(Function):
    @staticmethod
    def forward(*inputs):
        *tensors, rest = inputs
        return torch.ops.ebwm.attention_double_backward(*tensors, *rest)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *cotangents):
        raise RuntimeError(no_third_derivative("attention"))

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(no_third_derivative("attention"))

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _mapped(DoubleBackward, info, in_dims, inputs)


class Tangent(Function):
    @staticmethod
    def forward(*inputs):
        *tensors, rest = inputs
        return torch.ops.ebwm.attention_tangent(*tensors, *rest)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.rest = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad):
        directions = ctx.saved_tensors[:NUM_DIFFERENTIABLE]
        saved = ctx.saved_tensors[NUM_DIFFERENTIABLE:]
        needs = ctx.needs_input_grad
        of_directions = (None,) * NUM_DIFFERENTIABLE
        if any(needs[:NUM_DIFFERENTIABLE]):
            result = Gradient.apply(grad, *saved, (*ctx.rest, any(needs[1:3])))
            of_directions = _without_absent(result, saved[3])
        of_tensors = (None,) * NUM_DIFFERENTIABLE
        if any(needs[NUM_DIFFERENTIABLE : 2 * NUM_DIFFERENTIABLE]):
            result = DoubleBackward.apply(*directions, grad, *saved, ctx.rest)[1:]
            of_tensors = _without_absent(result, saved[3])
        return *of_directions, *of_tensors, None, None, None, None

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(
            "attention: forward mode over forward mode is not defined; use forward over reverse "
            "(torch.func.jvp of torch.func.grad, torch.func.hessian)"
        )

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _mapped(Tangent, info, in_dims, inputs)


def _constants(ctx) -> list[Tensor | None]:
    """q, K, V, k*, v*, first_visible as saved, and O and L without their graph."""
    *tensors, out, log_normalizer = ctx.saved_tensors
    return [*tensors, out.detach(), log_normalizer.detach()]


def _without_absent(result: Sequence[Tensor], k_self: Tensor | None) -> tuple[Tensor | None, ...]:
    """Results of an operator for q, K, V, k*, v*, None in the place of what is empty."""
    of_query, of_key, of_value, of_k_self, of_v_self = result
    if of_key.ndim == 1:
        of_key, of_value = None, None
    if k_self is None:
        of_k_self, of_v_self = None, None
    return of_query, of_key, of_value, of_k_self, of_v_self


def _zeros_for_none(
    directions: Sequence[Tensor | None], tensors: Sequence[Tensor | None], *, keys: bool = True
) -> list[Tensor | None]:
    """A zero in place of each missing direction of q, K, V, k*, v*; None where the tensor is.

    Without `keys`, or where both are missing, those of K and V stay None: no work is done for them.
    """
    filled = []
    has_keys = keys and any(u is not None for u in directions[1:3])
    for index, (direction, tensor) in enumerate(zip(directions, tensors)):
        if tensor is None or (index in (1, 2) and not has_keys):
            filled.append(None)
        elif direction is None:
            filled.append(torch.zeros_like(tensor))
        else:
            filled.append(direction)
    return filled


def _mapped(function: type[Function], info, in_dims, inputs):
    """vmap of one of these: the mapped dimension is folded into the batch and taken out again."""
    size = info.batch_size
    *tensors, rest = inputs
    folded = []
    for tensor, dim in zip(tensors, in_dims):
        if tensor is None:
            folded.append(None)
        elif dim is None:
            folded.append(tensor.expand(size, *tensor.shape).flatten(0, 1))
        else:
            folded.append(tensor.movedim(dim, 0).flatten(0, 1))
    result = function.apply(*folded, rest)
    outputs = []
    for tensor in (result,) if isinstance(result, Tensor) else result:
        exists = tensor.ndim > 1
        shape = (size, tensor.shape[0] // size)
        outputs.append(tensor.unflatten(0, shape) if exists else tensor)
    out_dims = tuple(0 if tensor.ndim > 1 else None for tensor in outputs)
    if isinstance(result, Tensor):
        return outputs[0], 0
    return tuple(outputs), out_dims
