"""Back-propagate each term of a sum as soon as it is computed.

A normal backward keeps the graphs of all N refinement steps alive. Here each step runs its own
backward at once, its gradients collect in detached copies of the parameters, and the final
loss.backward() only hands the sums to autograd (and so to DeepSpeed's hooks). Peak memory is one
step's graph.

    backward = StepwiseBackward()
    x = backward.detach_input(x)                  x's own graph waits for the loss's backward
    with backward.parameters_as_leaves(module):   engines and their hooks see nothing in here
        shared = DeferredBackward()
        y = shared.detach(y)                      y is read by several terms
        for each of these terms:
            term.backward()
        shared.backward()                         y's own graph, once, with the sum
    loss = backward.as_loss(value)                loss.backward() hands out the sums

The sums are those of one backward through sum(terms), in another order of addition. Leaves in half
precision are summed in float32: over the terms, and over the places where one term reads them, such
as the forward and the inner gradient. A sum is rounded once, when it is handed out: so its error
does not grow with the number of addends.
Memory: one tensor per parameter and detached tensor, in float32 or float64, instead of the graphs
of all terms but one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

FULL_PRECISION = (torch.float32, torch.float64)


@dataclass
class Leaf:
    """What is known of a leaf that stands for a parameter or another tensor; kept on it.

    parameter: the parameter it stands for. graph_entry: where that parameter's gradient enters
    its graph under ZeRO stage 3 (block_recompute.py).
    """

    parameter: nn.Parameter | None = None
    graph_entry: Tensor | None = None


def leaf_of(tensor: Tensor) -> Leaf | None:
    """What is known of a leaf that was made here; None for every other tensor."""
    return getattr(tensor, "leaf", None)


def _known_leaf(tensor: Tensor) -> Leaf:
    leaf = leaf_of(tensor)
    if leaf is None:
        raise ValueError("the tensor is no leaf that DeferredBackward made")
    return leaf


class DeferredBackward:
    """Tensors whose own backward waits until all their readers have been back-propagated.

    enabled False: everything passes through unchanged, where no gradient is needed.
    """

    def __init__(self, *, enabled: bool = True):
        self.enabled = enabled
        self.sources: list[Tensor] = []
        self.leaves: list[Tensor] = []

    def detach(self, tensor: Tensor) -> Tensor:
        """A leaf in the tensor's place.

        The tensor itself where it has no gradient or is a leaf already.
        """
        if not self.enabled or not tensor.requires_grad or tensor.is_leaf:
            return tensor
        return self._make_leaf(tensor)

    def backward(self) -> None:
        """Back-propagate what the leaves have collected through the tensors' own graphs."""
        sources = []
        gradients = []
        for source, leaf in zip(self.sources, self.leaves):
            gradient = _take_sum(leaf)
            if gradient is not None:
                sources.append(source)
                gradients.append(gradient.to(source.dtype))
        self.sources = []
        self.leaves = []
        torch.autograd.backward(sources, gradients)

    def _make_leaf(self, tensor: Tensor, parameter: nn.Parameter | None = None) -> Tensor:
        leaf = summed_in_fp32(tensor.detach().requires_grad_())
        # An attribute of ours, which torch's Tensor does not declare.
        leaf.leaf = Leaf(parameter)  # pyright: ignore[reportAttributeAccessIssue]
        self.sources.append(tensor)
        self.leaves.append(leaf)
        return leaf


class StepwiseBackward(DeferredBackward):
    """The inputs and parameters of a loss whose terms are back-propagated one by one."""

    def detach_input(self, tensor: Tensor) -> Tensor:
        """A leaf in the place of a tensor from outside."""
        if not self.enabled or not tensor.requires_grad:
            return tensor
        return self._make_leaf(tensor)

    @contextlib.contextmanager
    def parameters_as_leaves(self, module: nn.Module) -> Iterator[None]:
        """Within it, every learned parameter of the module is a leaf that shares its memory."""
        if not self.enabled:
            yield
            return
        places = []
        for owner in module.modules():
            for name, parameter in owner._parameters.items():
                if parameter is not None and parameter.requires_grad:
                    places.append((owner, name, parameter))
        leaves: dict[int, Tensor] = {}  # a parameter that is used twice has one leaf
        for owner, name, parameter in places:
            if id(parameter) not in leaves:
                leaves[id(parameter)] = self._make_leaf(parameter, parameter)
            owner._parameters[name] = leaves[id(parameter)]
        try:
            yield
        finally:
            for owner, name, parameter in places:
                owner._parameters[name] = parameter

    def as_loss(self, value: Tensor, *, read_outside: Iterable[nn.Parameter] = ()) -> Tensor:
        """The loss, of the given value, whose gradients are the sums.

        It can be back-propagated once. read_outside: as for collect.
        """
        if not self.enabled:
            return value
        return self.collect(read_outside=read_outside).as_loss(value)

    def collect(self, *, read_outside: Iterable[nn.Parameter] = ()) -> CollectedSums:
        """The sums, which are forgotten here.

        read_outside: parameters that get a gradient through an input; all others get one here, of
        zeros where no step has read them.
        """
        elsewhere = {id(parameter) for parameter in read_outside}
        sources = []
        sums = []
        for source, leaf in zip(self.sources, self.leaves):
            graph_entry = _known_leaf(leaf).graph_entry
            sources.append(source if graph_entry is None else graph_entry)
            total = _take_sum(leaf)
            if total is None and graph_entry is None and id(source) not in elsewhere:
                # Nothing read it in this step, as nothing reads a workspace's step size without
                # the full graph. Engines reduce the gradients of all parameters.
                total = torch.zeros_like(leaf)
            sums.append(total)
        dtypes = [leaf.dtype for leaf in self.leaves]
        self.sources = []
        self.leaves = []
        return CollectedSums(sources, sums, dtypes)


@dataclass
class CollectedSums:
    """Gradients that are known already: one sum per source, None where nothing has read it.

    dtypes: those that the gradients are rounded to, of the sources.
    """

    sources: list[Tensor]
    sums: list[Tensor | None]
    dtypes: list[torch.dtype]

    def as_loss(self, value: Tensor) -> Tensor:
        """The loss, of the given value, that hands the sums out, once: they are freed with it."""
        return _SumsAsGradients.apply(value, self.sums, self.dtypes, *self.sources)


def summed_in_fp32(leaf: Tensor) -> Tensor:
    """The leaf, whose .grad is in float32 if it is in half precision itself.

    Autograd then casts every gradient before it adds the first two.
    """
    if leaf.dtype not in FULL_PRECISION and leaf.requires_grad:
        leaf.grad_dtype = torch.float32
    return leaf


def fp32_grad_buffer(leaf: Tensor) -> Tensor | None:
    """Where a leaf's gradient may be added by hand, in float32 or float64.

    None for a tensor that has no gradient. It is the tensor that autograd adds to as well. Raises
    ValueError for one in half precision that is no leaf of ours.
    """
    if not leaf.requires_grad:
        return None
    if leaf.grad is None:
        if leaf.dtype not in FULL_PRECISION:
            _known_leaf(leaf)  # or its own sum would be in half precision
        leaf.grad = torch.zeros_like(leaf, dtype=leaf.grad_dtype)
    return leaf.grad


def _take_sum(leaf: Tensor) -> Tensor | None:
    """The sum of all gradients that reached a leaf, as it was summed; it is forgotten here.

    Autograd takes a gradient as it is only if nobody else holds it, and the gradient of a
    partitioned parameter it must take as it is.
    """
    total = leaf.grad
    leaf.grad = None
    return total


class _SumsAsGradients(torch.autograd.Function):
    """A value whose gradients with respect to the sources are known already.

    dtypes: those that the gradients are rounded to, of the sources.
    """

    @staticmethod
    def forward(ctx, value, sums, dtypes, *sources):
        ctx.sums = sums
        ctx.dtypes = dtypes
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "refinement loss: its gradients were taken step by step and have no graph; "
                "call backward without create_graph=True"
            )
        if ctx.sums is None:
            raise RuntimeError(
                "refinement loss: a second backward through the same loss is not possible; "
                "compute the loss again"
            )
        sums = ctx.sums
        ctx.sums = None
        gradients = []
        for index, dtype in enumerate(ctx.dtypes):
            total = sums[index]
            sums[index] = None  # so that both precisions are there of one gradient only
            if total is not None:
                total = total.mul_(grad.to(total.dtype)).to(dtype)
            gradients.append(total)
        return None, None, None, *gradients
