"""Further steps that move the K most probable tokens of the first one (`refinement.candidates`).

    first step      over all V tokens, as without candidates. Of x_1 the K most probable tokens of
                    each position are its candidates; the choice has no gradient
    further steps   those of a vocabulary of these K: e = sum of q_c W_c with q = softmax(x_C), and
                    the update moves x_C alone. All other tokens keep the logits of x_1
    loss            the cross-entropy over all V tokens, after every step

So a further step costs products of size K D per position in place of V D. The formulas and their
derivatives are in ebwm_kernels/vocabulary/candidates.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ebwm_kernels.vocabulary.candidates import (
    Candidates,
    candidates_embed,
    candidates_loss,
    candidates_move,
    first_candidates,
    top_candidates,
)
from ebwm_kernels.vocabulary.formulas import Clamps, clamped_step


class CandidateState(NamedTuple):
    """A state of (B, S) positions after the first step, of which only the candidates move.

    shape: (B, S). candidates: of its B S rows. values (B S, K): their logits. tail (B S,): the
    logsumexp of all other logits; target (B S,): the target's logit after the first step: both
    None without targets. first (B S, V): the state after the first step, where the whole state is
    asked for.
    """

    shape: torch.Size
    candidates: Candidates
    values: Tensor
    tail: Tensor | None = None
    target: Tensor | None = None
    first: Tensor | None = None

    @classmethod
    def chosen(cls, x: Tensor, ids: Tensor) -> CandidateState:
        """Of a whole state x (B, S, V) whose candidates (B, S, K) are known; without targets."""
        candidates = Candidates(ids.flatten(0, 1), x.shape[-1])
        rows = x.flatten(0, 1)
        return cls(x.shape[:2], candidates, rows.gather(1, candidates.ids), first=rows)

    def whole(self) -> Tensor:
        """All logits, (B, S, V)."""
        assert self.first is not None, "the state after the first step was kept"
        state = self.first.scatter(1, self.candidates.ids, self.values.to(self.first.dtype))
        return state.unflatten(0, self.shape)

    def plus(self, noise: Tensor) -> CandidateState:
        """With noise (B, S, V) added to what moves."""
        moves = noise.flatten(0, 1).gather(1, self.candidates.ids)
        return self._replace(values=self.values + moves)

    def detach(self) -> CandidateState:
        """Without a graph."""
        return self._replace(
            values=self.values.detach(),
            tail=None if self.tail is None else self.tail.detach(),
            target=None if self.target is None else self.target.detach(),
        )


@dataclass(frozen=True)
class CandidateSteps:
    """The steps of a vocabulary state with `count` candidates, fewer than its tokens.

    weight (V, D), update_rule, clamps, grad_buffer, backend: those of the state space.
    """

    weight: Tensor
    update_rule: str
    clamps: Clamps
    grad_buffer: Tensor | None
    count: int
    backend: str = "auto"

    def first(
        self,
        direction: Tensor,
        targets: Tensor | None,
        *,
        probabilities: Tensor | None,
        state: Tensor | None,
        keep_whole: bool,
        out: Tensor | None,
    ) -> CandidateState:
        """The step over all tokens, from probabilities or state (B, S, V) as they move.

        direction (B, S, D): -alpha dE/d embed(x); targets (B, S). keep_whole: whole states will be
        asked for. out (B S, V): memory.
        """
        chosen = first_candidates(
            self.weight,
            direction.flatten(0, 1),
            None if targets is None else targets.flatten(),
            self.count,
            probabilities=None if probabilities is None else probabilities.flatten(0, 1),
            x=None if state is None else state.flatten(0, 1),
            keep_state=keep_whole,
            grad_buffer=self.grad_buffer,
            clamps=self.clamps,
            out=out,
            backend=self.backend,
        )
        return CandidateState(
            direction.shape[:2],
            chosen.candidates,
            chosen.values,
            None if targets is None else chosen.tail,
            None if targets is None else chosen.target,
            chosen.state,
        )

    def embed(self, state: CandidateState) -> tuple[Tensor, Tensor]:
        """(e (B, S, D), q (B S, K)) of a state."""
        probabilities = state.values.softmax(-1)
        vectors = candidates_embed(
            probabilities, self.weight, state.candidates, grad_buffer=self.grad_buffer
        )
        return vectors.unflatten(0, state.shape), probabilities

    def update(
        self, state: CandidateState, probabilities: Tensor, direction: Tensor
    ) -> CandidateState:
        """The step of the candidates; probabilities q (B S, K), direction (B, S, D)."""
        move = candidates_move(
            self.weight, direction.flatten(0, 1), state.candidates, grad_buffer=self.grad_buffer
        )
        if self.update_rule == "logits":
            move = probabilities * (move - (probabilities * move).sum(-1, keepdim=True))
        start = probabilities if self.update_rule == "probabilities" else state.values
        return state._replace(values=clamped_step(start, move, self.clamps))

    def loss(
        self,
        state: CandidateState,
        targets: Tensor,
        count: Tensor,
        *,
        z_weight: float = 0.0,
        z_sum: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy over all tokens, a sum over the targets (B, S) that count over `count`;
        with z_weight the z-loss, which z_sum receives too.
        """
        assert state.tail is not None and state.target is not None, "the first step had targets"
        return candidates_loss(
            state.values,
            state.tail,
            state.target,
            state.candidates,
            targets.flatten(),
            count,
            z_weight=z_weight,
            z_sum=z_sum,
        )


def most_probable(x: Tensor, count: int) -> Tensor:
    """The candidates (B, S, count) of whole states x (B, S, V)."""
    return top_candidates(x.flatten(0, 1), count).unflatten(0, x.shape[:2])


def whole_state(state: Tensor | CandidateState) -> Tensor:
    """All numbers of a state, (B, S, size)."""
    return state.whole() if isinstance(state, CandidateState) else state


def with_noise(state: Tensor | CandidateState, noise: Tensor) -> Tensor | CandidateState:
    """A state with noise (B, S, size) added to the numbers that move."""
    if isinstance(state, CandidateState):
        return state.plus(noise)
    return state + noise
