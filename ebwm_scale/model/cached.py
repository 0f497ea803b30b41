"""The observed stream as a cache: keys and values of every layer, computed once, one position appended at a time; rows of different lengths.

    prefill(observed)       K, V of all observed positions                      once per prompt
    append(observed)        K, V of one more position                           once per accepted token or frame
    energy(predicted)       E of candidates for the next position, given them   once per refinement step, any number of candidates

The same blocks and formulas as training (transformer.py, energy.py), for rows that stand at the end of their own context. Row b sees the first
lengths[b] entries of its cache; what lies behind is masked. First order only: the energy's gradient with respect to the candidates is plain autograd.
"""
from __future__ import annotations

import torch
from torch import Tensor

from .baseline import BaselineTransformer
from .energy import EnergyTransformer
from .transformer import Block, Rotary


class ObservedCache:
    """Of one landscape. capacity: observed positions at most.  calls counts how many observed positions were computed, for tests and reports."""

    def __init__(self, network: EnergyTransformer | BaselineTransformer, capacity: int, landscape: int = 0):
        self.network, self.landscape = network, landscape
        self.is_energy = isinstance(network, EnergyTransformer)
        self.offset = int(self.is_energy and network.conditioning == "time_embed")      # a token in front of the context
        self.capacity = capacity + self.offset
        self.modulations = network.modulations_of(landscape, predicted=False)[0] if self.is_energy else [None] * len(network.layers)
        self.keys: list[Tensor] = []            # per layer (B, H_kv, capacity, d)
        self.values: list[Tensor] = []
        self.lengths: Tensor | None = None      # (B,) entries of each row, the token in front included
        self.positions_computed = 0

    @torch.no_grad()
    def prefill(self, observed: Tensor, lengths: Tensor) -> Tensor | None:
        """observed (B, S, D), right-padded to the longest; lengths (B,) >= 1. A baseline's hidden state (B, D) at each row's last position."""
        if self.offset:
            token = self.network.landscape_embedding.weight[self.landscape].expand(len(observed), 1, -1)
            observed = torch.cat([token, observed], 1)
        self.lengths = lengths.to(observed.device) + self.offset
        self.keys, self.values = [], []
        rotary = self.network.rotary(observed.shape[1], observed)
        for index, (layer, modulation) in enumerate(zip(self.network.layers, self.modulations)):
            keys, values = layer.keys_values(observed, rotary, modulation)
            for store, new in ((self.keys, keys), (self.values, values)):
                whole = new.new_zeros(*new.shape[:2], self.capacity, new.shape[3])
                whole[:, :, :new.shape[2]] = new
                store.append(whole)
            if not self.is_energy or index + 1 < len(self.network.layers):
                observed = layer.observe(observed, keys, values, rotary, modulation)
        self.positions_computed += int(lengths.sum())
        if not self.is_energy:
            return self.network.norm(observed[torch.arange(len(observed)), self.lengths - 1])
        return None

    @torch.no_grad()
    def append(self, observed: Tensor) -> Tensor | None:
        """observed (B, D): the next position of every row. A baseline's hidden state (B, D) there. ValueError when a row is full."""
        if int(self.lengths.max()) >= self.capacity:
            raise ValueError(f"a row of the cache has {int(self.lengths.max()) - self.offset} positions, its capacity is {self.capacity - self.offset}: prefill again")
        x, rows = observed[:, None], torch.arange(len(observed), device=observed.device)
        rotary = self._rotary(self.lengths, x)
        mask = self._mask(self.lengths + 1)
        for index, (layer, modulation) in enumerate(zip(self.network.layers, self.modulations)):
            keys, values = layer.keys_values(x, rotary, modulation)
            self.keys[index][rows, :, self.lengths] = keys[:, :, 0]
            self.values[index][rows, :, self.lengths] = values[:, :, 0]
            if not self.is_energy or index + 1 < len(self.network.layers):
                x = through(layer, x, rotary, self.keys[index], self.values[index], mask, modulation, own=False)
        self.lengths = self.lengths + 1
        self.positions_computed += len(observed)
        return None if self.is_energy else self.network.norm(x[:, 0])

    def energy(self, predicted: Tensor, landscape: int) -> Tensor:
        """Energies (B, K) of K candidates per row (B, K, D) for the position after its last; differentiable once."""
        modulations, final = self.network.modulations_of(landscape, predicted=True)
        rotary, mask = self._rotary(self.lengths, predicted), self._mask(self.lengths)
        for layer, keys, values, modulation in zip(self.network.layers, self.keys, self.values, modulations):
            predicted = through(layer, predicted, rotary, keys, values, mask, modulation, own=True)
        return self.network.score(predicted, final or ())

    def select(self, rows: Tensor) -> "ObservedCache":
        """The cache of some rows; it shares nothing with this one."""
        part = ObservedCache(self.network, self.capacity - self.offset, self.landscape)
        part.keys, part.values = ([u[rows] for u in store] for store in (self.keys, self.values))
        part.lengths = self.lengths[rows]
        return part

    def _rotary(self, positions: Tensor, like: Tensor) -> Rotary:
        """Of one position per row, for all its candidates: (B, 1, 1, d / 2, 2)."""
        table = self.network.rotary(self.capacity + 2, like).factors
        return Rotary(table[positions][:, None, None])

    def _mask(self, lengths: Tensor) -> Tensor:
        return torch.arange(self.capacity, device=lengths.device) < lengths[:, None]


def through(layer: Block, x: Tensor, rotary: Rotary, keys: Tensor, values: Tensor, mask: Tensor, modulation, *, own: bool) -> Tensor:
    """Rows (B, K, D) through a block. They see the entries of keys, values (B, H_kv, C, d) that mask (B, C) allows; own: and each its own key."""
    attention, normed = layer.attention, layer._attention_input(x, modulation)
    q = rotary.rotate(attention._heads(attention.wq(normed)))
    k_self, v_self = attention.keys_values(normed, rotary) if own else (None, None)
    seen = attend_rows(q, keys, values, mask, k_self, v_self)
    return layer._finish(x, attention.wo(seen.transpose(1, 2).flatten(2)), modulation)


def attend_rows(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, k_self: Tensor | None, v_self: Tensor | None) -> Tensor:
    """(B, H, K, d): softmax over the allowed entries, and each row's own key k_self, v_self (B, H_kv, K, d) where given.

    Grouped heads are folded into the rows, so that keys and values are read in place.
    """
    B, H, K, d = q.shape
    groups = H // keys.shape[1]
    grouped = q.unflatten(1, (keys.shape[1], groups)).flatten(2, 3) * d**-0.5        # (B, H_kv, groups * K, d)
    scores = (grouped @ keys.transpose(-1, -2)).masked_fill(~mask[:, None, None], float("-inf"))
    if k_self is None:
        out = scores.softmax(-1) @ values
    else:
        own_keys, own_values = (u[:, :, None].expand(-1, -1, groups, -1, -1).flatten(2, 3) for u in (k_self, v_self))
        weights = torch.cat([scores, (grouped * own_keys).sum(-1, keepdim=True)], -1).softmax(-1)
        out = weights[..., :-1] @ values + weights[..., -1:] * own_values
    return out.view(B, H, K, d)
