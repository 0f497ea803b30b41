"""The workspace: numbers beside a row's state that are refined by the same energy, not scored.

    z (B, S, width)        carries intermediate results from step to step; float32 or float64
    w = Z z (B, S, D)      enters the predicted stream beside the embedded candidate
    z <- z - beta dE/dz    dE/dz = Z' dE/dw; beta has a learned step size of its own
                           (with `refinement.decay` c from (1 - c) z; with `refinement.momentum`
                           the changes of the steps before are added)

The loss reads the state alone. So z is trained where a later step's graph reaches an earlier one:
under `refinement.graph: full`, or through a context that is encoded again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class WorkspaceState:
    """What moves a workspace: Z, a Linear of width to D numbers without bias, and beta."""

    map: nn.Linear
    step_size: Tensor

    @property
    def width(self) -> int:
        return self.map.in_features

    def embed(self, z: Tensor) -> Tensor:
        """w (B, S, D) of z (B, S, width)."""
        return self.map(z.to(self.map.weight.dtype))

    def change(
        self, energy_grad: Tensor, dtype: torch.dtype, scale: Tensor | float = 1.0
    ) -> Tensor:
        """-beta dE/dz (B, S, width) in the workspace's dtype, given dE/dw (B, S, D).

        scale: a factor on the step, a number or (B, S, 1).
        """
        of_z = energy_grad @ self.map.weight
        return -(self.step_size * scale * of_z.to(dtype))

    def update(
        self, z: Tensor, change: Tensor, scale: Tensor | float = 1.0, decay: float = 0.0
    ) -> Tensor:
        """The next z. scale: of the step, as in `change`.

        decay: `refinement.decay`, the share of z that a whole step forgets.
        """
        if decay:
            z = z * (1 - decay * scale)
        return z + change
