"""The observed stream as a cache: keys and values of every layer, computed once.

    prefill(observed)                K, V of all observed positions        once per prompt
    append(observed)                 K, V of one more position             once per token or frame
    energy(predicted)                E of candidates for the next one      any number of times
    energy_and_gradient(predicted)   E and dE/d predicted                  once per refinement step

The same formulas as training, for rows that stand at the end of their own context (see
closed_form.py). Row b sees the first lengths[b] entries of its cache; what lies behind is masked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ebwm_scale.model.baseline import BaselineTransformer
from ebwm_scale.model.blocks import Modulation, modulate
from ebwm_scale.model.closed_form import (
    attend,
    attention_input,
    block_backward,
    block_forward,
    feed_forward,
    merge_heads,
    norm,
    norm_backward,
    project_heads,
)
from ebwm_scale.model.energy_transformer import EnergyTransformer


class KVCache:
    """Keys and values of the contexts that some landscapes read; capacity: positions at most."""

    def __init__(
        self,
        network: EnergyTransformer | BaselineTransformer,
        capacity: int,
        landscapes: Iterable[int] = (0,),
    ):
        self.network = network
        self.capacity = capacity
        self.contexts: dict[int, LandscapeKVCache] = {}
        for landscape in landscapes:
            key = network.context_key(landscape)
            if key not in self.contexts:
                self.contexts[key] = LandscapeKVCache(network, capacity, landscape)

    def get(self, landscape: int) -> LandscapeKVCache:
        """The cached context that a landscape reads."""
        return self.contexts[self.network.context_key(landscape)]

    def prefill(self, observed: Tensor, lengths: Tensor) -> Tensor | None:
        """observed (B, S, D), right-padded to the longest; lengths (B,) >= 1.

        Returns a baseline's hidden state (B, D) at each row's last position.
        """
        hidden = None
        for context in self.contexts.values():
            hidden = context.prefill(observed, lengths)
        return hidden

    def append(self, observed: Tensor) -> Tensor | None:
        """observed (B, D): the next position of every row.

        Returns a baseline's hidden state (B, D) there. ValueError when a row is full.
        """
        hidden = None
        for context in self.contexts.values():
            hidden = context.append(observed)
        return hidden

    def select(self, rows: Tensor) -> KVCache:
        """The cache of some rows; it shares nothing with this one."""
        part = KVCache(self.network, self.capacity, ())
        for key, context in self.contexts.items():
            part.contexts[key] = context.select(rows)
        return part


class LandscapeKVCache:
    """The cached context of one landscape."""

    def __init__(
        self,
        network: EnergyTransformer | BaselineTransformer,
        capacity: int,
        landscape: int = 0,
    ):
        self.network = network
        self.landscape = landscape
        self.is_energy = isinstance(network, EnergyTransformer)
        self.offset = 0  # rows in front of the context: the landscape's token
        self.modulations: Sequence[Modulation | None] = [None] * len(network.layers)
        if isinstance(network, EnergyTransformer):
            self.offset = int(network.conditioning == "time_embed")
            self.modulations, _ = network.modulations_of(landscape, predicted=False)
        self.capacity = capacity + self.offset
        self.keys: list[Tensor] = []  # per layer (B, H_kv, capacity, d)
        self.values: list[Tensor] = []
        self.lengths = torch.empty(0, dtype=torch.long)  # (B,) entries of each row, with offset
        self.longest = 0  # the largest of them

    @torch.no_grad()
    def prefill(self, observed: Tensor, lengths: Tensor) -> Tensor | None:
        """See KVCache."""
        if isinstance(self.network, EnergyTransformer):
            observed, _ = self.network.prepend_landscape(observed, self.landscape)
        self.lengths = lengths.to(observed.device) + self.offset
        self.longest = int(self.lengths.max())
        self.keys = []
        self.values = []
        rotary = self.network.rotary(observed.shape[1], observed)
        for index, (layer, modulation) in enumerate(zip(self.network.layers, self.modulations)):
            keys, values = layer.keys_values(observed, rotary, modulation)
            self.keys.append(_with_capacity(keys, self.capacity))
            self.values.append(_with_capacity(values, self.capacity))
            if self._reads_output_of(index):
                observed = layer.forward_observed(observed, keys, values, rotary, modulation)
        if self.is_energy:
            return None
        rows = torch.arange(len(observed))
        return self.network.norm(observed[rows, self.lengths - 1])

    @torch.no_grad()
    def append(self, observed: Tensor) -> Tensor | None:
        """See KVCache."""
        if self.longest >= self.capacity:
            raise ValueError(
                f"a row of the cache has {self.longest - self.offset} positions, its capacity is "
                f"{self.capacity - self.offset}: prefill again"
            )
        x = observed[:, None]
        rows = torch.arange(len(observed), device=observed.device)
        factors = self._factors(self.lengths, x)
        self.longest += 1
        mask = self._mask(self.lengths + 1)
        for index, (layer, modulation) in enumerate(zip(self.network.layers, self.modulations)):
            q, k, v = project_heads(layer, attention_input(layer, x, modulation), factors)
            self.keys[index][rows, :, self.lengths] = k[:, :, 0]
            self.values[index][rows, :, self.lengths] = v[:, :, 0]
            if self._reads_output_of(index):
                attended = attend(q, *self._seen(index), mask)
                change = layer.attention.wo(merge_heads(attended))
                if modulation is not None:
                    change = change * modulation.attention_gate
                x = x + change
                x = x + feed_forward(layer, x, modulation)[0]
        self.lengths = self.lengths + 1
        if self.is_energy:
            return None
        return norm(self.network.norm, x[:, 0])

    @torch.no_grad()
    def energy(self, predicted: Tensor, landscape: int) -> Tensor:
        """Energies (B, K) of K candidates per row (B, K, D) for the position after its last."""
        return self._refinement_step(predicted, landscape, with_gradient=False)[0]

    @torch.no_grad()
    def energy_and_gradient(self, predicted: Tensor, landscape: int) -> tuple[Tensor, Tensor]:
        """(E (B, K), dE/d predicted (B, K, D)) of K candidates per row (B, K, D)."""
        energy, gradient = self._refinement_step(predicted, landscape, with_gradient=True)
        assert gradient is not None
        return energy, gradient

    def select(self, rows: Tensor) -> LandscapeKVCache:
        """The cache of some rows; it shares nothing with this one."""
        part = LandscapeKVCache(self.network, self.capacity - self.offset, self.landscape)
        part.keys = [keys[rows] for keys in self.keys]
        part.values = [values[rows] for values in self.values]
        part.lengths = self.lengths[rows]
        part.longest = int(part.lengths.max())
        return part

    def _refinement_step(
        self, p: Tensor, landscape: int, *, with_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        network = self.network
        if not isinstance(network, EnergyTransformer):
            raise TypeError("a baseline has no energy")
        modulations, final = network.modulations_of(landscape, predicted=True)
        factors = self._factors(self.lengths, p)
        mask = self._mask(self.lengths)
        kept = []
        for index, (layer, modulation) in enumerate(zip(network.layers, modulations)):
            p, block = block_forward(layer, p, factors, *self._seen(index), mask, modulation)
            kept.append(block)
        normed = norm(network.norm, p)
        if final is not None:
            normed = modulate(normed, *final)
        energy = network.head(normed).squeeze(-1)
        if not with_gradient:
            return energy, None

        gradient = network.head.weight[0]
        if final is not None:
            _, scale = final
            gradient = gradient * (1 + scale)
        gradient = norm_backward(gradient.expand_as(p), p, network.norm)
        for index in reversed(range(len(kept))):
            gradient = block_backward(
                network.layers[index],
                gradient,
                kept.pop(),
                factors,
                *self._seen(index),
                modulations[index],
            )
        return energy, gradient

    def _reads_output_of(self, index: int) -> bool:
        """Of an energy model's last block only the keys and values are ever read."""
        return not self.is_energy or index + 1 < len(self.network.layers)

    def _seen(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer as far as any row has them."""
        return self.keys[index][:, :, : self.longest], self.values[index][:, :, : self.longest]

    def _factors(self, positions: Tensor, like: Tensor) -> Tensor:
        """Rotations of one position per row, for all its candidates: complex (B, 1, 1, d / 2)."""
        table = self.network.rotary(self.capacity + 2, like).factors
        return torch.view_as_complex(table[positions])[:, None, None]

    def _mask(self, lengths: Tensor) -> Tensor | None:
        """(B, 1, 1, longest), True where a row has no entry; None where every row has all."""
        if bool((lengths == self.longest).all()):
            return None
        entries = torch.arange(self.longest, device=lengths.device)
        return (entries >= lengths[:, None])[:, None, None]


def _with_capacity(tensor: Tensor, capacity: int) -> Tensor:
    """(B, H_kv, S, d) in a tensor with room for more positions, (B, H_kv, capacity, d)."""
    whole = tensor.new_zeros(*tensor.shape[:2], capacity, tensor.shape[3])
    whole[:, :, : tensor.shape[2]] = tensor
    return whole
