"""The observed stream as a cache: keys and values of every layer, computed once.

    prefill(observed)                K, V of all observed positions        once per prompt
    append(observed)                 K, V of one more position             once per token or frame
    energy(embedded)                 E of candidates for the next one      any number of times
    energy_and_gradient(embedded)    E and dE/d embedded                   once per refinement step

The same formulas as training, for rows that stand at the end of their own context (see
closed_form.py). Row b sees the first lengths[b] entries of its cache; what lies behind is masked.
All blocks' keys and values are kept, also where the predicted stream passes the last ones only:
a further observed position reads them. A looped network has keys and values of its own for each
pass of a block; candidates see those of the last one.

In a sequence of groups of P positions, read "group" for "position": lengths are multiples of P,
what is appended is a group, and K candidates for the next one are K P rows, one candidate after the
other. A row's energy depends on all rows of its candidate; gradients are those of their sum. What
is observed of a group holds its conditions too (conditions.py), P + A rows; so do lengths.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ebwm_scale.model.baseline import BaselineTransformer
from ebwm_scale.model.closed_form import (
    attend,
    attention_input,
    block_backward,
    block_forward,
    feed_forward,
    head_backward,
    head_forward,
    merge_heads,
    norm,
    project_heads,
)
from ebwm_scale.model.energy_transformer import EnergyTransformer
from ebwm_scale.model.norm import Modulation


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
        """observed (B, S, D), right-padded to the longest; lengths (B,), at least one group.

        Returns a baseline's hidden states (B, P, D) at each row's last group.
        """
        hidden = None
        for context in self.contexts.values():
            hidden = context.prefill(observed, lengths)
        return hidden

    def append(self, observed: Tensor) -> Tensor | None:
        """observed (B, P, D), with conditions (B, P + A, D): the next group of every row.

        Returns a baseline's hidden states (B, P, D) there. ValueError when a row is full.
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
        self.group_size = network.group_size
        self.context_group = network.context_group
        self.reach = network.layers[0].attention.reach
        self.is_energy = isinstance(network, EnergyTransformer)
        self.offset = 0  # rows in front of the context: the landscape's token
        # In the order in which they are passed.
        self.layers = list(network.layers) * network.num_loops
        self.modulations: Sequence[Modulation | None] = [None] * len(self.layers)
        self.first_predicted = 0  # of the layers above, the first that candidates pass
        if isinstance(network, EnergyTransformer):
            self.offset = int(network.conditioning == "time_embed")
            modulations, _ = network.modulations_of(landscape, predicted=False)
            self.modulations = list(modulations) * network.num_loops
            before_last_pass = len(self.layers) - len(network.layers)
            self.first_predicted = before_last_pass + network.first_predicted
        self.capacity = capacity + self.offset
        self.keys: list[Tensor] = []  # per passed layer (B, H_kv, capacity, d)
        self.values: list[Tensor] = []
        self.lengths = torch.empty(0, dtype=torch.long)  # (B,) entries of each row, with offset
        self.longest = 0  # the largest of them
        # Of each row's last group, (B, P, D): see context.Context.
        self.anchor: Tensor | None = None
        self.readout: Tensor | None = None

    @torch.no_grad()
    def prefill(self, observed: Tensor, lengths: Tensor) -> Tensor | None:
        """See KVCache."""
        if isinstance(self.network, EnergyTransformer):
            observed, _ = self.network.prepend_landscape(observed, self.landscape)
        rows = torch.arange(len(observed), device=observed.device)[:, None]
        self.lengths = lengths.to(observed.device) + self.offset
        last_group = self._next_places(self.group_size) - self.context_group
        self.longest = int(self.lengths.max())
        self.keys = []
        self.values = []
        rotary = self.network.rotary(observed.shape[1], observed)
        entering = observed
        for index, (layer, modulation) in enumerate(zip(self.layers, self.modulations)):
            if self._begins_again(index):
                observed = observed + entering
            self._keep_anchor(index, observed[rows, last_group])
            keys, values = layer.keys_values(observed, rotary, modulation)
            self.keys.append(_with_capacity(keys, self.capacity))
            self.values.append(_with_capacity(values, self.capacity))
            if self._reads_output_of(index):
                observed = layer.forward_observed(observed, keys, values, rotary, modulation)
        last = observed[rows, last_group]
        if self.is_energy:
            self._keep_readout(last)
            return None
        return self.network.norm(last)

    @torch.no_grad()
    def append(self, observed: Tensor) -> Tensor | None:
        """See KVCache."""
        if self.longest >= self.capacity:
            raise ValueError(
                f"a row of the cache has {self.longest - self.offset} positions, its capacity is "
                f"{self.capacity - self.offset}: prefill again"
            )
        x = observed
        rows = torch.arange(len(observed), device=observed.device)[:, None]
        places = self._next_places(self.context_group)
        factors = self._factors(places, x)[:, None]
        self.longest += self.context_group
        mask = self._mask(self.lengths + self.context_group, self.context_group)
        for index, (layer, modulation) in enumerate(zip(self.layers, self.modulations)):
            if self._begins_again(index):
                x = x + observed
            self._keep_anchor(index, x[:, : self.group_size])
            q, k, v = project_heads(layer, attention_input(layer, x, modulation), factors)
            self.keys[index][rows, :, places] = k.transpose(1, 2)
            self.values[index][rows, :, places] = v.transpose(1, 2)
            if self._reads_output_of(index):
                attended, _, _ = attend(q, *self._seen(index), mask)
                change = layer.attention.wo(merge_heads(attended))
                if modulation is not None:
                    change = change * modulation.attention_gate
                x = x + change
                x = x + feed_forward(layer, x, modulation)[0]
        self.lengths = self.lengths + self.context_group
        last = x[:, : self.group_size]
        if self.is_energy:
            self._keep_readout(last)
            return None
        return norm(self.network.norm, last)

    @torch.no_grad()
    def energy(self, embedded: Tensor, landscape: int) -> Tensor:
        """Energies (B, K) of K candidates per row (B, K, D) for the position after its last.

        With groups: of K P rows, (B, K P, D).
        """
        return self._refinement_step(embedded, landscape, with_gradient=False)[0]

    @torch.no_grad()
    def energy_and_gradient(self, embedded: Tensor, landscape: int) -> tuple[Tensor, Tensor]:
        """(E (B, K), dE/d embedded (B, K, D)) of K candidates per row (B, K, D)."""
        energy, gradient = self._refinement_step(embedded, landscape, with_gradient=True)
        assert gradient is not None
        return energy, gradient

    def select(self, rows: Tensor) -> LandscapeKVCache:
        """The cache of some rows; it shares nothing with this one."""
        part = LandscapeKVCache(self.network, self.capacity - self.offset, self.landscape)
        part.keys = [keys[rows] for keys in self.keys]
        part.values = [values[rows] for values in self.values]
        part.lengths = self.lengths[rows]
        part.longest = int(part.lengths.max())
        part.anchor = None if self.anchor is None else self.anchor[rows]
        part.readout = None if self.readout is None else self.readout[rows]
        return part

    def _refinement_step(
        self, embedded: Tensor, landscape: int, *, with_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        network = self.network
        if not isinstance(network, EnergyTransformer):
            raise TypeError("a baseline has no energy")
        modulations, final = network.modulations_of(landscape, predicted=True)
        num_candidates = embedded.shape[1] // self.group_size
        factors = self._factors(self._next_places(self.group_size), embedded)
        if self.group_size > 1:
            factors = factors.repeat(1, num_candidates, 1)
        factors = factors[:, None]
        mask = self._mask(self.lengths, self.group_size)
        near_own = None
        if mask is not None and mask.shape[2] > 1:
            mask = mask.repeat(1, 1, num_candidates, 1)
        if self.reach is not None:
            near_own = self.reach.near_own(embedded.device)
        readout = self._for_each(self.readout, num_candidates)
        anchor = self._for_each(self.anchor, num_candidates)
        p = embedded if anchor is None else embedded + anchor
        kept = []
        passed = range(self.first_predicted, len(self.layers))
        for index, modulation in zip(passed, modulations):
            p, block = block_forward(
                self.layers[index], p, factors, *self._seen(index), mask, modulation, near_own
            )
            kept.append(block)
        energy, normed = head_forward(network, p, final, embedded, readout)
        if not with_gradient:
            return energy, None

        gradient, direct = head_backward(network, p, normed, final, embedded, readout)
        for index, modulation in zip(reversed(passed), reversed(modulations)):
            gradient = block_backward(
                self.layers[index], gradient, kept.pop(), factors, *self._seen(index), modulation
            )
        if direct is not None:
            gradient = gradient + direct
        return energy, gradient

    def _begins_again(self, index: int) -> bool:
        """Whether a further pass of a looped network begins here, see model/baseline.py."""
        return index > 0 and index % len(self.network.layers) == 0

    def _keep_anchor(self, index: int, last: Tensor) -> None:
        """last (B, P, D): each row's last group in front of block `index`."""
        network = self.network
        if not isinstance(network, EnergyTransformer) or not network.is_anchored:
            return
        if index == self.first_predicted:
            self.anchor = last

    def _keep_readout(self, last: Tensor) -> None:
        """last (B, P, D): each row's last group behind the last block."""
        network = self.network
        if isinstance(network, EnergyTransformer) and network.reads_output:
            assert network.content is not None
            self.readout = network.content.readout(last)

    def _reads_output_of(self, index: int) -> bool:
        """Of the last block only the keys and values are read, unless a head reads its output."""
        if not isinstance(self.network, EnergyTransformer) or self.network.reads_output:
            return True
        return index + 1 < len(self.layers)

    def _seen(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer as far as any row has them."""
        return self.keys[index][:, :, : self.longest], self.values[index][:, :, : self.longest]

    def _next_places(self, count: int) -> Tensor:
        """(B, count): where the first so many rows of each row's next group stand."""
        cells = torch.arange(count, device=self.lengths.device)
        return self.lengths[:, None] + cells

    def _for_each(self, of_group: Tensor | None, num_candidates: int) -> Tensor | None:
        """What a group (B, P, ..) gives the rows of each of its candidates; one row serves all."""
        if of_group is None or self.group_size == 1:
            return of_group
        return of_group.repeat(1, num_candidates, 1)

    def _factors(self, places: Tensor, like: Tensor) -> Tensor:
        """Rotations of places (B, n): complex (B, n, d / 2)."""
        table = self.network.rotary(self.capacity + 1 + self.context_group, like).factors
        return torch.view_as_complex(table[places])

    def _mask(self, lengths: Tensor, num_rows: int) -> Tensor | None:
        """(B, 1, 1, longest), True where a row has no entry; None where every row has all.

        With model.reach (1 or B, 1, num_rows, longest): what the first so many rows of a group do
        not see either.
        """
        mask = None
        if not bool((lengths == self.longest).all()):
            entries = torch.arange(self.longest, device=lengths.device)
            mask = (entries >= lengths[:, None])[:, None, None]
        if self.reach is None:
            return mask
        far = ~self.reach.near_context(self.longest, lengths.device)[None, None, :num_rows]
        return far if mask is None else mask | far


def _with_capacity(tensor: Tensor, capacity: int) -> Tensor:
    """(B, H_kv, S, d) in a tensor with room for more positions, (B, H_kv, capacity, d)."""
    whole = tensor.new_zeros(*tensor.shape[:2], capacity, tensor.shape[3])
    whole[:, :, : tensor.shape[2]] = tensor
    return whole
