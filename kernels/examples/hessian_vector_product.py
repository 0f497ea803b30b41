"""The sharpness of a loss: the largest eigenvalue of its Hessian, by products with vectors.

    python kernels/examples/hessian_vector_product.py

torch.func.jvp of torch.func.grad multiplies the Hessian over all weights of a block by a vector, at
the cost of a few gradients. Power iteration then finds the largest eigenvalue.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ebwm_kernels import causal_attention, rms_norm, swiglu

BATCH, LENGTH, WIDTH, HEADS = 4, 12, 16, 2
NUM_ITERATIONS = 40

Weights = dict[str, Tensor]


def initial_weights() -> Weights:
    shapes = {
        "queries": (WIDTH, WIDTH),
        "keys": (WIDTH, WIDTH),
        "values": (WIDTH, WIDTH),
        "gate": (WIDTH, 2 * WIDTH),
        "up": (WIDTH, 2 * WIDTH),
        "down": (2 * WIDTH, WIDTH),
    }
    weights = {name: torch.randn(shape) / shape[0] ** 0.5 for name, shape in shapes.items()}
    return weights | {"norm": torch.ones(WIDTH)}


def loss(weights: Weights, x: Tensor, y: Tensor) -> Tensor:
    """Squared error of one transformer block; x, y: (B, S, D)."""
    normed = rms_norm(x, weights["norm"], 1e-5)
    q, k, v = (heads(normed @ weights[name]) for name in ("queries", "keys", "values"))
    h = x + causal_attention(q, k, v).transpose(1, 2).flatten(2)
    h = h + swiglu(h @ weights["gate"], h @ weights["up"]) @ weights["down"]
    return (h - y).square().mean()


def heads(x: Tensor) -> Tensor:
    """(B, S, D) -> (B, H, S, d)."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def hessian_times(weights: Weights, direction: Weights, x: Tensor, y: Tensor) -> Weights:
    gradient = torch.func.grad(loss)
    _, product = torch.func.jvp(lambda w: gradient(w, x, y), (weights,), (direction,))
    return product


def length(u: Weights) -> Tensor:
    return torch.stack([part.norm() for part in u.values()]).norm()


def main() -> tuple[float, float]:
    """(largest eigenvalue in absolute value, relative change in the last iteration)."""
    torch.manual_seed(0)
    weights = initial_weights()
    x = torch.randn(BATCH, LENGTH, WIDTH)
    y = torch.randn(BATCH, LENGTH, WIDTH)
    direction = {name: torch.randn_like(w) for name, w in weights.items()}
    previous = torch.zeros(())
    size = length(direction)
    for _ in range(NUM_ITERATIONS):
        direction = {name: part / size for name, part in direction.items()}
        direction = hessian_times(weights, direction, x, y)
        previous, size = size, length(direction)
    change = float((size - previous).abs() / size)
    print(f"largest eigenvalue of the Hessian: {float(size):.4f} (last change {change:.1e})")
    return float(size), change


if __name__ == "__main__":
    main()
