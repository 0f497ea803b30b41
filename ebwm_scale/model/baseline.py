"""Transformer++: the same blocks on the observed stream alone, predicting the next state directly."""
from __future__ import annotations

from torch import Tensor, nn

from ..config import ModelConfig
from .transformer import Block, RMSNorm, RotaryTable, initialize_released


class BaselineTransformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.width, config.norm_epsilon)
        self.rotary = RotaryTable(config.width // config.num_heads, config.rope_theta)
        initialize_released(self)

    def forward(self, observed: Tensor) -> Tensor:
        """Hidden states (B, S, D) of the observed stream (B, S, D)."""
        rotary = self.rotary(observed.shape[1], observed)
        for layer in self.layers:
            observed = layer.observe(observed, *layer.keys_values(observed, rotary), rotary)
        return self.norm(observed)
