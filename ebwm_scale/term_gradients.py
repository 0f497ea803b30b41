"""Gradients of a loss whose terms stand alone: each term is back-propagated as soon as it exists, so that one term's graph lives at a time.

    terms = TermGradients(parameters)
    x = terms.cut(x)                    what several terms share: they see a leaf, and x's own graph waits for the end
    for each term:  terms.add(term)     its gradients are taken and added up, its graph is gone
    loss = terms.total(value)           an ordinary scalar: backward() hands out the sums, and goes on into what was cut

The sums are those of one backward through sum(terms), in another order of addition. Engines, hooks and gradient scaling see nothing unusual.
Memory: one tensor per source, in place of the graphs of all terms but one.
"""
from __future__ import annotations

from typing import Iterable

import torch
from torch import Tensor


class TermGradients:
    def __init__(self, parameters: Iterable[Tensor]):
        self.sources = [p for p in parameters if p.requires_grad]
        self.leaves = list(self.sources)
        self.sums: list[Tensor | None] = [None] * len(self.leaves)

    def cut(self, tensor: Tensor) -> Tensor:
        """A leaf in the tensor's place; the tensor itself where it has no gradient or is a source already."""
        if not tensor.requires_grad or any(tensor is source for source in self.sources):
            return tensor
        leaf = tensor.detach().requires_grad_()
        self.sources.append(tensor)
        self.leaves.append(leaf)
        self.sums.append(None)
        return leaf

    def add(self, term: Tensor) -> None:
        """Back-propagate a scalar term now."""
        for i, gradient in enumerate(torch.autograd.grad(term, self.leaves, allow_unused=True)):
            if gradient is not None:
                self.sums[i] = gradient if self.sums[i] is None else self.sums[i].add_(gradient)

    def total(self, value: Tensor) -> Tensor:
        """The loss, of the given value, whose gradients are the sums. It can be back-propagated once."""
        sums, self.sums = self.sums, []
        return _Total.apply(value, sums, *self.sources)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, sums, *sources):
        ctx.sums = sums
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError("refinement loss: its gradients were taken step by step and have no graph; call backward without create_graph=True, "
                               "or set refinement.graph to full")
        if ctx.sums is None:
            raise RuntimeError("refinement loss: a second backward through the same loss is not possible; compute the loss again")
        sums, ctx.sums = ctx.sums, None
        return None, None, *(None if u is None else u.mul_(grad.to(u.dtype)) for u in sums)
