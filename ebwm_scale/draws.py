"""The random numbers of refinement, addressed by (seed, step, sample, position): see noise.py."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from .config import RefinementConfig
from .noise import NoiseSource, Purpose


class SampledDraws:
    """Draws for a batch of samples. `initial`: a given x_0 (B, S, size), otherwise N(0, 1) or zeros by `kind`.

    randomize False (evaluation): no random step sizes, no Langevin noise; x_0 stays random but is always the same for a sample.
    """

    def __init__(
        self,
        source: NoiseSource,
        rules: RefinementConfig,
        sample_ids: Tensor,
        shape: tuple[int, int, int],
        *,
        kind: str,
        noise_scale: float = 1.0,
        step_size_scale: float = 1.0,
        randomize: bool = True,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        start: Tensor | None = None,
        restart: tuple[Tensor, Tensor] | None = None,
    ):
        self.source, self.rules, self.sample_ids, self.kind = source, rules, sample_ids, kind
        self.positions, self.size = slice(0, shape[1]), shape[2]
        self.noise, self.step_size_scale, self.randomize = (
            rules.noise * noise_scale,
            step_size_scale,
            randomize,
        )
        self.options = {"device": device, "dtype": dtype}
        self.start, self.restart = start, restart

    def of(self, samples: slice, positions: slice) -> "SampledDraws":
        """The same numbers for a part of the batch."""
        part = copy.copy(self)
        part.sample_ids, part.positions = self.sample_ids[samples], positions
        part.start = None if self.start is None else self.start[samples, positions]
        if self.restart is not None:
            rows, states = self.restart
            inside = (rows >= samples.start) & (rows < samples.stop)
            part.restart = (
                (rows[inside] - samples.start, states[inside, positions]) if inside.any() else None
            )
        return part

    def initial(self) -> Tensor:
        if self.kind == "most_recent":
            x = self.start.to(**self.options, copy=True)
        elif self.kind == "zeros":
            x = torch.zeros(len(self.sample_ids), self._num_positions, self.size, **self.options)
        else:
            x = self._normal(Purpose.INITIAL_STATE)
        if self.restart is not None:  # (rows (n,), states (n, S, size)) from the replay buffer
            rows, states = self.restart
            x[rows] = states.to(**self.options)
        return x

    def step_size_factor(self) -> Tensor | float:
        """The schedule's factor, times one per position that is uniform in [1 / r, r]."""
        r = self.rules.step_size_random_factor
        if not self.randomize or r == 1:
            return self.step_size_scale
        uniform = self.source.uniform(
            self.sample_ids, self.positions.stop, purpose=Purpose.STEP_SIZE, **self.options
        )
        return self.step_size_scale * (1 / r + (r - 1 / r) * uniform[:, self.positions])

    def langevin(self, step: int) -> Tensor | None:
        if not self.randomize or self.noise == 0:
            return None
        return self._normal(Purpose.LANGEVIN + step).mul_(self.noise)

    @property
    def _num_positions(self) -> int:
        return self.positions.stop - self.positions.start

    def _normal(self, purpose: int) -> Tensor:
        return self.source.normal(
            self.sample_ids,
            self._num_positions,
            self.size,
            purpose=purpose,
            first_position=self.positions.start,
            **self.options,
        )
