"""What the tests of attention share: cases, inputs, and every number of a first and second
derivative.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ebwm_kernels import causal_attention, energy_attention
from ebwm_kernels.attention.causal import causal_attention_definition
from ebwm_kernels.attention.energy import energy_attention_definition


class Case(NamedTuple):
    B: int
    H: int
    H_kv: int
    S: int
    C: int
    d: int
    offset: int = 0
    own: bool = True  # energy_attention; causal_attention otherwise
    causal: bool = True

    def inputs(
        self,
        *,
        dtype=torch.float64,
        seed: int = 0,
        scale: float = 1.0,
        common_key: float = 0.0,
        device="cpu",
    ) -> list[Tensor]:
        """q [, k_self, v_self], K, V as leaves.

        common_key: length of a vector that all keys share.
        """
        generator = torch.Generator().manual_seed(seed)
        sizes = [(self.B, self.H, self.S, self.d)] * (3 if self.own else 1) + [
            (self.B, self.H_kv, self.C, self.d)
        ] * 2
        tensors = [
            scale * torch.randn(*size, generator=generator, dtype=torch.float64) for size in sizes
        ]
        if common_key:
            shared = common_key * F.normalize(
                torch.randn(self.d, generator=generator, dtype=torch.float64), dim=0
            )
            tensors = [
                u + shared if i in ((1, 3) if self.own else (1,)) else u
                for i, u in enumerate(tensors)
            ]
        return [u.to(device, dtype).requires_grad_() for u in tensors]

    def attention(self, *inputs: Tensor, backend: str = "auto") -> Tensor:
        if self.own:
            return energy_attention(*inputs, context_offset=self.offset, backend=backend)
        return causal_attention(
            *inputs, causal=self.causal, context_offset=self.offset, backend=backend
        )

    def definition(self, *inputs: Tensor) -> Tensor:
        if self.own:
            return energy_attention_definition(*inputs, context_offset=self.offset)
        return causal_attention_definition(*inputs, causal=self.causal, context_offset=self.offset)

    def sdpa_math(self, *inputs: Tensor) -> Tensor:
        """The same through PyTorch's MATH backend: own keys are S more keys, each seen by one
        query.
        """
        q, *own, k, v = inputs
        k, v = (u.repeat_interleave(self.H // self.H_kv, 1) for u in (k, v))
        seen = torch.ones(self.S, self.C, dtype=torch.bool, device=q.device)
        seen = seen.tril(self.offset) if self.causal else seen
        if own:
            k, v = torch.cat([k, own[0]], 2), torch.cat([v, own[1]], 2)
            seen = torch.cat([seen, torch.eye(self.S, dtype=torch.bool, device=q.device)], 1)
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def derivatives(function, inputs: list[Tensor]) -> list[Tensor]:
    """Output, inner gradient of q, k*, v* or q, K, V (under create_graph), and the gradients of a
    loss of both with respect to every input.
    """
    out = function(*inputs)
    inner = torch.autograd.grad((out.square() + out.sin()).sum(), inputs[:3], create_graph=True)
    loss = (out * out.detach().cos()).sum() + sum(
        ((i + 1) * g.sin()).sum() for i, g in enumerate(inner)
    )
    return [out, *inner, *torch.autograd.grad(loss, inputs)]


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """Euclidean length of the difference over that of the exact result."""
    exact = exact.detach()
    return float((ours.detach().to(exact) - exact).norm() / exact.norm().clamp_min(1e-300))
