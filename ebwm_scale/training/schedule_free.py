"""Schedule-free AdamW: an average of the weights in place of a decay of the learning rate.

    y_k      = (1 - beta1) z_k + beta1 x_k           where gradients are taken: the model's weights
    v_(k+1)  = beta2 v_k + (1 - beta2) g_k^2         g_k the gradient at y_k
    z_(k+1)  = z_k - rate (g_k / (sqrt(v / (1 - beta2^(k+1))) + epsilon) + decay y_k)
    x_(k+1)  = (1 - c) x_k + c z_(k+1),              c = w_k / (w_0 + .. + w_k), w = rate^2

The result is x, which a checkpoint holds as the weights' average (`--weights ema`); the weights are
y. Everything is number by number, so parts of parameters do with their parts, at every ZeRO stage.

Source: Defazio et al., arXiv 2405.15682, algorithm 1 with Adam's scale; c as in their code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ebwm_scale.checkpoint.parameter_shard import AVERAGE, MOMENTS, SEQUENCE

SQUARES = MOMENTS[1]


class ScheduleFreeAdamW(torch.optim.Optimizer):
    """groups: with lr and weight_decay. rate_factor: of update k (0-based) on the peak rate; the
    weights w follow from it alone, so they need not be saved.
    """

    kinds = (SEQUENCE, AVERAGE, SQUARES)  # of numbers that its state has for each of a parameter

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        rate_factor: Callable[[int], float],
    ):
        super().__init__(list(groups), {"lr": lr, "weight_decay": 0.0})
        self.betas = betas
        self.eps = eps
        self.rate_factor = rate_factor
        self._sum = (0, 0.0)  # how many weights w are in it

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update what has a gradient; parameters hold y before and after."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)
        return loss

    def share_of_newest(self, update: int) -> float:
        """c of update k (0-based)."""
        count, total = self._sum
        if count > update:
            count, total = 0, 0.0
        for k in range(count, update + 1):
            total += self.rate_factor(k) ** 2
        self._sum = (update + 1, total)
        return self.rate_factor(update) ** 2 / total if total else 1.0

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        gradient = p.grad
        assert gradient is not None, "what has no gradient is passed over"
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state[SEQUENCE] = p.detach().clone()
            state[AVERAGE] = p.detach().clone()
            state[SQUARES] = torch.zeros_like(p)
        beta1, beta2 = self.betas
        update = int(state["step"])
        squares, z, x = state[SQUARES], state[SEQUENCE], state[AVERAGE]
        squares.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = squares.div(1 - beta2 ** (update + 1)).sqrt_().add_(self.eps)
        direction = torch.div(gradient, scale).add_(p, alpha=group["weight_decay"])
        z.sub_(direction, alpha=group["lr"])
        x.lerp_(z, self.share_of_newest(update))
        p.copy_(torch.lerp(z, x, beta1))
        state["step"] += 1
