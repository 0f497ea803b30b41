"""What every twice-differentiable operation here promises, in one place.

    each gradient that a backward is asked for is right, and requires grad if the backward was asked
        for a graph (create_graph=True)
    a gradient that it is not asked for is not computed: the inner gradient of a refinement step,
        autograd.grad(energy, state), touches neither weights nor the observed stream, whose
        gradients the outer backward collects from both levels
    a third derivative raises
    torch.func's transforms and forward mode give right numbers, or one sentence that says what to
    use: `transforms_active` tells when they surround the running code
    the same results under torch.autocast as outside it: an operation chooses its own precision

`ctx.needs_input_grad` cannot tell these apart: it ignores the `inputs=` of autograd.grad. The
engine knows; `needs_grad` asks it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._C._autograd import _get_current_graph_task_keep_graph
from torch._guards import TracingContext
from torch.autograd import forward_ad

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def needs_grad(ctx, position: int) -> bool:
    """Whether the running backward leads on to the gradient of the position-th tensor argument of
    the operation whose backward it is.
    """
    node = ctx.next_functions[position][0]
    if node is None:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        # a leaf among the inputs of autograd.grad: the engine captures its gradient instead of
        # executing the node
        return True


def no_third_derivative(operation: str) -> str:
    """What to say where one is asked for, in whatever mode."""
    return (
        f"{operation}: its third derivative is not defined; differentiate at most twice: the last "
        "time by backward or autograd.grad without create_graph=True "
        "(torch.autograd.functional.hvp asks for one more than it needs: use vhp, or "
        "torch.func.jvp of torch.func.grad)"
    )


def refuse_graph(operation: str, instead: str | None = None) -> None:
    """Raise if the running backward was asked for a graph: the derivative it would be for does not
    exist here.

    instead: what has every derivative, for an operation that has one only; without it there are
    two. `torch.is_grad_enabled()` inside a backward is true exactly under create_graph=True.
    `once_differentiable` would not do: autograd drops its error node where that lies on no path to
    the inputs, and a wrong number comes out.
    """
    if not torch.is_grad_enabled():
        return
    if instead is None:
        raise RuntimeError(no_third_derivative(operation))
    raise RuntimeError(
        f"{operation}: its second derivative is not defined; call backward or autograd.grad "
        "without create_graph=True (torch.autograd.functional.hvp, vhp and hessian need the "
        f"second derivative: use {instead})"
    )


def is_traced_without_graph() -> bool:
    """Whether torch.compile is recording the running backward as a last differentiation: nothing
    compiled will be differentiated again.
    """
    return TracingContext.try_get() is not None and not torch.is_grad_enabled()


def refuse_kept_graph(operation: str) -> None:
    """Raise if a backward that was compiled as a last differentiation runs where its graph is kept:
    under create_graph or retain_graph.

    PyTorch (2.11 to 2.13) notices a second differentiation of what it compiled only where a path
    leads back to it, and otherwise drops gradients without a word.
    """
    is_running = torch._C._current_graph_task_id() != -1
    if is_running and _get_current_graph_task_keep_graph():
        raise RuntimeError(
            f"{operation}: torch.compile made this backward for one differentiation, and it was "
            "asked for under create_graph or "
            "retain_graph; take the inner gradient inside the compiled function "
            "(torch._dynamo.config.trace_autograd_ops = True, "
            "fullgraph=True), or leave the function uncompiled"
        )


def transforms_active() -> bool:
    """Whether a transform of torch.func (grad, vjp, jvp, vmap, ..) or forward mode surrounds the
    running code.

    A custom operator knows neither: PyTorch drops a tangent that reaches one, without a word.
    torch.compile enters transforms while it traces, and compiles again where others surround the
    call: so the answer is a constant to it.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


# What torch.compiler.assume_constant_result does, which imports a compiler: a second, and 120 MiB.
transforms_active._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def is_mapped(tensor: Tensor | None) -> bool:
    """Whether vmap (torch.func's, or the one of autograd.grad's is_grads_batched) hides a dimension
    of the tensor.
    """
    if tensor is None:
        return False
    return _functorch.is_batchedtensor(tensor) or _functorch.is_legacy_batchedtensor(tensor)


def refuse_transforms(operation: str, instead: str, *gradients: Tensor | None) -> None:
    """Raise if a transform of torch.func or forward mode surrounds an operation without them, or
    vmap its backward of these gradients.
    """
    if transforms_active() or any(is_mapped(u) for u in gradients):
        raise RuntimeError(
            f"{operation}: torch.func transforms and forward-mode derivatives are not defined; "
            f"use {instead}"
        )


def _device_types(args: tuple, kwargs: dict) -> set[str]:
    return {u.device.type for u in (*args, *kwargs.values()) if isinstance(u, Tensor)}


def without_autocast(
    function: Callable[Parameters, Result],
) -> Callable[Parameters, Result]:
    """The function with autocast off where its tensors are: it chooses its own precision."""

    @functools.wraps(function)
    def in_own_precision(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        if not torch._C._is_any_autocast_enabled():
            return function(*args, **kwargs)
        with contextlib.ExitStack() as stack:
            for device_type in _device_types(args, kwargs):
                stack.enter_context(torch.autocast(device_type, enabled=False))
            return function(*args, **kwargs)

    return in_own_precision
