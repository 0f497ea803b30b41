"""The random numbers of refinement, addressed by (seed, step, sample, position): see noise.py."""
from __future__ import annotations

import torch
from torch import Tensor

from .config import RefinementConfig
from .noise import NoiseSource, Purpose


class SampledDraws:
    """Draws for a batch of samples. `initial`: a given x_0 (B, S, size), otherwise N(0, 1) or zeros by `kind`.

    randomize False (evaluation): no random step sizes, no Langevin noise; x_0 stays random but is always the same for a sample.
    """

    def __init__(self, source: NoiseSource, rules: RefinementConfig, sample_ids: Tensor, shape: tuple[int, int, int], *, kind: str,
                 noise_scale: float = 1.0, step_size_scale: float = 1.0, randomize: bool = True, device: torch.device | str = "cpu",
                 dtype: torch.dtype = torch.float32, start: Tensor | None = None, restart: tuple[Tensor, Tensor] | None = None):
        self.source, self.rules, self.sample_ids, self.shape, self.kind = source, rules, sample_ids, shape, kind
        self.noise, self.step_size_scale, self.randomize = rules.noise * noise_scale, step_size_scale, randomize
        self.options = {"device": device, "dtype": dtype}
        self.start, self.restart = start, restart

    def initial(self) -> Tensor:
        if self.kind == "most_recent":
            x = self.start.to(**self.options)
        elif self.kind == "zeros":
            x = torch.zeros(self.shape, **self.options)
        else:
            x = self.source.normal(self.sample_ids, *self.shape[1:], purpose=Purpose.INITIAL_STATE, **self.options)
        if self.restart is not None:                    # (rows (n,), states (n, S, size)) from the replay buffer
            rows, states = self.restart
            x[rows] = states.to(**self.options)
        return x

    def step_size_factor(self) -> Tensor | float:
        """The schedule's factor, times one per position that is uniform in [1 / r, r]."""
        r = self.rules.step_size_random_factor
        if not self.randomize or r == 1:
            return self.step_size_scale
        uniform = self.source.uniform(self.sample_ids, self.shape[1], purpose=Purpose.STEP_SIZE, **self.options)
        return self.step_size_scale * (1 / r + (r - 1 / r) * uniform)

    def langevin(self, step: int) -> Tensor | None:
        if not self.randomize or self.noise == 0:
            return None
        return self.noise * self.source.normal(self.sample_ids, *self.shape[1:], purpose=Purpose.LANGEVIN + step, **self.options)
