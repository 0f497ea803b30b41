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
precision are summed in float32, and their sum is rounded once, when it is handed out: so its error
does not grow with the number of terms.
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
    its graph under ZeRO stage 3 (block_recompute.py). grad_buffer: the sum of all gradients, in
    float32, of a leaf in half precision; such a leaf's own .grad stays empty.
    """

    parameter: nn.Parameter | None = None
    graph_entry: Tensor | None = None
    grad_buffer: Tensor | None = None


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
                gradients.append(gradient)
        self.sources = []
        self.leaves = []
        torch.autograd.backward(sources, gradients)

    def _make_leaf(self, tensor: Tensor, parameter: nn.Parameter | None = None) -> Tensor:
        leaf = tensor.detach().requires_grad_()
        # An attribute of ours, which torch's Tensor does not declare.
        leaf.leaf = Leaf(parameter)  # pyright: ignore[reportAttributeAccessIssue]
        if leaf.dtype not in FULL_PRECISION:
            leaf.register_post_accumulate_grad_hook(_move_to_fp32_sum)
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

        It can be back-propagated once. read_outside: parameters that get a gradient through an
        input; all others get one here, of zeros where no step has read them.
        """
        if not self.enabled:
            return value
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
        self.sources = []
        self.leaves = []
        return _SumsAsGradients.apply(value, sums, *sources)


def fp32_grad_buffer(leaf: Tensor) -> Tensor | None:
    """Where a leaf's gradient may be added by hand, in float32 or float64.

    None for a tensor that has no gradient. In float32 and float64 it is the tensor that autograd
    adds to as well.
    """
    if not leaf.requires_grad:
        return None
    if leaf.dtype in FULL_PRECISION:
        if leaf.grad is None:
            leaf.grad = torch.zeros_like(leaf)
        return leaf.grad
    info = _known_leaf(leaf)
    if info.grad_buffer is None:
        info.grad_buffer = torch.zeros_like(leaf, dtype=torch.float32)
    return info.grad_buffer


def _move_to_fp32_sum(leaf: Tensor) -> None:
    """Called by autograd after each backward that reached a leaf in half precision."""
    info = _known_leaf(leaf)
    gradient = leaf.grad
    leaf.grad = None
    if gradient is None:
        return
    if info.grad_buffer is None:
        info.grad_buffer = gradient.float()
    else:
        info.grad_buffer.add_(gradient)


def _take_sum(leaf: Tensor) -> Tensor | None:
    """The sum of all gradients that reached a leaf, in the leaf's precision; it is forgotten here.

    Autograd takes a gradient as it is only if nobody else holds it, and the gradient of a
    partitioned parameter it must take as it is.
    """
    info = _known_leaf(leaf)
    if leaf.dtype in FULL_PRECISION:
        total = leaf.grad
        leaf.grad = None
        return total
    if info.grad_buffer is None:
        return None
    total = info.grad_buffer.to(leaf.dtype)
    info.grad_buffer = None
    return total


class _SumsAsGradients(torch.autograd.Function):
    """A value whose gradients with respect to the sources are known already."""

    @staticmethod
    def forward(ctx, value, sums, *sources):
        ctx.sums = sums
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
        for total in sums:
            if total is not None:
                total.mul_(grad.to(total.dtype))
            gradients.append(total)
        return None, None, *gradients
