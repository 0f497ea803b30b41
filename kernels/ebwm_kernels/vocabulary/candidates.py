"""Further steps of a vocabulary state that move a few tokens of each row: its candidates.

The first step of a refinement is one of api.py, over all V tokens. Of its state x_1 the K most
probable tokens C of a row are its candidates. Further steps are those of api.py over these K:

    q = softmax(x_C)            e = sum over C of q_c W_c          K D multiply-adds, not V D
    u_c = W_c h                 h = -alpha g
    probabilities:  x'_C = q + u        logits:  x'_C = x_C + q * (u - q.u)      mirror:  x_C + u

All other tokens keep the logits of x_1. So the loss of any step is the cross-entropy over all V:

    T  = logsumexp of the logits of x_1 that are not in C, which no further step changes
    loss = sum over rows of (log(exp(logsumexp(x_C)) + exp(T)) - x_y) / n

x_y is a moved one where the target y is a candidate, otherwise that of x_1. C itself is a constant:
no gradient goes through the choice.

    top_candidates            x -> C. Of equal logits the lowest tokens are chosen first
    first_candidates          h -> C, x_C, T, x_y of the first step. Their gradients come back as
                              one, of x_1, which is turned into those of h and W: three products of
                              size rows * V * D in all, as many as a Transformer++ has
    candidates_embed          q -> e
    candidates_move           h -> u
    candidates_loss           x_C, T, x_y -> loss

W is read where the candidates are, and the gradient of W is added there, token by token: no
(rows, K, D) numbers are made, and every run adds in the same order. Nothing here waits for a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ebwm_kernels.autograd_rules import refuse_graph, refuse_transforms, without_autocast
from ebwm_kernels.fused.launches import runs_fused
from ebwm_kernels.vocabulary import fused_rows
from ebwm_kernels.vocabulary.autograd import _accumulate_matmul, _take_unspent
from ebwm_kernels.vocabulary.formulas import (
    NO_CLAMPS,
    Clamps,
    _step,
    _through_softmax_,
    state_dtype,
)
from ebwm_kernels.vocabulary.softmax_cross_entropy import CrossEntropyRows

# What is differentiable in every mode, by operation.
PLAIN = {
    "first_candidates": "vocabulary.api.vocabulary_descend_reference and a gather",
    "candidates_embed": "vocabulary.candidates.candidates_embed_reference",
    "candidates_move": "vocabulary.candidates.candidates_move_reference",
}


class ByToken(NamedTuple):
    """The (row, candidate) pairs of some rows in the order of their tokens.

    pairs (rows * K,): their places in the flattened candidates; rows: the row of each. tokens (U,):
    the different ones, starts (U,): where each token's pairs begin; U is the smaller one of V and
    rows * K, and what is more than there are tokens has no pairs.
    """

    pairs: Tensor
    rows: Tensor
    tokens: Tensor
    starts: Tensor


@dataclass(frozen=True)
class Candidates:
    """The tokens of each row that move: ids (rows, K) int64, ascending in a row; of num_tokens."""

    ids: Tensor
    num_tokens: int

    @property
    def count(self) -> int:
        """K."""
        return self.ids.shape[1]

    @cached_property
    def by_token(self) -> ByToken:
        """Sorted once, for the gradients of the map of all steps; nobody waits for a device."""
        ordered, pairs = self.ids.flatten().sort(stable=True)
        num_pairs = len(ordered)
        most = min(self.num_tokens, num_pairs)
        is_start = torch.ones_like(ordered, dtype=torch.bool)
        is_start[1:] = ordered[1:] != ordered[:-1]
        number = is_start.cumsum(0) - 1  # of each pair's token among those there are
        tokens = ordered.new_zeros(most).scatter_(0, number, ordered)
        # What is no start goes behind all of them.
        places = torch.where(is_start, number, most)
        starts = ordered.new_full((most + 1,), num_pairs)
        starts.scatter_(0, places, torch.arange(num_pairs, device=ordered.device))
        rows = torch.div(pairs, self.count, rounding_mode="floor")
        return ByToken(pairs, rows, tokens, starts[:most])

    def place_of(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(place (rows,) of each target among the candidates, whether it is one (rows,))."""
        wanted = targets[:, None]
        place = torch.searchsorted(self.ids, wanted).clamp_(max=self.count - 1)
        return place.squeeze(1), (self.ids.gather(1, place) == wanted).squeeze(1)


class FirstCandidates(NamedTuple):
    """What further steps read of the first one.

    candidates: C. values (rows, K): x_C. tail (rows,): T. target (rows,): x_1 of the target, 0
    without targets. state (rows, V): x_1 without graph, where it was asked for.
    """

    candidates: Candidates
    values: Tensor
    tail: Tensor
    target: Tensor
    state: Tensor | None


def top_candidates(x: Tensor, count: int) -> Tensor:
    """The `count` tokens of the largest numbers of x (rows, V): (rows, count) int64, ascending.

    Of equal numbers the lowest tokens come first; a NaN counts as larger than every number.
    count: below V.
    """
    if x.device.type != "cpu":
        return _top_without_waiting(x, count)
    values, ids = x.topk(count + 1, dim=-1, sorted=False)
    least, place = values.min(-1, keepdim=True)
    # The one that is left out goes behind all others.
    ids = ids.scatter(1, place, x.shape[1]).sort(dim=-1).values[:, :count].contiguous()
    # torch.topk takes any of equal numbers. Rows where that matters are rare.
    is_tied = (values == least).sum(-1) > 1
    is_tied |= least.squeeze(1).isnan()
    tied = is_tied.nonzero().squeeze(1)
    if len(tied) == 0:
        return ids
    order = x[tied].sort(dim=-1, descending=True, stable=True).indices
    return ids.index_copy(0, tied, order[:, :count].sort(dim=-1).values)


def _top_without_waiting(x: Tensor, count: int) -> Tensor:
    """`top_candidates` whose operations do not depend on the numbers: nobody waits for a device."""
    least = x.topk(count, dim=-1).values[:, -1:]
    is_nan, least_is_nan = x.isnan(), least.isnan()
    larger = (x > least) | (is_nan & ~least_is_nan)
    equal = (x == least) | (is_nan & least_is_nan)
    missing = count - larger.sum(-1, keepdim=True)
    chosen = larger | (equal & (equal.cumsum(-1, dtype=torch.int32) <= missing))
    # Each chosen token to its place in the row, all others behind the last one.
    place = chosen.cumsum(-1, dtype=torch.int32) - 1
    place = torch.where(chosen, place, count).long()
    tokens = torch.arange(x.shape[1], device=x.device).expand_as(place)
    ids = tokens.new_zeros(len(x), count + 1).scatter_(1, place, tokens)
    return ids[:, :count].contiguous()


@without_autocast
def first_candidates(
    weight: Tensor,
    hidden: Tensor,
    targets: Tensor | None,
    count: int,
    *,
    probabilities: Tensor | None = None,
    x: Tensor | None = None,
    keep_state: bool = False,
    grad_buffer: Tensor | None = None,
    clamps: Clamps = NO_CLAMPS,
    out: Tensor | None = None,
    backend: str = "auto",
) -> FirstCandidates:
    """The first step, over all V tokens, and the `count` candidates of further ones, below V.

    weight (V, D); hidden (rows, D) = -alpha dE/d embed(x); targets (rows,) int64. probabilities, x
    and clamps as in `vocabulary_descend`; no gradient flows into either. values, tail and target
    carry first-order gradients of weight and hidden, which exist once: a second backward through
    them raises. grad_buffer (V, D): receives weight's gradient, by addition, in the backward;
    autograd gets none. out (rows, V): memory for x_1. backend: as in pointwise.py.
    """
    refuse_transforms("first_candidates", PLAIN["first_candidates"])
    needs_grad = torch.is_grad_enabled() and (weight.requires_grad or hidden.requires_grad)
    fused = runs_fused(backend, weight, "first_candidates")
    first = _FusedFirstCandidates if fused else _FirstCandidates
    ids, values, tail, target, state = first.apply(
        weight,
        hidden,
        targets,
        count,
        probabilities,
        x,
        needs_grad,
        keep_state,
        grad_buffer,
        clamps,
        out,
    )
    return FirstCandidates(
        Candidates(ids, len(weight)), values, tail, target, state if keep_state else None
    )


@without_autocast
def candidates_embed(
    probabilities: Tensor,
    weight: Tensor,
    candidates: Candidates,
    *,
    grad_buffer: Tensor | None = None,
) -> Tensor:
    """Sum over the candidates of q_c W_c, (rows, D) in weight's dtype; first order.

    probabilities q (rows, K); weight (V, D). grad_buffer: as in `first_candidates`.
    """
    refuse_transforms("candidates_embed", PLAIN["candidates_embed"])
    return _Embed.apply(probabilities, weight, candidates, grad_buffer)


@without_autocast
def candidates_move(
    weight: Tensor,
    hidden: Tensor,
    candidates: Candidates,
    *,
    grad_buffer: Tensor | None = None,
) -> Tensor:
    """W_c h of every candidate, (rows, K) in the states' dtype; first order.

    weight (V, D); hidden (rows, D). grad_buffer: as in `first_candidates`.
    """
    refuse_transforms("candidates_move", PLAIN["candidates_move"])
    return _Move.apply(weight, hidden, candidates, grad_buffer)


def candidates_embed_reference(probabilities: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """`candidates_embed`, differentiable as often as one likes in both arguments."""
    return torch.einsum("rk,rkd->rd", probabilities.to(weight.dtype), weight[ids])


def candidates_move_reference(weight: Tensor, hidden: Tensor, ids: Tensor) -> Tensor:
    """`candidates_move`, differentiable as often as one likes in both arguments."""
    moves = torch.einsum("rkd,rd->rk", weight[ids], hidden.to(weight.dtype))
    return moves.to(state_dtype(weight))


def candidates_loss(
    values: Tensor,
    tail: Tensor,
    target: Tensor,
    candidates: Candidates,
    targets: Tensor,
    count: Tensor | float | None = None,
    *,
    z_weight: float = 0.0,
    z_sum: Tensor | None = None,
) -> Tensor:
    """The cross-entropy over all V tokens, a scalar, in plain operations.

    values (rows, K): x_C; tail, target (rows,): of `first_candidates`; targets (rows,) int64,
    IGNORE where a row does not count; count, z_weight, z_sum: as in `vocabulary_descend`.
    """
    rows = CrossEntropyRows(targets, count, values.dtype)
    place, is_candidate = candidates.place_of(rows.target)
    of_target = torch.where(is_candidate, values.gather(1, place[:, None]).squeeze(1), target)
    log_normalizer = torch.logaddexp(values.logsumexp(-1), tail)
    loss = ((log_normalizer - of_target) * rows.share).sum()
    if not z_weight:
        return loss
    z_term = z_weight * (log_normalizer.square() * rows.share).sum()
    if z_sum is not None:
        z_sum += z_term.detach()
    return loss + z_term


class _FirstCandidates(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        weight,
        hidden,
        targets,
        count,
        probabilities,
        x,
        needs_grad,
        keep_state,
        grad_buffer,
        clamps,
        out,
    ):
        ctx.set_materialize_grads(False)  # the state has none, and zeros would be (rows, V)
        state, free = _step(weight, hidden, probabilities, x, out, clamps)
        ids = top_candidates(state, count)
        values = state.gather(1, ids)
        kept = state.clone() if keep_state else state.new_empty(0)
        of_target = values.new_zeros(len(values))
        if targets is not None:
            of_target = state.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
        # What is left, in the memory of x_1: the distribution over the other tokens.
        rest = state.scatter_(1, ids, -torch.inf)
        largest = rest.amax(-1)
        torch.softmax(rest, -1, out=rest)
        tail = largest - rest.amax(-1).log()  # the largest one is 1 / sum exp(x - max)
        if needs_grad:
            ctx.through_softmax = x is not None and probabilities is not None
            ctx.save_for_backward(
                weight, hidden, targets, ids, rest, free, probabilities if x is not None else None
            )
            ctx.grad_buffer = grad_buffer
        ctx.spent = False
        ctx.mark_non_differentiable(ids, kept)
        return ids, values, tail, of_target, kept

    @staticmethod
    @without_autocast
    def backward(ctx, _, grad_values, grad_tail, grad_target, *__):
        _refuse_second_derivative("first_candidates", grad_values, grad_tail, grad_target)
        _take_unspent(ctx, "first_candidates")
        weight, hidden, targets, ids, rest, free, probabilities = ctx.saved_tensors
        # The gradient of x_1, in the memory of the distribution over the other tokens.
        grad = rest.mul_(0.0 if grad_tail is None else grad_tail[:, None])
        if grad_values is not None:
            grad.scatter_(1, ids, grad_values)
        if grad_target is not None and targets is not None:
            grad.scatter_add_(1, targets.clamp(min=0)[:, None], grad_target[:, None])
        if free is not None:
            grad.mul_(free)
        if ctx.through_softmax:
            _through_softmax_(probabilities, grad)
        grad = grad.to(weight.dtype)
        grad_hidden = (grad @ weight).to(hidden.dtype)
        grad_weight = _accumulate_matmul(ctx.grad_buffer, grad.T, hidden.to(weight.dtype))
        return grad_weight, grad_hidden, *(None,) * 9


class _FusedFirstCandidates(torch.autograd.Function):
    """The same by the kernels of fused/candidate_kernels.py: x_1 is kept, and read once for each of
    the choice and the gradient. With clamps or through the softmax the move is kept too, and the
    gradient of x_1 is pulled back to it.
    """

    @staticmethod
    def forward(
        ctx,
        weight,
        hidden,
        targets,
        count,
        probabilities,
        x,
        needs_grad,
        keep_state,
        grad_buffer,
        clamps,
        out,
    ):
        ctx.set_materialize_grads(False)
        start, through = (probabilities, None) if x is None else (x, probabilities)
        move = hidden.to(weight.dtype) @ weight.T
        dtype = state_dtype(weight)
        state, *_ = fused_rows.moved_state(move, start, through, clamps, None, dtype, out=out)
        ids, normalizer = fused_rows.choose(state, count)
        values = state.gather(1, ids)
        of_target = values.new_zeros(len(values))
        if targets is not None:
            targets = targets.clamp(min=0)
            of_target = state.gather(1, targets[:, None]).squeeze(1)
        tail = normalizer[:, 0] + normalizer[:, 1].log()
        if needs_grad:
            ctx.is_sum = through is None and clamps == NO_CLAMPS
            kept = (None, None, None) if ctx.is_sum else (move, start, through)
            ctx.save_for_backward(weight, hidden, targets, ids, state, normalizer, *kept)
            ctx.grad_buffer, ctx.clamps = grad_buffer, clamps
        ctx.spent = False
        kept = state if keep_state else state.new_empty(0)
        ctx.mark_non_differentiable(ids, kept)
        return ids, values, tail, of_target, kept

    @staticmethod
    @without_autocast
    def backward(ctx, _, grad_values, grad_tail, grad_target, *__):
        _refuse_second_derivative("first_candidates", grad_values, grad_tail, grad_target)
        _take_unspent(ctx, "first_candidates")
        weight, hidden, targets, ids, state, normalizer, *kept = ctx.saved_tensors
        if grad_tail is None:
            grad_tail = state.new_zeros(len(state))
        if grad_values is None:
            grad_values = state.new_zeros(ids.shape)
        if grad_target is None:
            targets = None
        dtype = weight.dtype if ctx.is_sum else state.dtype
        grad = fused_rows.rest_gradient(state, normalizer, targets, grad_tail, grad_target, dtype)
        if targets is not None and grad_target is not None:
            of_candidate = torch.where(ids == targets[:, None], grad_target[:, None], 0.0)
            grad_values = grad_values + of_candidate
        grad.scatter_(1, ids, grad_values.to(grad.dtype))
        if not ctx.is_sum:
            move, start, through = kept
            grad = fused_rows.pulled_back(grad, move, start, through, ctx.clamps)
        grad_hidden = (grad @ weight).to(hidden.dtype)
        grad_weight = _accumulate_matmul(ctx.grad_buffer, grad.T, hidden.to(weight.dtype))
        return grad_weight, grad_hidden, *(None,) * 9


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, probabilities, weight, candidates, grad_buffer):
        ctx.save_for_backward(probabilities, weight)
        ctx.candidates, ctx.grad_buffer = candidates, grad_buffer
        return _weighted_rows(probabilities, weight, candidates)

    @staticmethod
    @without_autocast
    def backward(ctx, grad):
        _refuse_second_derivative("candidates_embed", grad)
        probabilities, weight = ctx.saved_tensors
        grad_probabilities = grad_weight = None
        if ctx.needs_input_grad[0]:
            moves = _products(weight, grad, ctx.candidates)
            grad_probabilities = moves.to(probabilities.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = _add_outer(ctx.grad_buffer, weight, ctx.candidates, probabilities, grad)
        return grad_probabilities, grad_weight, None, None


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, hidden, candidates, grad_buffer):
        ctx.save_for_backward(weight, hidden)
        ctx.candidates, ctx.grad_buffer = candidates, grad_buffer
        return _products(weight, hidden, candidates).to(state_dtype(weight))

    @staticmethod
    @without_autocast
    def backward(ctx, grad):
        _refuse_second_derivative("candidates_move", grad)
        weight, hidden = ctx.saved_tensors
        grad_weight = grad_hidden = None
        if ctx.needs_input_grad[0]:
            grad_weight = _add_outer(ctx.grad_buffer, weight, ctx.candidates, grad, hidden)
        if ctx.needs_input_grad[1]:
            grad_hidden = _weighted_rows(grad, weight, ctx.candidates).to(hidden.dtype)
        return grad_weight, grad_hidden, None, None


def _weighted_rows(numbers: Tensor, weight: Tensor, candidates: Candidates) -> Tensor:
    """Sum over the candidates of numbers (rows, K) times W_c: (rows, D)."""
    return F.embedding_bag(
        candidates.ids, weight, per_sample_weights=numbers.to(weight.dtype), mode="sum"
    )


def _products(weight: Tensor, vectors: Tensor, candidates: Candidates) -> Tensor:
    """W_c times the row's vector, of vectors (rows, D): (rows, K) in weight's dtype.

    That is the gradient of a weighted sum of rows by the weights, which PyTorch has.
    """
    num_rows, count = candidates.ids.shape
    rows = torch.arange(num_rows, device=weight.device)
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        vectors.to(weight.dtype),
        weight,
        candidates.ids.flatten(),
        rows * count,
        rows.repeat_interleave(count),
        0,  # a sum
    )
    return products.view(num_rows, count)


def _add_outer(
    grad_buffer: Tensor | None,
    weight: Tensor,
    candidates: Candidates,
    numbers: Tensor,
    vectors: Tensor,
) -> Tensor | None:
    """Add numbers (rows, K) times vectors (rows, D) to the rows of the candidates' tokens.

    In the grad_buffer, or in a (V, D) tensor that is returned where there is none.
    """
    found = candidates.by_token
    dtype = state_dtype(weight)
    sums = F.embedding_bag(
        found.rows,
        vectors.to(dtype),
        found.starts,
        per_sample_weights=numbers.to(dtype).flatten()[found.pairs],
        mode="sum",
    )
    if grad_buffer is not None:
        grad_buffer.index_add_(0, found.tokens, sums.to(grad_buffer.dtype))
        return None
    whole = weight.new_zeros(weight.shape, dtype=dtype)
    return whole.index_add_(0, found.tokens, sums).to(weight.dtype)


def _refuse_second_derivative(operation: str, *gradients: Tensor | None) -> None:
    refuse_graph(operation, PLAIN[operation])
    refuse_transforms(operation, PLAIN[operation], *gradients)
