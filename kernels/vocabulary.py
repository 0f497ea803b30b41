"""The vocabulary side of a refinement step: nothing of size (rows, V) is kept but one tensor per step, and no product is made twice.

A vocabulary state x holds V numbers per row. With p = softmax(x), a map W (V, D), the energy's gradient g with respect to the embedded
state e = p W, and h = -alpha g, one refinement step and its cross-entropy against a target y are

    probabilities:  x' = p + W h                             descends dE/dp = W g: the softmaxed variable is the one that moves
    logits:         x' = x + p * (W h - p.W h)               descends dE/dx: through the softmax
    mirror:         x' = x + W h                             p' ~ p exp(-alpha dE/dp): mirror descent on the simplex
    loss = mean over rows of  logsumexp(x') - x'_y           its gradient on x':  r = (p' - onehot(y)) / n,  p' = softmax(x')

Everything here is for states that carry no gradient (refinement.graph detach and truncate); `vocabulary_descend_reference` is the step
in plain autograd, for one that does (full). Nothing differentiates the loss a second time, so its gradient needs no graph:

    vocabulary_embed      x -> p, e
    vocabulary_descend    p, h -> x', loss.   r is turned into the gradients of h and W while x' is at hand, chunk by chunk: the last step,
                          and the logits update. Without p it is the loss of a model that predicts logits directly
    vocabulary_step       p, h -> p', e', loss of a step with another one behind it (probabilities). The loss's gradient on h is
                          r W = (e' - W_y) / n, known at once, and the two gradients of W, of this loss and of e', are both products with
                          p': one serves both, which makes three products of size rows * V * D per step, as many as a Transformer++ has

Rows are the flattened (batch, position) pairs. States are float32 (float64 in tests) whatever the dtype of W.
"""
from __future__ import annotations

import torch
from torch import Tensor

from .contract import refuse_graph

IGNORE = -100               # target of a row that does not count
CHUNK_BYTES = 16 * 2**20    # of state per chunk: large enough for efficient products, small beside the state


def vocabulary_embed(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """p = softmax(x) without graph, and p @ weight (rows, D) in weight's dtype: x (rows, V), weight (V, D). No gradient flows into x."""
    return _Embed.apply(x, weight)


def vocabulary_descend(weight: Tensor, hidden: Tensor, targets: Tensor | None, *, probabilities: Tensor | None = None,
                       x: Tensor | None = None, keep_state: bool = False) -> tuple[Tensor | None, Tensor | None]:
    """One descent step and its loss: (x' (rows, V) without graph or None, mean cross-entropy, a scalar, or None without targets).

    weight (V, D); hidden (rows, D) = -alpha dE/d embed(x); targets (rows,) int64, IGNORE where a row does not count. With `probabilities`
    p (rows, V) alone, p is what moves; with x alone, x is; with both, x moves through the softmax. With neither, x' = hidden @ weight.T: a
    model that predicts logits directly.
    keep_state False: x' is not wanted and not stored. The loss is float32 or float64, with first-order gradients of weight and hidden,
    which exist once: a second backward through it raises.
    """
    if targets is None:
        with torch.no_grad():
            return _descend(weight, hidden, probabilities, x), None
    wanted = torch.is_grad_enabled() and (weight.requires_grad or hidden.requires_grad)
    loss, state = _DescendAndScore.apply(weight, hidden, targets, probabilities, x, keep_state, wanted)
    return (state if keep_state else None), loss


def vocabulary_step(probabilities: Tensor, weight: Tensor, hidden: Tensor, targets: Tensor | None, *,
                    loss_weight: float = 1.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """A step of the probabilities update, entered into the next: (p' (rows, V) without graph, e' = p' @ weight (rows, D), loss or None).

    Equal to `vocabulary_descend` followed by `vocabulary_embed`, except for where weight's gradient comes from: the loss has a gradient of
    hidden alone; weight's gradient of loss_weight * loss comes with that of e', since both are products with p'. So both have to be
    back-propagated, in any order or apart from each other, and the loss with the weight that was announced.
    """
    p, embedded, loss, grad_hidden = _StepEmbed.apply(probabilities, weight, hidden.detach(), targets, loss_weight)
    return p, embedded, None if targets is None else _GivenGradient.apply(hidden, loss, grad_hidden)


def vocabulary_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits hidden @ weight.T, first order: hidden (rows, D), weight (V, D), targets (rows,) int64 -> a scalar."""
    return vocabulary_descend(weight, hidden, targets)[1]


def vocabulary_embed_reference(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`vocabulary_embed`, differentiable as often as one likes in both arguments."""
    probabilities = x.softmax(-1)
    return probabilities, probabilities.to(weight.dtype) @ weight


def vocabulary_descend_reference(weight: Tensor, hidden: Tensor, *, probabilities: Tensor | None = None, x: Tensor | None = None) -> Tensor:
    """x' of `vocabulary_descend` in plain differentiable operations."""
    move = (hidden.to(weight.dtype) @ weight.T).to(_state_dtype(weight))
    if x is None or probabilities is None:
        return (probabilities if x is None else x) + move
    return x + probabilities * (move - (probabilities * move).sum(-1, keepdim=True))


class _Chunks:
    """Row slices of a (rows, V) state, and buffers of a slice's size: fresh pages for every operation cost more than its arithmetic."""

    def __init__(self, num_rows: int, vocabulary_size: int, dtype: torch.dtype, device: torch.device):
        self.num_rows, self.size = num_rows, max(1, min(num_rows, CHUNK_BYTES // (4 * vocabulary_size)))
        self.dtype, self.device = dtype, device
        self.vocabulary_size, self.buffers = vocabulary_size, {}

    def __iter__(self):
        for start in range(0, self.num_rows, self.size):
            yield slice(start, min(start + self.size, self.num_rows))

    def buffer(self, name: str, rows: slice, dtype: torch.dtype | None = None) -> Tensor:
        if name not in self.buffers:
            self.buffers[name] = torch.empty(self.size, self.vocabulary_size, dtype=dtype or self.dtype, device=self.device)
        return self.buffers[name][:rows.stop - rows.start]

    def product(self, hidden: Tensor, weight: Tensor, rows: slice, out: Tensor, plus: Tensor | None = None) -> Tensor:
        """out = (plus +) hidden[rows] @ weight.T, in the state's dtype."""
        if weight.dtype == self.dtype:
            if plus is None:
                return torch.mm(hidden[rows], weight.T, out=out)
            return torch.addmm(plus[rows], hidden[rows], weight.T, out=out)
        half = torch.mm(hidden[rows].to(weight.dtype), weight.T, out=self.buffer("half", rows, weight.dtype))
        return out.copy_(half) if plus is None else torch.add(plus[rows], half, out=out)

    def move(self, weight: Tensor, hidden: Tensor, rows: slice, probabilities: Tensor | None, x: Tensor | None, out: Tensor) -> Tensor:
        """out = x' of the rows."""
        if x is None or probabilities is None:
            return self.product(hidden, weight, rows, out, probabilities if x is None else x)
        p, slope = probabilities[rows], self.product(hidden, weight, rows, self.buffer("slope", rows))
        return torch.addcmul(x[rows], slope.sub_(torch.linalg.vecdot(p, slope)[:, None]), p, out=out)


def _state_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _descend(weight: Tensor, hidden: Tensor, probabilities: Tensor | None, x: Tensor | None) -> Tensor:
    chunks = _Chunks(len(hidden), len(weight), _state_dtype(weight), weight.device)
    result = torch.empty(len(hidden), len(weight), dtype=chunks.dtype, device=chunks.device)
    for rows in chunks:
        chunks.move(weight, hidden, rows, probabilities, x, result[rows])
    return result


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.set_materialize_grads(False)        # p has none, and zeros in its place would be (rows, V)
        p, embedded = torch.empty_like(x), weight.new_empty(x.shape[0], weight.shape[1])
        for rows in _Chunks(*x.shape, x.dtype, x.device):
            torch.mm(torch.softmax(x[rows], -1, out=p[rows]).to(weight.dtype), weight, out=embedded[rows])
        ctx.save_for_backward(p)
        ctx.mark_non_differentiable(p)
        return p, embedded

    @staticmethod
    def backward(ctx, _, grad):
        refuse_graph("vocabulary_embed", "second")
        p, = ctx.saved_tensors
        return None, None if grad is None else _transposed_product(p, grad)


class _StepEmbed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, probabilities, weight, hidden, targets, loss_weight):
        ctx.set_materialize_grads(False)
        p, embedded = torch.empty_like(probabilities), weight.new_empty(hidden.shape)
        beside = None if targets is None else weight.new_empty(hidden.shape)        # e' - W_y
        score = None if targets is None else _Score(targets, p.dtype)
        chunks = _Chunks(*p.shape, p.dtype, p.device)
        for rows in chunks:
            logits = chunks.move(weight, hidden, rows, probabilities, None, chunks.buffer("logits", rows))
            torch.softmax(logits, -1, out=p[rows])
            if score is None:
                torch.mm(p[rows].to(weight.dtype), weight, out=embedded[rows])
            elif weight.dtype == p.dtype:
                score.add(logits, p[rows], rows)
                torch.mm(p[rows], weight, out=embedded[rows])
                torch.sub(embedded[rows], weight[score.target[rows]], out=beside[rows])
            else:                                           # in half precision e' - W_y would cancel to nothing where p'_y is near 1
                score.add(logits, p[rows], rows)
                torch.mm(score.rounded_residual(p, rows, weight.dtype), weight, out=beside[rows])
                torch.add(beside[rows], weight[score.target[rows]], out=embedded[rows])
        loss = p.new_zeros(()) if score is None else score.total
        grad_hidden = hidden.new_empty(0) if score is None else (beside.to(p.dtype) * score.share[:, None]).to(hidden.dtype)
        ctx.save_for_backward(p, hidden, targets)
        ctx.loss_weight, ctx.weight_dtype = loss_weight if score is not None else 0.0, weight.dtype
        ctx.mark_non_differentiable(p, loss, grad_hidden)
        return p, embedded, loss, grad_hidden

    @staticmethod
    def backward(ctx, _, grad_embedded, *__):
        """dW = p' (grad_embedded + s h) - onehot (s h), with s = loss_weight / n on rows that count."""
        refuse_graph("vocabulary_step", "second")
        if grad_embedded is None:
            return (None,) * 5
        p, hidden, targets = ctx.saved_tensors
        if ctx.loss_weight == 0:
            return None, _transposed_product(p, grad_embedded), None, None, None
        score = _Score(targets, p.dtype)
        scaled = score.share[:, None] * ctx.loss_weight * hidden
        right = scaled + grad_embedded
        if ctx.weight_dtype == p.dtype:
            grad_weight = p.T @ right
            grad_weight.index_add_(0, score.target, scaled, alpha=-1)
        else:                                               # (p' - onehot) (grad_embedded + s h) + onehot grad_embedded
            dtype, right = ctx.weight_dtype, right.to(ctx.weight_dtype)
            grad_weight, chunks = p.new_zeros(p.shape[1], hidden.shape[1]), _Chunks(*p.shape, p.dtype, p.device)
            for rows in chunks:
                grad_weight += score.rounded_residual(p, rows, dtype).T @ right[rows]
            grad_weight.index_add_(0, score.target, grad_embedded.to(p.dtype))
            grad_weight = grad_weight.to(dtype)
        return None, grad_weight, None, None, None


class _GivenGradient(torch.autograd.Function):
    """A scalar whose gradient with respect to one tensor is known already."""

    @staticmethod
    def forward(ctx, source, value, gradient):
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        refuse_graph("vocabulary_step", "second")
        gradient, = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None


class _DescendAndScore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, hidden, targets, probabilities, x, keep_state, wanted):
        ctx.set_materialize_grads(False)
        chunks = _Chunks(len(hidden), len(weight), _state_dtype(weight), weight.device)
        score = _Score(targets, chunks.dtype)
        state = torch.empty(len(hidden) if keep_state else 0, len(weight), dtype=chunks.dtype, device=chunks.device)
        grad_weight = torch.empty(weight.shape, dtype=chunks.dtype, device=chunks.device) if wanted else None
        grad_hidden = weight.new_empty(hidden.shape) if wanted else None
        for rows in chunks:
            moved = chunks.move(weight, hidden, rows, probabilities, x, state[rows] if keep_state else chunks.buffer("logits", rows))
            residual = torch.softmax(moved, -1, out=chunks.buffer("residual", rows))
            score.add(moved, residual, rows)
            if not wanted:
                continue
            residual.scatter_add_(-1, score.target[rows, None], residual.new_full((), -1.0).expand(len(residual), 1))
            residual.mul_(score.share[rows, None])
            if x is not None and probabilities is not None: # pull r back through p * (W h - p.W h), p fixed
                p = probabilities[rows]
                residual.sub_(torch.linalg.vecdot(p, residual)[:, None]).mul_(p)
            residual = residual.to(weight.dtype)
            torch.mm(residual, weight, out=grad_hidden[rows])
            _accumulate(grad_weight, residual.T, hidden[rows].to(weight.dtype), first=rows.start == 0)
        if wanted:
            ctx.save_for_backward(grad_weight.to(weight.dtype), grad_hidden.to(hidden.dtype))
        ctx.mark_non_differentiable(state)
        ctx.spent = False
        return score.total, state

    @staticmethod
    def backward(ctx, grad_loss, _):
        refuse_graph("vocabulary_descend", "second")
        if ctx.spent:
            raise RuntimeError("vocabulary_descend: a second backward through the same loss is not possible: the first one took its "
                               "gradients; compute the loss again")
        ctx.spent = True
        grad_weight, grad_hidden = (tensor.mul_(grad_loss.to(tensor.dtype)) for tensor in ctx.saved_tensors)
        return grad_weight, grad_hidden, None, None, None, None, None


class _Score:
    """The mean cross-entropy of rows, added up chunk by chunk. target: (rows,) with 0 where none is; share: 1 / n, or 0 there."""

    def __init__(self, targets: Tensor, dtype: torch.dtype):
        counted = (targets != IGNORE).to(dtype)
        self.target, self.counted = targets.clamp(min=0), counted
        self.share = counted / counted.sum().clamp(min=1)
        self.total = counted.new_zeros(())

    def add(self, logits: Tensor, probabilities: Tensor, rows: slice) -> None:
        """Rows whose softmax is known already."""
        log_normalizer = logits.amax(-1) - probabilities.amax(-1).log()             # the largest p is 1 / sum exp(x - max)
        self.total += ((log_normalizer - logits.gather(-1, self.target[rows, None]).squeeze(-1)) * self.share[rows]).sum()

    def rounded_residual(self, probabilities: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
        """p - onehot(y) of the rows, rounded to a half precision after the subtraction."""
        p, target = probabilities[rows], self.target[rows, None]
        return p.to(dtype).scatter_(-1, target, (p.gather(-1, target) - 1).to(dtype))


def _transposed_product(p: Tensor, right: Tensor) -> Tensor:
    """p' @ right (V, D) of p (rows, V) and right (rows, D), in right's dtype, summed in p's."""
    if p.dtype == right.dtype:
        return p.T @ right
    total, chunks = p.new_empty(p.shape[1], right.shape[1]), _Chunks(*p.shape, p.dtype, p.device)
    for rows in chunks:
        _accumulate(total, p[rows].to(right.dtype).T, right[rows], first=rows.start == 0)
    return total.to(right.dtype)


def _accumulate(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """total (+)= left @ right, summed in total's precision; `first` overwrites what total holds."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, beta=0 if first else 1)
    elif first:
        total.copy_(left @ right)
    else:
        total += left @ right
