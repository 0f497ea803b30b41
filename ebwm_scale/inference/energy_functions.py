"""Energies of candidates whose context is known: one interface for both ways of knowing it.

CachedEnergy      candidates for the position after each prompt (model/kv_cache.py)
SequenceEnergy    one candidate for every position of a sequence

In a sequence of groups of P positions the energies of a group's rows have no meaning of their own.
So each of its P rows is given the group's: their mean, which compares with ordinary models, and has
all rows of a group stop, go back or win together. Gradients are those of the sum, as in training.

Under `refinement.reencode` a step's context is made of the candidates of all positions, as in
training. A sequence has them; a cache, of one position's candidates, does not and refuses.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ebwm_scale.model.context import Context
from ebwm_scale.model.energy_transformer import EnergyTransformer
from ebwm_scale.model.groups import of_groups
from ebwm_scale.model.kv_cache import KVCache
from ebwm_scale.refinement.step_plan import last_encoding
from ebwm_scale.world_model import WorldModel


class EnergyFunction(Protocol):
    """Energies of embedded candidates (B, K, D): K for each of B contexts."""

    def __call__(self, embedded: Tensor, landscape: int, workspace: Tensor | None = None) -> Tensor:
        """Energies (B, K). workspace (B, K, D): mapped, beside each candidate."""
        ...

    def with_gradient(
        self, embedded: Tensor, landscape: int, workspace: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Energies (B, K), dE/d embedded (B, K, D), and dE/d workspace where there is one."""
        ...

    def restart(self) -> None:
        """Tell that thinking begins: what comes next reads the first encoding."""
        ...

    def begin_step(
        self, step: int, landscape: int, embedded: Tensor, workspace: Tensor | None = None
    ) -> bool:
        """Tell that a step begins, before its energies: its number, and the candidates (B, K, D)
        that enter it, with their mapped workspaces. Returns whether it has another context than
        the step before it.
        """
        ...

    def select(self, rows: Tensor) -> EnergyFunction:
        """The same for some of the B contexts."""
        ...


class CachedEnergy:
    """K candidates for the next position of each prompt; cache: of all prompts."""

    def __init__(self, cache: KVCache):
        self.cache = cache

    def __call__(self, embedded: Tensor, landscape: int, workspace: Tensor | None = None) -> Tensor:
        self._refuse(workspace)
        energy = self.cache.get(landscape).energy(embedded, landscape)
        return of_groups(energy, self.cache.network.group_size)

    def with_gradient(
        self, embedded: Tensor, landscape: int, workspace: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        self._refuse(workspace)
        energy, gradient = self.cache.get(landscape).energy_and_gradient(embedded, landscape)
        return of_groups(energy, self.cache.network.group_size), gradient, None

    def _refuse(self, workspace: Tensor | None) -> None:
        if workspace is not None:
            raise ValueError(
                "a cache has no closed form with a workspace, and this model was trained with "
                "state.workspace: think over the whole sequence (SequenceEnergy)"
            )

    def restart(self) -> None:
        """A cache holds the first encoding alone."""

    def begin_step(
        self, step: int, landscape: int, embedded: Tensor, workspace: Tensor | None = None
    ) -> bool:
        network = self.cache.network
        if step > 0 and isinstance(network, EnergyTransformer) and network.feedback is not None:
            raise ValueError(
                "a cache holds the first encoding alone, and this model was trained with "
                "refinement.reencode: think over the whole sequence (SequenceEnergy)"
            )
        return False

    def select(self, rows: Tensor) -> CachedEnergy:
        return CachedEnergy(self.cache.select(rows))


class SequenceEnergy:
    """One candidate for every position of a sequence.

    observed: embeddings (B, S, D). first_visible: (B, S) of model.first_visible.
    """

    def __init__(self, model: WorldModel, observed: Tensor, first_visible: Tensor | None = None):
        self.model = model
        self.observed = observed
        self.first_visible = first_visible
        self.contexts: dict[int, Context] = {}
        self.again: Context | None = None  # of the observed stream encoded again

    def __call__(self, embedded: Tensor, landscape: int, workspace: Tensor | None = None) -> Tensor:
        energy = self.of_rows(embedded, landscape, workspace)
        return of_groups(energy, self.model.network.group_size)

    def with_gradient(
        self, embedded: Tensor, landscape: int, workspace: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        with torch.enable_grad():
            own = [u.detach().requires_grad_() for u in (embedded, workspace) if u is not None]
            energy = self.of_rows(own[0], landscape, *own[1:])
            gradients = torch.autograd.grad(energy.sum(), own)
        energy = of_groups(energy.detach(), self.model.network.group_size)
        return energy, gradients[0], gradients[1] if workspace is not None else None

    def restart(self) -> None:
        self.again = None

    @torch.no_grad()
    def begin_step(
        self, step: int, landscape: int, embedded: Tensor, workspace: Tensor | None = None
    ) -> bool:
        config = self.model.config.refinement
        if step == 0 or last_encoding(config, step) < step:
            return False
        network = self.model.energy_network
        front = network.start(self.observed, landscape, self.first_visible)
        front = network.advance(front, landscape, network.first_reencoded)
        stream = network.add_predictions(front, embedded, workspace)
        stream = network.advance(stream, landscape, len(network.layers))
        self.again = network.context_of(stream)
        return True

    def select(self, rows: Tensor) -> SequenceEnergy:
        first_visible = None if self.first_visible is None else self.first_visible[rows]
        part = SequenceEnergy(self.model, self.observed[rows], first_visible)
        if self.again is not None:
            part.again = self.again.select(rows)
        for key, context in self.contexts.items():
            part.contexts[key] = context.select(rows)
        return part

    def of_rows(self, embedded: Tensor, landscape: int, workspace: Tensor | None = None) -> Tensor:
        """(B, K) of every row by itself; the energy of a group is the mean of its rows."""
        context = self.context(landscape)
        return self.model.energy_network.energy(embedded, context, landscape, workspace)

    def context(self, landscape: int) -> Context:
        """What the current step reads of the observed stream."""
        if self.again is not None:
            return self.again
        network = self.model.energy_network
        key = network.context_key(landscape)
        if key not in self.contexts:
            with torch.no_grad():
                self.contexts[key] = network.encode_context(
                    self.observed, landscape, self.first_visible
                )
        return self.contexts[key]
