"""The states that thinking moves: rows of all numbers, and with `refinement.candidates` which of
them still move.

A row's candidates are the most probable tokens after the first step that it took; until then all
tokens move. Where a step is undone only rows that took none are without candidates: both kinds can
stand beside each other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ebwm_scale.model.candidates import CandidateState, most_probable, whole_state
from ebwm_scale.model.states import EmbeddedState, EmbeddingState, VocabularyState
from ebwm_scale.refinement.step_plan import INFERENCE_STEP


@dataclass(frozen=True)
class ThinkingState:
    """Rows (B, K) of states.

    x (B, K, size): all numbers. candidates (B, K, n): of rows where has_candidates (B, K) says so;
    both None while no row has any.
    """

    space: VocabularyState | EmbeddingState
    x: Tensor
    candidates: Tensor | None = None
    has_candidates: Tensor | None = None

    def with_noise(self, noise: Tensor) -> ThinkingState:
        """With noise (B, K, size) added to the numbers that move."""
        if self.candidates is None or self.has_candidates is None:
            return self._replace(self.x + noise)
        moves = torch.zeros_like(self.x, dtype=torch.bool).scatter_(-1, self.candidates, True)
        moves |= ~self.has_candidates[..., None]
        return self._replace(torch.where(moves, self.x + noise, self.x))

    def embed(self, *, overwrite: bool = False) -> EmbeddedRows:
        """What a step needs of the rows, which stay as they are unless they may be overwritten."""
        sparse = dense = None
        if self.candidates is not None:
            sparse = self.space.embed(CandidateState.chosen(self.x, self.candidates))
        if sparse is None or not self._all_have_candidates():
            dense = self.space.embed(self.x if overwrite else self.x.clone())
        return EmbeddedRows(self, dense, sparse)

    def where(self, taken: Tensor, before: ThinkingState) -> ThinkingState:
        """These rows where `taken` (B, K) says so, those of `before` elsewhere."""
        x = torch.where(taken[..., None], self.x, before.x)
        if self.candidates is None or self.has_candidates is None:
            return self._replace(x)
        candidates, has_candidates = self.candidates, taken & self.has_candidates
        if before.candidates is not None and before.has_candidates is not None:
            candidates = torch.where(taken[..., None], candidates, before.candidates)
            has_candidates |= before.has_candidates
        return ThinkingState(self.space, x, candidates, has_candidates)

    def select(self, rows: Tensor) -> ThinkingState:
        """Of some of the B contexts."""
        if self.candidates is None or self.has_candidates is None:
            return self._replace(self.x[rows])
        return ThinkingState(
            self.space, self.x[rows], self.candidates[rows], self.has_candidates[rows]
        )

    def put(self, rows: Tensor, part: ThinkingState) -> ThinkingState:
        """These with some of the B contexts replaced; x in place."""
        self.x[rows] = part.x
        if part.candidates is None or part.has_candidates is None:
            return self
        shape = self.x.shape[:2]
        candidates, has_candidates = self.candidates, self.has_candidates
        if candidates is None or has_candidates is None:
            candidates = part.candidates.new_zeros(*shape, part.candidates.shape[-1])
            has_candidates = part.has_candidates.new_zeros(shape)
        candidates = candidates.index_copy(0, rows, part.candidates)
        has_candidates = has_candidates.index_copy(0, rows, part.has_candidates)
        return ThinkingState(self.space, self.x, candidates, has_candidates)

    def chooses(self) -> int | None:
        """How many candidates a row has after its first step; None: all numbers go on moving."""
        return self.space.num_candidates if isinstance(self.space, VocabularyState) else None

    def _all_have_candidates(self) -> bool:
        return self.has_candidates is not None and bool(self.has_candidates.all())

    def _replace(self, x: Tensor) -> ThinkingState:
        return ThinkingState(self.space, x, self.candidates, self.has_candidates)


@dataclass(frozen=True)
class EmbeddedRows:
    """Rows inside a step: as all numbers enter it, as candidates do, or both."""

    state: ThinkingState
    dense: EmbeddedState | None
    sparse: EmbeddedState | None

    @property
    def vectors(self) -> Tensor:
        """(B, K, D): what enters the network."""
        return self._each(
            None if self.dense is None else self.dense.vectors,
            None if self.sparse is None else self.sparse.vectors,
        )

    def decayed(self, kept: Tensor | None) -> EmbeddedRows:
        """The same, whose update starts from a share of where they were; None: from there.

        A configuration with candidates has no decay.
        """
        if kept is None or self.dense is None:
            return self
        return replace(self, dense=self.dense.decayed(kept))

    def update(
        self, energy_grad: Tensor, step_size: Tensor, carried: Tensor | None = None
    ) -> ThinkingState:
        """The rows after a step along -dE/dx; energy_grad (B, K, D), step_size (B, K, 1).

        carried (B, K, D): what momentum keeps of the steps before.
        """

        def moved(embedded: EmbeddedState | None) -> Tensor | None:
            if embedded is None:
                return None
            update = self.state.space.update(
                embedded, energy_grad, step_size, None, INFERENCE_STEP, carried
            )
            assert update.state is not None, "a step of inference gives a state"
            return whole_state(update.state)

        x = self._each(moved(self.dense), moved(self.sparse))
        count = self.state.chooses()
        if count is None:
            return ThinkingState(self.state.space, x)
        candidates = self.state.candidates
        if self.dense is not None:
            fresh = most_probable(x, count)
            if candidates is None or self.state.has_candidates is None:
                candidates = fresh
            else:
                has_candidates = self.state.has_candidates[..., None]
                candidates = torch.where(has_candidates, candidates, fresh)
        everywhere = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return ThinkingState(self.state.space, x, candidates, everywhere)

    def _each(self, dense: Tensor | None, sparse: Tensor | None) -> Tensor:
        """Of each row what it is: one of (B, K, ..) dense and sparse."""
        if sparse is None:
            assert dense is not None, "rows are of one kind at least"
            return dense
        if dense is None or self.state.has_candidates is None:
            return sparse
        return torch.where(self.state.has_candidates[..., None], sparse, dense)
