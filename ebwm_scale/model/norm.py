"""RMSNorm, its modulation by adaLN, and the residuals that pass it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ebwm_kernels import add_rms_norm, rms_norm, rms_norm_beside
from ebwm_scale.model.fused import is_fused


class Modulation(NamedTuple):
    """Shift, scale and gate of a block's attention, then of its feed-forward; each (D,).

    Source: adaLN, arXiv 2212.09748.
    """

    attention_shift: Tensor
    attention_scale: Tensor
    attention_gate: Tensor
    feed_forward_shift: Tensor
    feed_forward_scale: Tensor
    feed_forward_gate: Tensor


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + epsilon) * weight, arXiv 1910.07467.

    backend: see ebwm_kernels.pointwise.
    """

    def __init__(self, width: int, epsilon: float, backend: str = "auto"):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon
        self.backend = backend

    def forward(
        self,
        x: Tensor,
        shift: Tensor | None = None,
        scale: Tensor | None = None,
        *,
        added: Tensor | None = None,
        with_input: bool = False,
    ):
        """(.., D), modulated by a shift and scale (D,) where they are given.

        with_input: (x, that). added: (x + added, that of the sum). One call for all of it: engines
        that split the weight gather it for `forward` alone.
        """
        weight = self.weight
        if shift is not None and scale is not None:
            if not is_fused(self.backend, x):
                return self._plainly_modulated(x, shift, scale, added, with_input)
            weight = weight * (1 + scale)
        options = {"shift": shift, "backend": self.backend}
        if added is not None:
            return add_rms_norm(x, added, weight, self.epsilon, **options)
        if with_input and is_fused(self.backend, x):
            return rms_norm_beside(x, weight, self.epsilon, **options)
        normed = rms_norm(x, weight, self.epsilon, **options)
        return (x, normed) if with_input else normed

    def _plainly_modulated(
        self, x: Tensor, shift: Tensor, scale: Tensor, added: Tensor | None, with_input: bool
    ):
        """`forward` as the released code computes it: modulated behind the norm."""
        total = x if added is None else x + added
        normed = rms_norm(total, self.weight, self.epsilon, backend="reference")
        normed = modulate(normed, shift, scale)
        return (total, normed) if with_input or added is not None else normed

    def beside(
        self, x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(x, `forward` of it): the x that a residual past the norm reads."""
        return self(x, shift, scale, with_input=True)

    def of_sum(
        self, x: Tensor, added: Tensor, shift: Tensor | None = None, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(x + added, `forward` of it): a residual and the norm behind it."""
        return self(x, shift, scale, added=added)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift
