"""The contract of every twice-differentiable operation here, in one place.

    create_graph=True    the inner gradient of a refinement step: gradients of what depends on the prediction, themselves differentiable;
                         none for weights and for the context, whose gradients the ordinary backward collects from both levels
    create_graph=False   the ordinary (outer) backward: all gradients
    a third derivative   raises

`torch.is_grad_enabled()` inside a backward is true exactly under create_graph=True.
"""
from __future__ import annotations

import torch


def is_inner_gradient() -> bool:
    """Whether the backward that is running was asked for a graph."""
    return torch.is_grad_enabled()


def refuse_graph(operation: str, order: str = "third") -> None:
    """Raise if the running backward was asked for a graph: the derivative it would be for does not exist here."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{operation}: its {order} derivative is not defined; call backward or autograd.grad without create_graph=True "
                           "for the last differentiation")
