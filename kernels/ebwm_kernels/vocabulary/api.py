"""The vocabulary side of a refinement step, for a tile of rows: no product is made twice, and W's
gradient is summed where it belongs.

A vocabulary state x holds V numbers per row. With p = softmax(x), a map W (V, D), the energy's
gradient g with respect to the embedded state e = p W, and h = -alpha g, one refinement step and its
cross-entropy against a target y are

    probabilities:  x' = p + W h                   descends dE/dp = W g: what was softmaxed moves
    logits:         x' = x + p * (W h - p.W h)     descends dE/dx: through the softmax
    mirror:         x' = x + W h                   p' ~ p exp(-alpha dE/dp): mirror descent on the
                                                   simplex
    loss = sum over rows of (logsumexp(x') - x'_y) / n
    its gradient on x':  r = (p' - onehot(y)) / n,  p' = softmax(x')

With clamps, the change x' - x is bounded by Clamps.change and then x' by Clamps.state, number by
number; r is zero where one of them binds.

Everything here is for states that carry no gradient (refinement.graph detach and truncate);
`vocabulary_descend_reference` is the step in plain autograd, for one that does (full), whose fused
passes are in graph_steps.py. Nothing
differentiates the loss a second time, so its gradient needs no graph:

    vocabulary_embed      x -> p, e
    vocabulary_descend    p, h -> x', loss. r is turned into the gradients of h and W while x' is
                          at hand: the last step, and the other updates. Without p it is the loss
                          of a model that predicts logits directly
    vocabulary_step       p, h -> p', e', loss of a step with another one behind it (probabilities;
                          mirror from x = 0, where earlier steps add up to `moved`).
                          The loss's gradient on h is r W = (e' - W_y) / n, known at once, and the
                          two gradients of W, of this loss and of e', are both products with p': one
                          serves both, which makes three products of size rows * V * D per step, as
                          many as a Transformer++ has

Rows are (batch, position) pairs, independent of each other: a caller takes as many at a time as it
has memory for (refinement/loop.py), and gives n, the number of rows that count in all, and a
`grad_buffer` (V, D), float32 or float64, to which W's gradients are added at once, in place of
tiles x steps matrices of W's size through autograd. States are float32 (float64 in tests) whatever
the dtype of W.
"""

from __future__ import annotations

from torch import Tensor

from ebwm_kernels.vocabulary.formulas import NO_CLAMPS, Clamps, clamped_step, state_dtype


def vocabulary_embed_reference(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`vocabulary_embed`, differentiable as often as one likes in both arguments."""
    probabilities = x.softmax(-1)
    return probabilities, probabilities.to(weight.dtype) @ weight


def vocabulary_descend_reference(
    weight: Tensor,
    hidden: Tensor,
    *,
    probabilities: Tensor | None = None,
    x: Tensor | None = None,
    clamps: Clamps = NO_CLAMPS,
) -> Tensor:
    """x' of `vocabulary_descend` in plain differentiable operations.

    With neither x nor probabilities the step starts at zero.
    """
    move = (hidden.to(weight.dtype) @ weight.T).to(state_dtype(weight))
    if x is not None and probabilities is not None:
        move = probabilities * (move - (probabilities * move).sum(-1, keepdim=True))
    start = probabilities if x is None else x
    return clamped_step(start, move, clamps)
