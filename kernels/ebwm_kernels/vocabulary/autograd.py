"""The autograd functions behind api.py: what each keeps, and what its backward hands out."""

from __future__ import annotations

import torch
from torch import Tensor

from ebwm_kernels.autograd_rules import refuse_graph, refuse_transforms, without_autocast
from ebwm_kernels.vocabulary.formulas import (
    NO_CLAMPS,
    Clamps,
    _move,
    _step,
    _through_softmax_,
    state_dtype,
)
from ebwm_kernels.vocabulary.softmax_cross_entropy import (
    CHUNK_BYTES,
    IGNORE,
    CrossEntropyRows,
    _softmax,
)

# What is differentiable in every mode, by operation.
PLAIN = {
    "vocabulary_embed": "vocabulary.api.vocabulary_embed_reference",
    "vocabulary_descend": "vocabulary.api.vocabulary_descend_reference",
    "vocabulary_step": "vocabulary.api.vocabulary_descend_reference and _embed_reference",
    "vocabulary_cross_entropy": "torch.nn.functional.cross_entropy(hidden @ weight.T, targets)",
}


@without_autocast
def vocabulary_embed(
    x: Tensor, weight: Tensor, *, grad_buffer: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """p = softmax(x) without graph, and p @ weight (rows, D) in weight's dtype: x (rows, V), weight
    (V, D). No gradient flows into x.

    grad_buffer (V, D): receives weight's gradient, by addition, in the backward; autograd gets
    none. out: memory for p, x itself for example.
    """
    refuse_transforms("vocabulary_embed", PLAIN["vocabulary_embed"])
    return _Embed.apply(x, weight, grad_buffer, out)


@without_autocast
def vocabulary_descend(
    weight: Tensor,
    hidden: Tensor,
    targets: Tensor | None,
    *,
    probabilities: Tensor | None = None,
    x: Tensor | None = None,
    keep_state: bool = False,
    count: Tensor | float | None = None,
    grad_buffer: Tensor | None = None,
    loss_weight: float = 1.0,
    clamps: Clamps = NO_CLAMPS,
    out: Tensor | None = None,
    moved: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """One descent step and its loss: (x' (rows, V) without graph or None, cross-entropy, a scalar,
    or None without targets).

    weight (V, D); hidden (rows, D) = -alpha dE/d embed(x); targets (rows,) int64, IGNORE where a
    row does not count. With `probabilities` p (rows, V) alone, p is what moves; with x alone, x is;
    with both, x moves through the softmax. With neither, x' = hidden @ weight.T: a step from zeros,
    or a model that predicts logits directly; with moved (rows, D), a step from moved @ weight.T,
    through which no gradient flows. clamps: bounds on the change and on x'. keep_state False: x' is
    not needed. The loss is a sum over rows divided by `count` (default: the rows that count here: a
    mean), float32 or float64, with first-order gradients of weight and hidden, which exist once: a
    second backward through it raises. grad_buffer (V, D): receives weight's gradient of loss_weight
    * loss now; back-propagate the loss with that weight, for hidden's. out (rows, V): memory for
    x'; its contents are lost also where x' is not kept.
    """
    refuse_transforms("vocabulary_descend", PLAIN["vocabulary_descend"])
    if targets is None:
        with torch.no_grad():
            return _step(weight, _from(moved, hidden), probabilities, x, out, clamps)[0], None
    needs_grad = torch.is_grad_enabled() and (weight.requires_grad or hidden.requires_grad)
    loss, state = _DescendAndScore.apply(
        weight,
        hidden,
        targets,
        probabilities,
        x,
        count,
        grad_buffer,
        loss_weight,
        needs_grad,
        keep_state,
        clamps,
        out,
        moved,
    )
    return (state if keep_state else None), loss


@without_autocast
def vocabulary_step(
    probabilities: Tensor | None,
    weight: Tensor,
    hidden: Tensor,
    targets: Tensor | None,
    *,
    count: Tensor | float | None = None,
    grad_buffer: Tensor | None = None,
    loss_weight: float = 1.0,
    out: Tensor | None = None,
    moved: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A step of the probabilities update, entered into the next: (p' (rows, V) without graph, e' =
    p' @ weight (rows, D), loss or None). probabilities None: a mirror step
    from moved @ weight.T, or from zeros.

    Equal to `vocabulary_descend` followed by `vocabulary_embed`, except for where weight's gradient
    comes from: the loss has a gradient of hidden alone; weight's gradient of loss_weight * loss
    comes with that of e', since both are products with p'. So both have to be back-propagated, in
    any order or apart from each other, and the loss with the weight that was announced. out: memory
    for p'.
    """
    refuse_transforms("vocabulary_step", PLAIN["vocabulary_step"])
    p, embedded, loss, grad_hidden = _StepEmbed.apply(
        probabilities, weight, hidden.detach(), targets, count, grad_buffer, loss_weight, out, moved
    )
    return p, embedded, None if targets is None else _GivenGradient.apply(hidden, loss, grad_hidden)


@without_autocast
def vocabulary_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits hidden @ weight.T, first order: hidden (rows, D), weight (V, D),
    targets (rows,) int64 -> a scalar.

    Logits exist for CHUNK_BYTES at a time, and their gradients are taken while they do.
    """
    refuse_transforms("vocabulary_cross_entropy", PLAIN["vocabulary_cross_entropy"])
    needs_grad = torch.is_grad_enabled() and (weight.requires_grad or hidden.requires_grad)
    return _CrossEntropy.apply(weight, hidden, targets, needs_grad)


def _from(moved: Tensor | None, hidden: Tensor) -> Tensor:
    return hidden if moved is None else moved + hidden


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, grad_buffer, out):
        ctx.set_materialize_grads(False)  # p has none, and zeros in its place would be (rows, V)
        p = _softmax(x, None if out is None else out.view_as(x))
        ctx.save_for_backward(p)
        ctx.mark_non_differentiable(p)
        ctx.grad_buffer = grad_buffer
        return p, p.to(weight.dtype) @ weight

    @staticmethod
    @without_autocast
    def backward(ctx, _, grad):
        _refuse_second_derivative("vocabulary_embed", grad)
        (p,) = ctx.saved_tensors
        return (
            None,
            None if grad is None else _accumulate_matmul(ctx.grad_buffer, p.to(grad.dtype).T, grad),
            None,
            None,
        )


class _StepEmbed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, probabilities, weight, hidden, targets, count, grad_buffer, loss_weight, out, moved
    ):
        ctx.set_materialize_grads(False)
        shape = (len(hidden), len(weight))
        logits = _move(
            weight,
            _from(moved, hidden),
            probabilities,
            None,
            None if out is None else out.view(shape),
        )
        score = None if targets is None else CrossEntropyRows(targets, count, logits.dtype)
        if score is None:
            p = _softmax(logits, out=logits)
            loss, embedded, grad_hidden = (
                p.new_zeros(()),
                p.to(weight.dtype) @ weight,
                hidden.new_empty(0),
            )
        else:
            p, loss = score.softmax(logits, in_place=True)
            if weight.dtype == p.dtype:
                embedded = p @ weight
                beside = embedded - weight[score.target]
            else:  # in half precision e' - W_y would cancel to nothing where p'_y is near 1
                beside = score.rounded_residual(p, weight.dtype) @ weight
                embedded = beside + weight[score.target]
            grad_hidden = (beside.to(p.dtype) * score.share[:, None]).to(hidden.dtype)
        ctx.save_for_backward(p, hidden, targets)
        ctx.count, ctx.grad_buffer, ctx.weight_dtype = count, grad_buffer, weight.dtype
        ctx.loss_weight = loss_weight if score is not None else 0.0
        ctx.mark_non_differentiable(p, loss, grad_hidden)
        return p, embedded, loss, grad_hidden

    @staticmethod
    @without_autocast
    def backward(ctx, _, grad_embedded, *__):
        """dW = p' (grad_embedded + s h) - onehot (s h), s = loss_weight / n on rows that count."""
        _refuse_second_derivative("vocabulary_step", grad_embedded)
        if grad_embedded is None:
            return (None,) * 9
        p, hidden, targets = ctx.saved_tensors
        none = (None,) * 7
        if ctx.loss_weight == 0:
            return (
                None,
                _accumulate_matmul(ctx.grad_buffer, p.to(grad_embedded.dtype).T, grad_embedded),
                *none,
            )
        score = CrossEntropyRows(targets, ctx.count, p.dtype)
        scaled = score.share[:, None] * ctx.loss_weight * hidden
        right, grad_buffer = scaled + grad_embedded, ctx.grad_buffer
        if grad_buffer is None:
            grad_buffer = p.new_zeros(p.shape[1], hidden.shape[1])
        if ctx.weight_dtype == p.dtype:
            _accumulate_matmul(grad_buffer, p.T, right)
            _add_rows_(grad_buffer, score.target, -scaled)
        else:  # (p' - onehot) (grad_embedded + s h) + onehot grad_embedded
            _accumulate_matmul(
                grad_buffer,
                score.rounded_residual(p, ctx.weight_dtype).T,
                right.to(ctx.weight_dtype),
            )
            _add_rows_(grad_buffer, score.target, grad_embedded)
        return None, grad_buffer.to(ctx.weight_dtype) if ctx.grad_buffer is None else None, *none


class _GivenGradient(torch.autograd.Function):
    """A scalar whose gradient with respect to one tensor is known already."""

    @staticmethod
    def forward(ctx, source, value, gradient):
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        _refuse_second_derivative("vocabulary_step", grad)
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None


class _DescendAndScore(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        weight,
        hidden,
        targets,
        probabilities,
        x,
        count,
        grad_buffer,
        loss_weight,
        needs_grad,
        keep_state,
        clamps,
        out,
        moved,
    ):
        ctx.set_materialize_grads(False)
        state, free = _step(weight, _from(moved, hidden), probabilities, x, out, clamps)
        score = CrossEntropyRows(targets, count, state.dtype)
        residual, loss = score.softmax(state, in_place=not keep_state)
        if not keep_state:
            state = state.new_empty(0)
        if needs_grad:
            score.to_residual_(residual)
            if free is not None:
                residual.mul_(free)
            if (
                x is not None and probabilities is not None
            ):  # pull r back through p * (W h - p.W h), p fixed
                _through_softmax_(probabilities, residual)
            residual = residual.to(weight.dtype)
            grad_hidden = (residual @ weight).to(hidden.dtype)
            grad_weight = _accumulate_matmul(
                grad_buffer, residual.T, hidden.to(weight.dtype), loss_weight
            )
            ctx.save_for_backward(grad_hidden, *(() if grad_weight is None else (grad_weight,)))
        ctx.mark_non_differentiable(state)
        ctx.spent = False
        return loss, state

    @staticmethod
    def backward(ctx, grad_loss, _):
        _refuse_second_derivative("vocabulary_descend", grad_loss)
        grad_hidden, *grad_weight = _take_saved_grads(ctx, grad_loss, "vocabulary_descend")
        return grad_weight[0] if grad_weight else None, grad_hidden, *(None,) * 11


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, hidden, targets, needs_grad):
        dtype, space = state_dtype(weight), None
        rows = max(1, CHUNK_BYTES // (4 * len(weight)))
        count, total = (targets != IGNORE).sum(), torch.zeros((), dtype=dtype, device=weight.device)
        grad_weight, grad_hidden = (
            torch.zeros(weight.shape if needs_grad else 0, dtype=dtype, device=weight.device),
            torch.empty_like(hidden),
        )
        for part, part_targets, part_grad in zip(
            hidden.split(rows), targets.split(rows), grad_hidden.split(rows)
        ):
            logits = _move(weight, part, None, None, None if space is None else space[: len(part)])
            space = (
                logits if space is None else space
            )  # fresh pages for every chunk cost more than its arithmetic
            score = CrossEntropyRows(part_targets, count, dtype)
            residual, loss = score.softmax(logits, in_place=True)
            total += loss
            if needs_grad:
                residual = score.to_residual_(residual).to(weight.dtype)
                torch.mm(residual, weight, out=part_grad)
                _accumulate_matmul(grad_weight, residual.T, part.to(weight.dtype))
        if needs_grad:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        ctx.spent = False
        return total

    @staticmethod
    def backward(ctx, grad_loss):
        _refuse_second_derivative("vocabulary_cross_entropy", grad_loss)
        grad_hidden, grad_weight = _take_saved_grads(ctx, grad_loss, "vocabulary_cross_entropy")
        return grad_weight, grad_hidden, None, None


def _refuse_second_derivative(operation: str, *gradients: Tensor | None) -> None:
    refuse_graph(operation, PLAIN[operation])
    refuse_transforms(operation, PLAIN[operation], *gradients)


def _take_unspent(ctx, name: str) -> None:
    """Note that a backward used up what its forward kept; raise where one did before."""
    if ctx.spent:
        raise RuntimeError(
            f"{name}: a second backward through the same loss is not possible: the first one took "
            "its gradients; compute the loss again"
        )
    ctx.spent = True


def _take_saved_grads(ctx, grad_loss: Tensor, name: str) -> list[Tensor]:
    """The gradients that a forward prepared, times the loss's: once, since they are scaled in
    place.
    """
    _take_unspent(ctx, name)
    return [tensor.mul_(grad_loss.to(tensor.dtype)) for tensor in ctx.saved_tensors]


def _accumulate_matmul(
    grad_buffer: Tensor | None, left: Tensor, right: Tensor, factor: float = 1.0
) -> Tensor | None:
    """Add factor * left @ right to the grad_buffer, or return left @ right where there is none."""
    if grad_buffer is None:
        return left @ right
    if left.dtype == grad_buffer.dtype:
        grad_buffer.addmm_(left, right, alpha=factor)
    else:
        grad_buffer.add_(left @ right, alpha=factor)
    return None


def _add_rows_(grad_buffer: Tensor, index: Tensor, rows: Tensor) -> None:
    """grad_buffer[index[i]] += rows[i], in the same order every time.

    On a GPU index_add_ adds with atomics; index_put_ sorts the rows by their place and adds each
    run from its first to its last.
    """
    rows = rows.to(grad_buffer.dtype)
    if grad_buffer.device.type == "cpu":
        grad_buffer.index_add_(0, index, rows)
    else:
        grad_buffer.index_put_((index,), rows, accumulate=True)
