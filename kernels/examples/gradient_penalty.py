"""A gradient penalty through attention: a critic whose slope is held at one.

    python kernels/examples/gradient_penalty.py

The critic reads a sequence with bidirectional attention. Its penalty, (slope - 1)^2 with the length
of the gradient as slope, is a function of a gradient: training it differentiates attention twice.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ebwm_kernels import causal_attention, rms_norm

BATCH, LENGTH, WIDTH, HEADS = 16, 8, 16, 2
NUM_UPDATES, PENALTY_WEIGHT = 80, 100


class Critic(nn.Module):
    """A score for each sequence (B, S, D)."""

    def __init__(self):
        super().__init__()
        self.norm = nn.Parameter(torch.ones(WIDTH))
        self.queries = nn.Linear(WIDTH, WIDTH)
        self.keys = nn.Linear(WIDTH, WIDTH)
        self.values = nn.Linear(WIDTH, WIDTH)
        self.score = nn.Linear(WIDTH, 1)

    def forward(self, sequence: Tensor) -> Tensor:
        normed = rms_norm(sequence, self.norm, 1e-5)
        q, k, v = (heads(f(normed)) for f in (self.queries, self.keys, self.values))
        attended = causal_attention(q, k, v, causal=False).transpose(1, 2).flatten(2)
        return self.score(sequence + attended).sum((1, 2))


def heads(x: Tensor) -> Tensor:
    """(B, S, D) -> (B, H, S, d)."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def slopes(critic: Critic, sequence: Tensor) -> Tensor:
    """The length of each sequence's gradient (B,), with a graph."""
    sequence = sequence.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(sequence).sum(), sequence, create_graph=True)
    return gradient.flatten(1).norm(dim=1)


def main() -> tuple[float, float]:
    """(penalty before, penalty after) training."""
    torch.manual_seed(0)
    critic = Critic()
    optimizer = torch.optim.Adam(critic.parameters(), lr=0.01)
    real = torch.randn(BATCH, LENGTH, WIDTH) + 1
    fake = torch.randn(BATCH, LENGTH, WIDTH)
    penalties = []
    for _ in range(NUM_UPDATES):
        mix = torch.rand(BATCH, 1, 1)
        penalty = (slopes(critic, mix * real + (1 - mix) * fake) - 1).square().mean()
        loss = critic(fake).mean() - critic(real).mean() + PENALTY_WEIGHT * penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        penalties.append(float(penalty.detach()))
    print(f"gradient penalty: {penalties[0]:.3f} before, {penalties[-1]:.5f} after")
    return penalties[0], penalties[-1]


if __name__ == "__main__":
    main()
