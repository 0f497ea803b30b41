"""Gradients of a loss whose terms stand alone: each term is back-propagated as soon as it exists, so that one term's graph lives at a time.

    terms = TermGradients()
    x = terms.source(x)                 what comes from outside: the terms see a leaf, and x's own graph waits for the loss's backward
    with terms.stand_in(module):        its parameters are leaves that alias them; engines and their hooks see nothing of what follows
        part = Cut(); y = part(y)       what several terms share in here: y's own graph is back-propagated once,
        for each of these terms:  term.backward()
        part.settle()                   with the sum
    loss = terms.total(value)           an ordinary scalar: backward() hands out the sums, and goes on behind x

The sums are those of one backward through sum(terms), in another order of addition. Memory: one tensor per parameter and cut tensor, in
place of the graphs of all terms but one.
"""

from __future__ import annotations

import contextlib
from typing import Iterator

import torch
from torch import Tensor, nn


class Cut:
    """Tensors, and the leaves that stand for them."""

    def __init__(self):
        self.sources: list[Tensor] = []
        self.leaves: list[Tensor] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        """A leaf in the tensor's place; the tensor itself where it has no gradient or is a leaf already."""
        return self._leaf(tensor) if tensor.requires_grad and not tensor.is_leaf else tensor

    def settle(self) -> None:
        """Back-propagate what reached the leaves through the tensors' own graphs."""
        reached = [
            (source, leaf)
            for source, leaf in zip(self.sources, self.leaves)
            if _sum(leaf) is not None
        ]
        self.sources, self.leaves = [], []
        torch.autograd.backward(
            [source for source, _ in reached], [_sum(leaf) for _, leaf in reached]
        )

    def _leaf(self, tensor: Tensor) -> Tensor:
        leaf = tensor.detach().requires_grad_()
        self.sources.append(tensor)
        self.leaves.append(leaf)
        return leaf


class TermGradients(Cut):
    """What the terms of a loss start from, and the sums of their gradients."""

    def source(self, tensor: Tensor) -> Tensor:
        """A leaf in the place of a tensor from outside."""
        return self._leaf(tensor) if tensor.requires_grad else tensor

    @contextlib.contextmanager
    def stand_in(self, module: nn.Module) -> Iterator[None]:
        """Within it, every learned parameter of the module is a leaf that shares its memory."""
        places = [
            (owner, name, parameter)
            for owner in module.modules()
            for name, parameter in owner._parameters.items()
            if parameter is not None and parameter.requires_grad
        ]
        leaves: dict[int, Tensor] = {}
        for owner, name, parameter in places:
            if id(parameter) not in leaves:
                leaves[id(parameter)] = self._leaf(parameter)
                leaves[id(parameter)].stands_for = parameter
            owner._parameters[name] = leaves[id(parameter)]
        try:
            yield
        finally:
            for owner, name, parameter in places:
                owner._parameters[name] = parameter

    def total(self, value: Tensor) -> Tensor:
        """The loss, of the given value, whose gradients are the sums. It can be back-propagated once."""
        sources, sums = (
            [getattr(leaf, "source", source) for leaf, source in zip(self.leaves, self.sources)],
            [_sum(leaf) for leaf in self.leaves],
        )
        for leaf in self.leaves:  # autograd takes a gradient as it is only if nobody else holds it; of a partitioned parameter it must
            leaf.grad = None
        self.sources, self.leaves = [], []
        return _Total.apply(value, sums, *sources)


def sink_of(leaf: Tensor) -> Tensor | None:
    """Where a leaf's gradient may be added by hand, in float32 or float64; None for a tensor that has no gradient.

    In the leaf's own precision it is the tensor that autograd adds to as well.
    """
    if not leaf.requires_grad:
        return None
    if leaf.dtype in (torch.float32, torch.float64):
        leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        return leaf.grad
    if not hasattr(leaf, "sink"):
        leaf.sink = torch.zeros_like(leaf, dtype=torch.float32)
    return leaf.sink


def _sum(leaf: Tensor) -> Tensor | None:
    """Everything that reached a leaf, in its own precision."""
    if not hasattr(leaf, "sink"):
        return leaf.grad
    return (leaf.sink if leaf.grad is None else leaf.sink + leaf.grad).to(leaf.dtype)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, sums, *sources):
        ctx.sums = sums
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "refinement loss: its gradients were taken term by term and have no graph; call backward without create_graph=True"
            )
        if ctx.sums is None:
            raise RuntimeError(
                "refinement loss: a second backward through the same loss is not possible; compute the loss again"
            )
        sums, ctx.sums = ctx.sums, None
        return None, None, *(None if u is None else u.mul_(grad.to(u.dtype)) for u in sums)
