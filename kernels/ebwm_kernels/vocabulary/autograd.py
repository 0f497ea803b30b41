"""The autograd functions behind api.py: what each keeps, and what its backward hands out."""

from __future__ import annotations

import torch
from torch import Tensor

from ebwm_kernels.autograd_rules import refuse_graph, refuse_transforms, without_autocast
from ebwm_kernels.fused.launches import runs_fused
from ebwm_kernels.vocabulary import fused_rows
from ebwm_kernels.vocabulary.formulas import (
    NO_CLAMPS,
    Clamps,
    _move,
    _step,
    _through_softmax_,
    state_dtype,
)
from ebwm_kernels.vocabulary.softmax_cross_entropy import (
    IGNORE,
    CrossEntropyRows,
    _softmax,
    chunk_bytes,
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
    x: Tensor,
    weight: Tensor,
    *,
    grad_buffer: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """p = softmax(x) without graph, and p @ weight (rows, D) in weight's dtype: x (rows, V), weight
    (V, D). No gradient flows into x.

    grad_buffer (V, D): receives weight's gradient, by addition, in the backward; autograd gets
    none. out: memory for p, x itself for example. backend: as in pointwise.py.
    """
    refuse_transforms("vocabulary_embed", PLAIN["vocabulary_embed"])
    fused = runs_fused(backend, weight, "vocabulary_embed")
    return _Embed.apply(x, weight, grad_buffer, out, fused)


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
    z_weight: float = 0.0,
    z_sum: Tensor | None = None,
    backend: str = "auto",
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
    x'; its contents are lost also where x' is not kept. z_weight: of the z-loss, logsumexp(x')^2 of
    every row, in the loss (arXiv 2204.02311); z_sum (): receives that part of it, by addition.
    backend: as in pointwise.py.
    """
    refuse_transforms("vocabulary_descend", PLAIN["vocabulary_descend"])
    fused = runs_fused(backend, weight, "vocabulary_descend")
    if targets is None:
        with torch.no_grad():
            arguments = (weight, _from(moved, hidden), probabilities, x, out, clamps)
            return fused_rows.step(*arguments) if fused else _step(*arguments)[0], None
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
        z_weight,
        z_sum,
        fused,
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
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A step of the probabilities update, entered into the next: (p' (rows, V) without graph, e' =
    p' @ weight (rows, D), loss or None). probabilities None: a mirror step
    from moved @ weight.T, or from zeros.

    Equal to `vocabulary_descend` followed by `vocabulary_embed`, except for where weight's gradient
    comes from: the loss has a gradient of hidden alone; weight's gradient of loss_weight * loss
    comes with that of e', since both are products with p'. So both have to be back-propagated, in
    any order or apart from each other, and the loss with the weight that was announced. out: memory
    for p'. backend: as in pointwise.py.
    """
    refuse_transforms("vocabulary_step", PLAIN["vocabulary_step"])
    p, embedded, loss, grad_hidden = _StepEmbed.apply(
        probabilities,
        weight,
        hidden.detach(),
        targets,
        count,
        grad_buffer,
        loss_weight,
        out,
        moved,
        runs_fused(backend, weight, "vocabulary_step"),
    )
    return p, embedded, None if targets is None else _GivenGradient.apply(hidden, loss, grad_hidden)


@without_autocast
def vocabulary_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    clamps: Clamps = NO_CLAMPS,
    z_weight: float = 0.0,
    z_sum: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean cross-entropy of logits hidden @ weight.T, first order: hidden (rows, D), weight (V, D),
    targets (rows,) int64 -> a scalar. clamps, z_weight, z_sum: as in `vocabulary_descend`; backend:
    as in pointwise.py.

    Logits exist for `chunk_bytes` at a time, and their gradients are taken while they do.
    """
    refuse_transforms("vocabulary_cross_entropy", PLAIN["vocabulary_cross_entropy"])
    needs_grad = torch.is_grad_enabled() and (weight.requires_grad or hidden.requires_grad)
    fused = runs_fused(backend, weight, "vocabulary_cross_entropy")
    return _CrossEntropy.apply(weight, hidden, targets, needs_grad, clamps, z_weight, z_sum, fused)


def _from(moved: Tensor | None, hidden: Tensor) -> Tensor:
    return hidden if moved is None else moved + hidden


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, grad_buffer, out, fused):
        ctx.set_materialize_grads(False)  # p has none, and zeros in its place would be (rows, V)
        if fused:
            p, rounded = fused_rows.softmax_and_rounded(x, out, weight.dtype)
        else:
            p = _softmax(x, None if out is None else out.view_as(x))
            rounded = p.to(weight.dtype)
        ctx.save_for_backward(p)
        ctx.mark_non_differentiable(p)
        ctx.grad_buffer = grad_buffer
        return p, rounded @ weight

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
            None,
        )


class _StepEmbed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        probabilities,
        weight,
        hidden,
        targets,
        count,
        grad_buffer,
        loss_weight,
        out,
        moved,
        fused,
    ):
        ctx.set_materialize_grads(False)
        dtype = state_dtype(weight)
        score = None if targets is None else CrossEntropyRows(targets, count, dtype)
        # rounded: what the product reads, p' or p' - onehot
        take_step = fused_rows.probabilities_step if fused else _probabilities_step
        p, loss, rounded = take_step(weight, _from(moved, hidden), probabilities, out, score)
        if score is None:
            embedded = rounded @ weight
            grad_hidden = hidden.new_empty(0)
        else:
            if weight.dtype == p.dtype:
                embedded = rounded @ weight
                beside = embedded - weight[score.target]
            else:  # in half precision e' - W_y would cancel to nothing where p'_y is near 1
                beside = rounded @ weight
                embedded = beside + weight[score.target]
            grad_hidden = (beside.to(p.dtype) * score.share[:, None]).to(hidden.dtype)
        ctx.save_for_backward(p, hidden, targets)
        ctx.count, ctx.grad_buffer, ctx.weight_dtype = count, grad_buffer, weight.dtype
        ctx.loss_weight = loss_weight if score is not None else 0.0
        ctx.fused = fused
        ctx.mark_non_differentiable(p, loss, grad_hidden)
        return p, embedded, loss, grad_hidden

    @staticmethod
    @without_autocast
    def backward(ctx, _, grad_embedded, *__):
        """dW = p' (grad_embedded + s h) - onehot (s h), s = loss_weight / n on rows that count."""
        _refuse_second_derivative("vocabulary_step", grad_embedded)
        if grad_embedded is None:
            return (None,) * 10
        p, hidden, targets = ctx.saved_tensors
        none = (None,) * 8
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
            rounded = fused_rows.rounded_residual if ctx.fused else _rounded_residual
            residual = rounded(score, p, ctx.weight_dtype)
            _accumulate_matmul(grad_buffer, residual.T, right.to(ctx.weight_dtype))
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
        z_weight,
        z_sum,
        fused,
    ):
        ctx.set_materialize_grads(False)
        score = CrossEntropyRows(targets, count, state_dtype(weight), z_weight)
        take_step = fused_rows.step_and_residual if fused else _step_and_residual
        state, loss, residual = take_step(
            weight,
            _from(moved, hidden),
            probabilities,
            x,
            out,
            score,
            clamps,
            needs_grad=needs_grad,
            keep_state=keep_state,
        )
        if z_sum is not None:
            z_sum += score.z_term
        if needs_grad:
            assert residual is not None, "it was asked for"
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
        return grad_weight[0] if grad_weight else None, grad_hidden, *(None,) * 14


def _probabilities_step(
    weight: Tensor,
    hidden: Tensor,
    probabilities: Tensor | None,
    out: Tensor | None,
    score: CrossEntropyRows | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(p', loss, what the product with weight reads: p' - onehot in half precision with targets,
    else p').
    """
    out = None if out is None else out.view(len(hidden), len(weight))
    logits = _move(weight, hidden, probabilities, None, out)
    if score is None:
        p = _softmax(logits, out=logits)
        return p, p.new_zeros(()), p.to(weight.dtype)
    p, loss = score.softmax(logits, in_place=True)
    if weight.dtype == p.dtype:
        return p, loss, p
    return p, loss, score.rounded_residual(p, weight.dtype)


def _step_and_residual(
    weight: Tensor,
    hidden: Tensor,
    probabilities: Tensor | None,
    x: Tensor | None,
    out: Tensor | None,
    score: CrossEntropyRows,
    clamps: Clamps,
    *,
    needs_grad: bool,
    keep_state: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x', empty where it is not kept; loss; its gradient on W h in weight's dtype, or None)."""
    state, free = _step(weight, hidden, probabilities, x, out, clamps)
    residual, loss = score.softmax(state, in_place=not keep_state)
    if not keep_state:
        state = state.new_empty(0)
    if not needs_grad:
        return state, loss, None
    score.to_residual_(residual)
    if free is not None:
        residual.mul_(free)
    if x is not None and probabilities is not None:
        # pull r back through p * (W h - p.W h), p fixed
        _through_softmax_(probabilities, residual)
    return state, loss, residual.to(weight.dtype)


def _rounded_residual(score: CrossEntropyRows, p: Tensor, dtype: torch.dtype) -> Tensor:
    return score.rounded_residual(p, dtype)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, hidden, targets, needs_grad, clamps, z_weight, z_sum, fused):
        dtype = state_dtype(weight)
        rows = max(1, chunk_bytes(weight.device) // (4 * len(weight)))
        count, total = (targets != IGNORE).sum(), torch.zeros((), dtype=dtype, device=weight.device)
        grad_weight, grad_hidden = (
            torch.zeros(weight.shape if needs_grad else 0, dtype=dtype, device=weight.device),
            torch.empty_like(hidden),
        )
        chunk_residual = _fused_chunk if fused else _PlainChunks()
        for part, part_targets, part_grad in zip(
            hidden.split(rows), targets.split(rows), grad_hidden.split(rows)
        ):
            score = CrossEntropyRows(part_targets, count, dtype, z_weight)
            residual, loss = chunk_residual(weight, part, score, clamps, needs_grad)
            total += loss
            if z_sum is not None:
                z_sum += score.z_term
            if residual is not None:
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
        return grad_weight, grad_hidden, *(None,) * 6


class _PlainChunks:
    """(The loss's gradient on a chunk's logits, in weight's dtype, or None; its loss), of rows that
    use one memory in turn: fresh pages for every chunk cost more than its arithmetic.
    """

    space: Tensor | None = None

    def __call__(
        self,
        weight: Tensor,
        hidden: Tensor,
        score: CrossEntropyRows,
        clamps: Clamps,
        needs_grad: bool,
    ) -> tuple[Tensor | None, Tensor]:
        memory = None if self.space is None else self.space[: len(hidden)]
        logits, slope = _step(weight, hidden, None, None, memory, clamps)
        if self.space is None:
            self.space = logits
        residual, loss = score.softmax(logits, in_place=True)
        if not needs_grad:
            return None, loss
        score.to_residual_(residual)
        if slope is not None:
            residual.mul_(slope)
        return residual.to(weight.dtype), loss


def _fused_chunk(
    weight: Tensor, hidden: Tensor, score: CrossEntropyRows, clamps: Clamps, needs_grad: bool
) -> tuple[Tensor | None, Tensor]:
    """The same by one kernel; logits are in weight's dtype, and so is their memory."""
    _, loss, residual = fused_rows.step_and_residual(
        weight,
        hidden,
        None,
        None,
        None,
        score,
        clamps,
        needs_grad=needs_grad,
        keep_state=False,
    )
    return residual, loss


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
