"""Energies of candidates whose context is known: one interface for both ways of knowing it.

CachedEnergy      candidates for the position after each prompt (model/kv_cache.py)
SequenceEnergy    one candidate for every position of a sequence
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ebwm_scale.model.energy_transformer import Context
from ebwm_scale.model.kv_cache import KVCache
from ebwm_scale.world_model import WorldModel


class EnergyFunction(Protocol):
    """Energies of embedded candidates (B, K, D): K for each of B contexts."""

    def __call__(self, embedded: Tensor, landscape: int) -> Tensor:
        """Energies (B, K)."""
        ...

    def with_gradient(self, embedded: Tensor, landscape: int) -> tuple[Tensor, Tensor]:
        """Energies (B, K), and dE/d embedded (B, K, D)."""
        ...

    def select(self, rows: Tensor) -> EnergyFunction:
        """The same for some of the B contexts."""
        ...


class CachedEnergy:
    """K candidates for the next position of each prompt.

    cache: of all prompts. last_observed: the last observed embedding of each (B, D).
    """

    def __init__(self, model: WorldModel, cache: KVCache, last_observed: Tensor):
        self.model = model
        self.cache = cache
        self.last_observed = last_observed

    def __call__(self, embedded: Tensor, landscape: int) -> Tensor:
        return self.cache.get(landscape).energy(self._candidates(embedded), landscape)

    def with_gradient(self, embedded: Tensor, landscape: int) -> tuple[Tensor, Tensor]:
        context = self.cache.get(landscape)
        return context.energy_and_gradient(self._candidates(embedded), landscape)

    def select(self, rows: Tensor) -> CachedEnergy:
        return CachedEnergy(self.model, self.cache.select(rows), self.last_observed[rows])

    def _candidates(self, embedded: Tensor) -> Tensor:
        return self.model.predicted_rows(embedded, self.last_observed[:, None])


class SequenceEnergy:
    """One candidate for every position of a sequence.

    observed: embeddings (B, S, D). first_visible: (B, S) of model.first_visible.
    """

    def __init__(self, model: WorldModel, observed: Tensor, first_visible: Tensor | None = None):
        self.model = model
        self.observed = observed
        self.first_visible = first_visible
        self.contexts: dict[int, Context] = {}

    def __call__(self, embedded: Tensor, landscape: int) -> Tensor:
        candidates = self.model.predicted_rows(embedded, self.observed)
        return self.model.energy_network.energy(candidates, self._context(landscape), landscape)

    def with_gradient(self, embedded: Tensor, landscape: int) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            embedded = embedded.detach().requires_grad_()
            energy = self(embedded, landscape)
            (gradient,) = torch.autograd.grad(energy.sum(), embedded)
        return energy.detach(), gradient

    def select(self, rows: Tensor) -> SequenceEnergy:
        first_visible = None if self.first_visible is None else self.first_visible[rows]
        part = SequenceEnergy(self.model, self.observed[rows], first_visible)
        for key, context in self.contexts.items():
            part.contexts[key] = context.select(rows)
        return part

    def _context(self, landscape: int) -> Context:
        network = self.model.energy_network
        key = network.context_key(landscape)
        if key not in self.contexts:
            with torch.no_grad():
                self.contexts[key] = network.encode_context(
                    self.observed, landscape, self.first_visible
                )
        return self.contexts[key]
