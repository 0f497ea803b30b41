"""The linear maps into the observed stream: nn.Linear, whose product is spelt out.

DeepSpeed's ZeRO stage 3 replaces torch.nn.functional.linear by one that gathers and partitions the
weight in its backward. An energy model's parameters are gathered by the model itself
(refinement/block_recompute.py), and the partitioned weight would be handed a whole gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Projection(nn.Linear):
    """x (.., in_features) to (.., out_features); the same numbers as nn.Linear with a bias."""

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.addmm(self.bias, x.reshape(-1, self.in_features), self.weight.t())
        return rows.view(*x.shape[:-1], self.out_features)
