"""The energy transformer: E(context, candidate next state), one number per position.

    context = network.encode(observed)              once per landscape: K and V of every layer
    energy  = network.energy(predicted, context)    any number of times

Step conditioning (`model.conditioning`) tells refinement steps apart by a landscape index:
    default         not at all
    time_embed      a learned token per landscape stands in front of the context, at rotary position 0
    adaln           shift, scale and gate of every block and of the final norm come from a landscape embedding
    adaln_zero      the same, starting from zero: every block starts as the identity, the energy as 0
    predicted_only  the same for the predicted stream alone, starting as `default`; so all landscapes share one context
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import block_sweeps
from ..config import ModelConfig
from .transformer import (
    Block,
    Modulation,
    RMSNorm,
    Rotary,
    RotaryTable,
    initialize_released,
    modulate,
)


@dataclass(frozen=True)
class Context:
    """The observed stream as the predicted one sees it: (K, V) per layer, each (B, H_kv, C, d), and how many keys precede the first row's o."""

    keys_values: list[tuple[Tensor, Tensor]]
    offset: int

    def cut(self, by: Callable[[Tensor], Tensor]) -> "Context":
        """The same with leaves in place of keys and values (term_gradients.py)."""
        return Context([(by(keys), by(values)) for keys, values in self.keys_values], self.offset)

    def at(self, positions: slice) -> "Context":
        """What the candidates of some positions see: everything up to the last of them, the first one's own observed position included."""
        last = self.offset + positions.stop
        return Context(
            [(keys[:, :, :last], values[:, :, :last]) for keys, values in self.keys_values],
            self.offset + positions.start,
        )


class EnergyTransformer(nn.Module):
    def __init__(self, config: ModelConfig, num_landscapes: int):
        super().__init__()
        self.conditioning, self.num_landscapes = config.conditioning, num_landscapes
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.width, config.norm_epsilon)
        self.head = nn.Linear(config.width, 1, bias=False)
        self.rotary = RotaryTable(config.width // config.num_heads, config.rope_theta)
        self.landscape_embedding = (
            nn.Embedding(num_landscapes, config.width) if self.conditioning != "default" else None
        )
        self.modulations, self.final_modulation = None, None
        if self.conditioning in ("adaln", "adaln_zero", "predicted_only"):
            self.modulations = nn.ModuleList(
                nn.Linear(config.width, 6 * config.width) for _ in self.layers
            )
            self.final_modulation = nn.Linear(config.width, 2 * config.width)
        initialize_released(self)
        if self.conditioning in ("adaln_zero", "predicted_only"):
            for linear in [*self.modulations, self.final_modulation]:
                nn.init.zeros_(linear.weight)
        if self.conditioning == "adaln_zero":
            nn.init.zeros_(self.head.weight)

    @property
    def shares_context(self) -> bool:
        """Whether one encoded context serves every landscape."""
        return self.conditioning in ("default", "predicted_only") or self.num_landscapes == 1

    def encode(self, observed: Tensor, landscape: int = 0, *, by_block: bool = False) -> Context:
        """Keys and values of the observed stream. observed: (B, S, D). by_block: see block_sweeps.py."""
        offset = 0
        if self.conditioning == "time_embed":
            token = self.landscape_embedding.weight[landscape].expand(observed.shape[0], 1, -1)
            observed, offset = torch.cat([token, observed], 1), 1
        if by_block:
            return Context(block_sweeps.encode(self, observed, landscape), offset)
        modulations, _ = self.modulations_of(landscape, predicted=False)
        rotary = self.rotary(observed.shape[1], observed)
        keys_values = []
        for index, (layer, modulation) in enumerate(zip(self.layers, modulations)):
            keys, values = layer.keys_values(observed, rotary, modulation)
            keys_values.append((keys, values))
            if index + 1 < len(
                self.layers
            ):  # of the last block only the keys and values are ever read
                observed = layer.observe(observed, keys, values, rotary, modulation)
        return Context(keys_values, offset)

    def energy(self, predicted: Tensor, context: Context, landscape: int = 0) -> Tensor:
        """Energies (B, S) of candidates (B, S, D): row t is a candidate for position t + 1, given observed positions 0 .. t."""
        modulations, final = self.modulations_of(landscape, predicted=True)
        rotary = self.predicted_rotary(predicted, context)
        for layer, keys_values, modulation in zip(self.layers, context.keys_values, modulations):
            predicted = layer.predict(predicted, keys_values, rotary, context.offset, modulation)
        return self.score(predicted, final or ())

    def predicted_rotary(self, predicted: Tensor, context: Context) -> Rotary:
        """p_t stands where the real o_(t+1) would."""
        first = context.offset + 1
        return self.rotary(first + predicted.shape[1], predicted).slice(first, predicted.shape[1])

    def score(self, predicted: Tensor, final: tuple[Tensor, Tensor] | tuple[()]) -> Tensor:
        """Energies (B, S) of the predicted stream behind the last block; final: (shift, scale) of its norm, where there are any."""
        predicted = self.norm(predicted)
        if final:
            predicted = modulate(predicted, *final)
        return self.head(predicted).squeeze(-1)

    def modulations_of(self, landscape: int, *, predicted: bool):
        """(one Modulation or None per layer, (shift, scale) of the final norm or None) for a stream."""
        if self.modulations is None or (self.conditioning == "predicted_only" and not predicted):
            return [None] * len(self.layers), None
        signal = F.silu(self.landscape_embedding.weight[landscape])
        modulations = [Modulation(*linear(signal).chunk(6)) for linear in self.modulations]
        if (
            self.conditioning == "predicted_only"
        ):  # gates count from 1, so that zero weights mean `default`
            modulations = [
                m._replace(
                    attention_gate=1 + m.attention_gate, feed_forward_gate=1 + m.feed_forward_gate
                )
                for m in modulations
            ]
        return modulations, self.final_modulation(signal).chunk(2)
