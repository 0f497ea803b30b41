"""A physics-informed network with attention: -u'' = f on (0, 1), u = 0 at both ends.

    python kernels/examples/pinn.py

Each point attends to learned tokens. Training minimises the energy of the equation, the integral
of u'^2 / 2 - f u, so that it needs u' and the gradient of u': two derivatives. The residual u'' + f
is then checked with the Laplacian by forward over reverse, again two. A loss of u'' itself would
need three, which attention refuses.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ebwm_kernels import cross_attention

POINTS, TOKENS, WIDTH, HEADS = 64, 8, 16, 2
NUM_ITERATIONS = 100


class Field(nn.Module):
    """u (points,) at x (points,), zero at 0 and 1."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(1, WIDTH)
        self.keys = nn.Parameter(torch.randn(1, HEADS, TOKENS, WIDTH // HEADS))
        self.values = nn.Parameter(torch.randn(1, HEADS, TOKENS, WIDTH // HEADS))
        self.out = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.embed(x[:, None]))
        q = h.unflatten(-1, (HEADS, -1)).transpose(0, 1)[None]
        attended = cross_attention(q, self.keys, self.values)[0].transpose(0, 1).flatten(1)
        return x * (1 - x) * self.out(h + attended).squeeze(-1)


def source(x: Tensor) -> Tensor:
    """f, for which u is sin(pi x)."""
    return torch.pi**2 * torch.sin(torch.pi * x)


def energy(field: Field, x: Tensor) -> Tensor:
    """The mean over the points of u'^2 / 2 - f u, with a graph."""
    x = x.detach().requires_grad_()
    u = field(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return (slope.square() / 2 - source(x) * u).mean()


def laplacian(field: Field, x: Tensor) -> Tensor:
    """u'' at each point: points do not see each other, so that one direction serves all."""

    def total(x: Tensor) -> Tensor:
        return field(x).sum()

    _, second = torch.func.jvp(torch.func.grad(total), (x,), (torch.ones_like(x),))
    return second


def main() -> tuple[float, float]:
    """(largest error of u, root mean square of u'' + f relative to f) after training."""
    torch.manual_seed(0)
    field = Field().double()
    x = ((torch.arange(POINTS) + 0.5) / POINTS).double()
    optimizer = torch.optim.LBFGS(
        field.parameters(), max_iter=NUM_ITERATIONS, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = energy(field, x)
        value.backward()
        return value

    optimizer.step(closure)
    with torch.no_grad():
        error = float((field(x) - torch.sin(torch.pi * x)).abs().max())
        residual = laplacian(field, x) + source(x)
        relative = float(residual.norm() / source(x).norm())
    print(f"largest error of u {error:.4f}; residual u'' + f, relative: {relative:.3f}")
    return error, relative


if __name__ == "__main__":
    main()
