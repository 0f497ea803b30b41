"""The energy transformer: E(context, candidate next state), one number per position.

    context = network.encode_context(observed)      once per landscape: K and V of every layer
    energy  = network.energy(candidates, context)   any number of times

Step conditioning (`model.conditioning`) tells refinement steps apart by a landscape index:
    default         not at all
    time_embed      a learned token per landscape stands in front of the context, at position 0
    adaln           shift, scale and gate of every block and of the final norm come from a
                    landscape embedding
    adaln_zero      the same, starting from zero: every block starts as the identity, the energy
                    as 0
    predicted_only  the same for the predicted stream alone, starting as `default`; so all
                    landscapes share one context
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebwm_scale.config.resolved import model_sizes
from ebwm_scale.config.schema import ModelConfig
from ebwm_scale.model.blocks import Block, Modulation, RMSNorm, initialize_released, modulate
from ebwm_scale.model.module_list import ModuleList
from ebwm_scale.model.rotary import Rotary, RotaryTable


@dataclass(frozen=True)
class Context:
    """The observed stream as the predicted one sees it.

    keys_values: (K, V) per layer, each (B, H_kv, C, d). offset: keys in front of the first row's
    own observed position. first_visible (B, S) int32: the first key that each row sees, the start
    of its document; None: all see key 0.
    """

    keys_values: list[tuple[Tensor, Tensor]]
    offset: int
    first_visible: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Context:
        """The same with every key and value tensor replaced by the function's result."""
        pairs = [(function(keys), function(values)) for keys, values in self.keys_values]
        return replace(self, keys_values=pairs)

    def select(self, rows: Tensor | slice) -> Context:
        """The context of some samples."""
        part = self.map(lambda tensor: tensor[rows])
        if self.first_visible is None:
            return part
        return replace(part, first_visible=self.first_visible[rows])

    def visible_to(self, positions: slice) -> Context:
        """What the candidates of some positions see.

        That is everything up to the last of them, the first one's own observed position included.
        """
        last = self.offset + positions.stop
        pairs = [(keys[:, :, :last], values[:, :, :last]) for keys, values in self.keys_values]
        first_visible = None
        if self.first_visible is not None:
            first_visible = self.first_visible[:, positions]
        return replace(
            self,
            keys_values=pairs,
            offset=self.offset + positions.start,
            first_visible=first_visible,
        )


class EnergyTransformer(nn.Module):
    """Blocks on two streams, a final norm, and a linear head that gives the energy."""

    landscape_embedding: nn.Embedding | None
    modulations: ModuleList[nn.Linear] | None
    final_modulation: nn.Linear | None

    def __init__(self, config: ModelConfig, num_landscapes: int):
        super().__init__()
        self.conditioning = config.conditioning
        self.num_landscapes = num_landscapes
        sizes = model_sizes(config)
        width = sizes.width
        self.layers = ModuleList(Block(config) for _ in range(sizes.num_layers))
        self.norm = RMSNorm(width, config.norm_epsilon)
        self.head = nn.Linear(width, 1, bias=False)
        self.rotary = RotaryTable(sizes.head_dimension, config.rope_theta)
        self.landscape_embedding = None
        if self.conditioning != "default":
            self.landscape_embedding = nn.Embedding(num_landscapes, width)
        self.modulations = None
        self.final_modulation = None
        if self.conditioning in ("adaln", "adaln_zero", "predicted_only"):
            self.modulations = ModuleList(nn.Linear(width, 6 * width) for _ in self.layers)
            self.final_modulation = nn.Linear(width, 2 * width)
        initialize_released(self)
        if self.conditioning in ("adaln_zero", "predicted_only"):
            assert self.modulations is not None and self.final_modulation is not None
            for linear in [*self.modulations, self.final_modulation]:
                nn.init.zeros_(linear.weight)
        if self.conditioning == "adaln_zero":
            nn.init.zeros_(self.head.weight)

    @property
    def shares_context(self) -> bool:
        """Whether one encoded context serves every landscape."""
        return one_context_serves_all(self.conditioning, self.num_landscapes)

    def context_key(self, landscape: int) -> int:
        """Which encoded context a landscape reads: equal keys, equal contexts."""
        return 0 if self.shares_context else landscape

    def prepend_landscape(self, observed: Tensor, landscape: int) -> tuple[Tensor, int]:
        """(observed rows with the landscape's token in front, how many rows that is)."""
        if self.conditioning != "time_embed":
            return observed, 0
        assert self.landscape_embedding is not None
        token = self.landscape_embedding.weight[landscape].expand(observed.shape[0], 1, -1)
        return torch.cat([token, observed], 1), 1

    def encode_context(
        self, observed: Tensor, landscape: int = 0, first_visible: Tensor | None = None
    ) -> Context:
        """Keys and values of the observed stream (B, S, D); first_visible: see Context."""
        observed, offset = self.prepend_landscape(observed, landscape)
        modulations, _ = self.modulations_of(landscape, predicted=False)
        rotary = self.rotary(observed.shape[1], observed)
        last = len(self.layers) - 1
        keys_values = []
        for index, (layer, modulation) in enumerate(zip(self.layers, modulations)):
            keys, values = layer.keys_values(observed, rotary, modulation)
            keys_values.append((keys, values))
            if index < last:  # of the last block only the keys and values are ever read
                observed = layer.forward_observed(
                    observed, keys, values, rotary, modulation, first_visible
                )
        return Context(keys_values, offset, first_visible)

    def energy(self, predicted: Tensor, context: Context, landscape: int = 0) -> Tensor:
        """Energies (B, S) of candidates (B, S, D).

        Row t is a candidate for position t + 1, given observed positions 0 .. t.
        """
        modulations, final = self.modulations_of(landscape, predicted=True)
        rotary = self.predicted_rotary(predicted, context)
        for layer, keys_values, modulation in zip(self.layers, context.keys_values, modulations):
            predicted = layer.forward_predicted(
                predicted, keys_values, rotary, context.offset, modulation, context.first_visible
            )
        return self.energy_head(predicted, final)

    def predicted_rotary(self, predicted: Tensor, context: Context) -> Rotary:
        """p_t stands where the real o_(t+1) would."""
        first = context.offset + 1
        return self.rotary(first + predicted.shape[1], predicted).slice(first, predicted.shape[1])

    def energy_head(self, predicted: Tensor, final: tuple[Tensor, Tensor] | None) -> Tensor:
        """Energies (B, S) of the predicted stream (B, S, D) behind the last block.

        final: (shift, scale) of its norm, where there are any.
        """
        predicted = self.norm(predicted)
        if final is not None:
            predicted = modulate(predicted, *final)
        return self.head(predicted).squeeze(-1)

    def modulations_of(
        self, landscape: int, *, predicted: bool
    ) -> tuple[Sequence[Modulation | None], tuple[Tensor, Tensor] | None]:
        """(one Modulation or None per layer, (shift, scale) of the final norm) for a stream."""
        unconditioned = self.conditioning == "predicted_only" and not predicted
        if self.modulations is None or unconditioned:
            return [None] * len(self.layers), None
        assert self.landscape_embedding is not None and self.final_modulation is not None
        signal = F.silu(self.landscape_embedding.weight[landscape])
        modulations = [Modulation(*linear(signal).chunk(6)) for linear in self.modulations]
        if self.conditioning == "predicted_only":
            modulations = [_count_gates_from_one(modulation) for modulation in modulations]
        shift, scale = self.final_modulation(signal).chunk(2)
        return modulations, (shift, scale)


def one_context_serves_all(conditioning: str, num_landscapes: int) -> bool:
    """Whether the observed stream is the same in every landscape."""
    return conditioning in ("default", "predicted_only") or num_landscapes == 1


def _count_gates_from_one(modulation: Modulation) -> Modulation:
    """So that zero weights mean `default`."""
    return modulation._replace(
        attention_gate=1 + modulation.attention_gate,
        feed_forward_gate=1 + modulation.feed_forward_gate,
    )
