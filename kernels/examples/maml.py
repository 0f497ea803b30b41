"""Meta-learning (MAML): train weights so that one gradient step adapts them to a new task.

    python kernels/examples/maml.py

A task is a sine of its own height and phase. The inner step is a gradient of the loss on the task's
first points; the outer loss, on its other points, is differentiated through that gradient. vmap
takes all tasks at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ebwm_kernels import causal_attention, swiglu

TASKS, POINTS, WIDTH, HEADS = 16, 10, 16, 2
INNER_STEP, NUM_UPDATES = 0.1, 80


def initial_weights() -> dict[str, Tensor]:
    """The weights of one block over a set of points."""
    shapes = {
        "embed": (2, WIDTH),
        "queries": (WIDTH, WIDTH),
        "keys": (WIDTH, WIDTH),
        "values": (WIDTH, WIDTH),
        "gate": (WIDTH, 2 * WIDTH),
        "up": (WIDTH, 2 * WIDTH),
        "down": (2 * WIDTH, 1),
    }
    weights = {}
    for name, shape in shapes.items():
        weights[name] = (torch.randn(shape) / shape[0] ** 0.5).requires_grad_()
    return weights


def predict(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """y for each x (points,) of a task."""
    h = torch.stack([x, torch.ones_like(x)], -1) @ weights["embed"]
    h = torch.sin(h)
    q, k, v = (heads(h @ weights[name]) for name in ("queries", "keys", "values"))
    h = h + causal_attention(q, k, v, causal=False)[0].transpose(0, 1).flatten(1)
    return (swiglu(h @ weights["gate"], h @ weights["up"]) @ weights["down"]).squeeze(-1)


def heads(x: Tensor) -> Tensor:
    """(points, D) -> (1, H, points, d)."""
    return x.unflatten(-1, (HEADS, -1)).transpose(0, 1)[None]


def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return (predict(weights, x) - y).square().mean()


def adapted_loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The loss on the second half of a task's points after one step on the first half."""
    half = POINTS // 2
    gradients = torch.func.grad(loss)(weights, x[:half], y[:half])
    stepped = {name: w - INNER_STEP * gradients[name] for name, w in weights.items()}
    return loss(stepped, x[half:], y[half:])


def draw_tasks() -> tuple[Tensor, Tensor]:
    x = 4 * torch.rand(TASKS, POINTS) - 2
    height = 0.5 + torch.rand(TASKS, 1)
    phase = torch.pi * torch.rand(TASKS, 1)
    return x, height * torch.sin(x + phase)


def main() -> tuple[float, float]:
    """(loss after adaptation at the start, at the end): means of ten updates."""
    torch.manual_seed(0)
    weights = initial_weights()
    optimizer = torch.optim.Adam(weights.values(), lr=0.01)
    losses = []
    for _ in range(NUM_UPDATES):
        x, y = draw_tasks()
        outer = torch.func.vmap(adapted_loss, in_dims=(None, 0, 0))(weights, x, y).mean()
        optimizer.zero_grad()
        outer.backward()
        optimizer.step()
        losses.append(float(outer.detach()))
    first = sum(losses[:10]) / 10
    last = sum(losses[-10:]) / 10
    print(f"loss after one adaptation step: {first:.3f} at first, {last:.3f} in the end")
    return first, last


if __name__ == "__main__":
    main()
