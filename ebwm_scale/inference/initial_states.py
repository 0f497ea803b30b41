"""Initial states and Langevin noise of thinking, addressed by (seed, start, sample, position).

Nothing depends on batching, and the first start is the one that validation uses in training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ebwm_scale.refinement.noise import EVALUATION_STEP, NoiseSource, Purpose
from ebwm_scale.refinement.sampling import initial_state
from ebwm_scale.world_model import WorldModel


class InitialStateSampler:
    """B contexts with K candidates each; subclasses say which numbers a candidate has.

    seed: of the noise. sample_ids (B,): what each context's numbers are addressed by.
    """

    def __init__(self, model: WorldModel, seed: int, sample_ids: Tensor):
        self.model = model
        self.seed = seed
        self.sample_ids = sample_ids

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, K, size) of the candidates."""
        raise NotImplementedError

    def normal(self, purpose: int, size: int) -> Tensor:
        """N(0, 1), (B, K, size)."""
        raise NotImplementedError

    def initial(self, last: Tensor | None) -> Tensor:
        """x_0 (B, K, size).

        last: the last observed state of each context (B, 1 or K, size), for frames that start
        from it.
        """
        return initial_state(
            self.model.config.state.initial,
            self.shape,
            normal=lambda: self.normal(Purpose.INITIAL_STATE, self.model.state_size),
            last=last,
            device=self._weight.device,
            dtype=self._dtype,
        )

    def initial_workspace(self) -> Tensor | None:
        """z_0 (B, K, width); None for a model without a workspace."""
        width = self.model.config.state.workspace
        if width is None:
            return None
        return initial_state(
            self.model.config.state.workspace_initial,
            (*self.shape[:2], width),
            normal=lambda: self.normal(Purpose.WORKSPACE, width),
            last=None,
            device=self._weight.device,
            dtype=self._dtype,
        )

    def langevin(self, step: int) -> Tensor:
        """N(0, 1) of a step, (B, K, size)."""
        return self.normal(Purpose.LANGEVIN + step, self.model.state_size)

    @property
    def _weight(self) -> Tensor:
        return self.model.energy_network.norm.weight

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float64 if self._weight.dtype == torch.float64 else torch.float32

    def _rows(
        self,
        sample_ids: Tensor,
        purpose: int,
        start: int,
        first_position: int,
        num_positions: int,
        size: int,
    ) -> Tensor:
        """N(0, 1) of one start's candidates, (len(sample_ids), num_positions, size)."""
        return NoiseSource(self.seed, EVALUATION_STEP + start).normal(
            sample_ids,
            num_positions,
            size,
            purpose=purpose,
            device=self._weight.device,
            first_position=first_position,
            dtype=self._dtype,
        )


class NextPositionSampler(InitialStateSampler):
    """num_starts candidates for one position of each sample: positions (B,).

    group_size: so many positions from there on, one candidate after the other.
    """

    def __init__(
        self,
        model: WorldModel,
        seed: int,
        sample_ids: Tensor,
        positions: Tensor,
        num_starts: int = 1,
        group_size: int = 1,
    ):
        super().__init__(model, seed, sample_ids)
        self.positions = positions.tolist()
        self.num_starts = num_starts
        self.group_size = group_size

    @property
    def shape(self) -> tuple[int, int, int]:
        num_rows = self.num_starts * self.group_size
        return len(self.positions), num_rows, self.model.state_size

    def normal(self, purpose: int, size: int) -> Tensor:
        contexts = []
        for b, position in enumerate(self.positions):
            sample_id = self.sample_ids[b : b + 1]
            starts = [
                self._rows(sample_id, purpose, start, position, self.group_size, size)
                for start in range(self.num_starts)
            ]
            contexts.append(torch.cat(starts, 1))
        return torch.cat(contexts)


class SequenceSampler(InitialStateSampler):
    """One start's candidates for positions 0 .. num_positions - 1 of each sample."""

    def __init__(
        self,
        model: WorldModel,
        seed: int,
        sample_ids: Tensor,
        num_positions: int,
        start: int = 0,
    ):
        super().__init__(model, seed, sample_ids)
        self.num_positions = num_positions
        self.start = start

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.sample_ids), self.num_positions, self.model.state_size

    def normal(self, purpose: int, size: int) -> Tensor:
        return self._rows(self.sample_ids, purpose, self.start, 0, self.num_positions, size)
