"""The vocabulary side of a refinement step, in chunks of rows: nothing of size (rows, V) is kept but the state itself.

A vocabulary state x holds V numbers per row. With p = softmax(x), a map W (V, D) and the energy's gradient g with respect to the
embedded state e = p W, one refinement step and its cross-entropy against a target y are

    probabilities:  x' = p - alpha * W g                     dE/dp = W g: the softmaxed variable is the one that descends
    logits:         x' = x - alpha * p * (W g - e.g)         dE/dx: through the softmax
    loss = mean over rows of  logsumexp(x') - x'_y

`vocabulary_embed` and `vocabulary_descend` are these two lines for a state that carries no gradient (refinement.graph detach and
truncate). Since nothing differentiates the loss a second time, its gradient r = (softmax(x') - onehot(y)) / n is turned into the
gradients of g, W and alpha while x' is at hand: 3 products of size rows * V * D per step instead of a stored (rows, V) tensor per
operation. `vocabulary_descend_reference` is the same in plain autograd; a state that does carry a gradient (graph full) uses that.

Rows are the flattened (batch, position) pairs. States are float32 (float64 in tests) whatever the dtype of W.
"""
from __future__ import annotations

import torch
from torch import Tensor

from .contract import refuse_graph

IGNORE = -100               # target of a row that does not count
CHUNK_BYTES = 16 * 2**20    # of state per chunk: large enough for efficient products, small beside the state


def vocabulary_embed(x: Tensor, weight: Tensor) -> Tensor:
    """softmax(x) @ weight: x (rows, V), weight (V, D) -> (rows, D) in weight's dtype. No gradient flows into x."""
    return _Embed.apply(x, weight)


def vocabulary_embed_reference(x: Tensor, weight: Tensor) -> Tensor:
    """The same, differentiable as often as one likes in both arguments."""
    return x.softmax(-1).to(weight.dtype) @ weight


def vocabulary_descend(x: Tensor, weight: Tensor, gradient: Tensor, step_size: Tensor, targets: Tensor | None, *, update: str,
                       keep_state: bool = True) -> tuple[Tensor | None, Tensor | None]:
    """One descent step and its loss: (x' (rows, V) without graph or None, mean cross-entropy, a scalar, or None without targets).

    x (rows, V); weight (V, D); gradient (rows, D) = dE/d embed(x); step_size a scalar or (rows, 1) tensor; targets (rows,) int64,
    IGNORE where a row does not count; update: "probabilities" or "logits"; keep_state False: x' is not wanted and not stored.
    The loss has first-order gradients with respect to weight, gradient and step_size.
    """
    if targets is None:
        with torch.no_grad():
            return _descend(x, weight, gradient, step_size, update), None
    wanted = torch.is_grad_enabled() and (weight.requires_grad or gradient.requires_grad or step_size.requires_grad)
    loss, state = _DescendAndScore.apply(x, weight, gradient, step_size, targets, update, keep_state, wanted)
    return (state if keep_state else None), loss


def vocabulary_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits hidden @ weight.T, first order: hidden (rows, D), weight (V, D), targets (rows,) int64 -> scalar float32.

    The same trick for a model that predicts logits directly: the logits of a chunk are turned into gradients while they are at hand.
    """
    wanted = torch.is_grad_enabled() and (weight.requires_grad or hidden.requires_grad)
    return _CrossEntropy.apply(hidden, weight, targets, wanted)


def vocabulary_descend_reference(x: Tensor, weight: Tensor, gradient: Tensor, step_size: Tensor, *, update: str) -> Tensor:
    """x' in plain differentiable operations."""
    probabilities = x.softmax(-1)
    slope = (gradient @ weight.T).to(x.dtype)                       # dE/dp
    if update == "probabilities":
        return probabilities - step_size * slope
    return x - step_size * (probabilities * (slope - (probabilities * slope).sum(-1, keepdim=True)))


class _Chunks:
    """Row slices of a (rows, V) state and reusable buffers of a slice's size: fresh pages for every operation cost more than its arithmetic."""

    def __init__(self, num_rows: int, vocabulary_size: int, dtype: torch.dtype, device: torch.device):
        self.num_rows, self.size = num_rows, max(1, min(num_rows, CHUNK_BYTES // (4 * vocabulary_size)))
        self.options = {"dtype": dtype, "device": device}
        self.vocabulary_size, self.buffers = vocabulary_size, {}

    def __iter__(self):
        for start in range(0, self.num_rows, self.size):
            yield slice(start, min(start + self.size, self.num_rows))

    def buffer(self, name: str, rows: slice, dtype: torch.dtype | None = None) -> Tensor:
        if name not in self.buffers:
            self.buffers[name] = torch.empty(self.size, self.vocabulary_size, **{**self.options, "dtype": dtype or self.options["dtype"]})
        return self.buffers[name][:rows.stop - rows.start]

    def softmax(self, x: Tensor, rows: slice, name: str = "probabilities") -> Tensor:
        """softmax of x (the rows' slice) in a buffer."""
        return torch.softmax(x, -1, out=self.buffer(name, rows))

    def product(self, left: Tensor, weight: Tensor, rows: slice, name: str) -> Tensor:
        """left (n, D) @ weight (V, D)' in a buffer, in the state's dtype."""
        if left.dtype == self.options["dtype"]:
            return torch.mm(left, weight.T, out=self.buffer(name, rows))
        return self.buffer(name, rows).copy_(torch.mm(left, weight.T, out=self.buffer(f"{name}, half", rows, left.dtype)))


def _rows_of(step_size: Tensor, rows: slice) -> Tensor:
    return step_size if step_size.ndim == 0 else step_size[rows]


def _descend(x: Tensor, weight: Tensor, gradient: Tensor, step_size: Tensor, update: str) -> Tensor:
    result, chunks = torch.empty_like(x), _Chunks(*x.shape, x.dtype, x.device)
    for rows in chunks:
        _move(chunks, rows, x, weight, gradient, step_size, update, result[rows])
    return result


def _move(chunks: _Chunks, rows: slice, x: Tensor, weight: Tensor, gradient: Tensor, step_size: Tensor, update: str, out: Tensor):
    """Write x' of the rows into out; (p, dE/dp or dE/dx: whatever the update descends), both in buffers."""
    slope = chunks.product(gradient[rows], weight, rows, "slope")
    probabilities = chunks.softmax(x[rows], rows)
    if update == "logits":
        slope.sub_((probabilities * slope).sum(-1, keepdim=True)).mul_(probabilities)
    torch.addcmul(x[rows] if update == "logits" else probabilities, _rows_of(step_size, rows).to(x.dtype), slope, value=-1, out=out)
    return probabilities, slope


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        result, chunks = weight.new_empty(x.shape[0], weight.shape[1]), _Chunks(*x.shape, x.dtype, x.device)
        for rows in chunks:
            torch.mm(chunks.softmax(x[rows], rows).to(weight.dtype), weight, out=result[rows])
        return result

    @staticmethod
    def backward(ctx, grad):
        refuse_graph("vocabulary_embed", "second")
        x, weight = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return None, None
        grad_weight, chunks = torch.zeros(weight.shape, dtype=x.dtype, device=weight.device), _Chunks(*x.shape, x.dtype, x.device)
        for rows in chunks:
            _accumulate(grad_weight, chunks.softmax(x[rows], rows).to(weight.dtype).T, grad[rows])
        return None, grad_weight.to(weight.dtype)


class _DescendAndScore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, gradient, step_size, targets, update, keep_state, wanted):
        count = (targets != IGNORE).sum().clamp(min=1).to(x.dtype)
        state = torch.empty_like(x) if keep_state else x.new_empty(0)
        loss = x.new_zeros(())
        grad_weight = torch.zeros(weight.shape, dtype=x.dtype, device=weight.device) if wanted else None
        grad_gradient = torch.empty_like(gradient) if wanted else None
        grad_step = x.new_zeros(step_size.shape) if wanted else None
        chunks = _Chunks(*x.shape, x.dtype, x.device)
        for rows in chunks:
            moved = state[rows] if keep_state else chunks.buffer("moved", rows)
            probabilities, slope = _move(chunks, rows, x, weight, gradient, step_size, update, moved)
            # p is read again for the logits update only; otherwise r takes its buffer
            chunk_loss, residual = _score(moved, targets[rows], count, chunks, rows, "residual" if update == "logits" else "probabilities", wanted)
            loss += chunk_loss
            if not wanted:
                continue
            descent = torch.einsum("rv,rv->r", residual, slope)     # -dloss/dalpha per row
            if step_size.ndim == 0:
                grad_step -= descent.sum()
            else:
                grad_step[rows] = -descent[:, None]
            if update == "logits":                                  # pull r back through p * (W g - p.W g), p fixed
                residual.mul_(probabilities)
                residual.sub_(probabilities.mul_(residual.sum(-1, keepdim=True)))
            residual.mul_(-_rows_of(step_size, rows).to(x.dtype))
            residual = residual.to(weight.dtype)
            torch.mm(residual, weight, out=grad_gradient[rows])
            _accumulate(grad_weight, residual.T, gradient[rows])
        if wanted:
            ctx.save_for_backward(grad_weight.to(weight.dtype), grad_gradient, grad_step.to(step_size.dtype))
        ctx.mark_non_differentiable(state)
        return loss, state

    @staticmethod
    def backward(ctx, grad_loss, _):
        refuse_graph("vocabulary_descend", "second")
        grad_weight, grad_gradient, grad_step = (tensor * grad_loss.to(tensor.dtype) for tensor in ctx.saved_tensors)
        return None, grad_weight, grad_gradient, grad_step, None, None, None, None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, wanted):
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        count = (targets != IGNORE).sum().clamp(min=1).to(dtype)
        loss = torch.zeros((), dtype=dtype, device=hidden.device)
        grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if wanted else None
        grad_hidden = torch.empty_like(hidden) if wanted else None
        chunks = _Chunks(len(hidden), len(weight), dtype, hidden.device)
        for rows in chunks:
            logits = chunks.product(hidden[rows], weight, rows, "logits")
            chunk_loss, residual = _score(logits, targets[rows], count, chunks, rows, "residual", wanted)
            loss += chunk_loss
            if wanted:
                residual = residual.to(weight.dtype)
                torch.mm(residual, weight, out=grad_hidden[rows])
                _accumulate(grad_weight, residual.T, hidden[rows])
        if wanted:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        refuse_graph("vocabulary_cross_entropy", "second")
        grad_hidden, grad_weight = (tensor * grad_loss.to(tensor.dtype) for tensor in ctx.saved_tensors)
        return grad_hidden, grad_weight, None, None


def _score(logits: Tensor, targets: Tensor, count: Tensor, chunks: _Chunks, rows: slice, buffer: str, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """(sum of cross-entropies / count, their gradient r = (softmax(logits) - onehot) / count in a buffer, or None)."""
    counted = (targets != IGNORE).to(logits.dtype)
    target = targets.clamp(min=0)[:, None]
    if not wanted:
        return ((logits.logsumexp(-1, keepdim=True) - logits.gather(-1, target)).squeeze(-1) * counted).sum() / count, None
    residual = chunks.softmax(logits, rows, buffer)
    log_normalizer = logits.amax(-1, keepdim=True) - residual.amax(-1, keepdim=True).log()      # the largest p is 1 / sum exp(x - max)
    loss = ((log_normalizer - logits.gather(-1, target)).squeeze(-1) * counted).sum() / count
    residual.scatter_add_(-1, target, residual.new_full((), -1.0).expand_as(target))
    return loss, residual.mul_((counted / count)[:, None])


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, summed in total's precision."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
