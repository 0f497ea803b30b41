"""What is refined: the state spaces, each with four things: its size, embed into width D, one descent step, and the criterion.

    x (B, S, size)          a candidate next state per position, float32 (float64 in tests) whatever the weights' dtype
    embed(x) (B, S, D)      linear in softmax(x) (vocabulary) or in x (embedding)
    descend(x, g, alpha)    the step along -dE/dx, given g = dE/d embed(x): the chain rule through embed is the state's own business

They hold no parameters of their own, only references to the world model's.
So the inner gradient of the network is always a D-vector per position, and nothing of size V passes through autograd's second order.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebwm_kernels.vocabulary import (IGNORE, vocabulary_descend, vocabulary_descend_reference, vocabulary_embed,
                                     vocabulary_embed_reference)


@dataclass(frozen=True)
class VocabularyState:
    """V logits per position, embedded as softmax(x) @ weight; criterion: cross-entropy in nats."""
    weight: Tensor              # (V, D): an own matrix, or the token embedding's
    update: str                 # "probabilities" or "logits"

    @property
    def size(self) -> int:
        return self.weight.shape[0]

    def embed(self, x: Tensor) -> Tensor:
        embed = vocabulary_embed_reference if x.requires_grad else vocabulary_embed
        return embed(x.flatten(0, 1), self.weight).unflatten(0, x.shape[:2])

    def descend(self, x: Tensor, gradient: Tensor, step_size: Tensor, targets: Tensor | None, *, connected: bool = False,
                keep_state: bool = True) -> tuple[Tensor | None, Tensor | None]:
        """(next state, mean loss or None). connected: the next state carries the graph of this step (refinement.graph full)."""
        rows, gradient = x.flatten(0, 1), gradient.flatten(0, 1)
        alpha = step_size if step_size.ndim == 0 else step_size.flatten(0, 1)
        flat_targets = None if targets is None else targets.flatten()
        if connected:
            state = vocabulary_descend_reference(rows, self.weight, gradient, alpha, update=self.update)
            loss = None if targets is None else F.cross_entropy(state, flat_targets, ignore_index=IGNORE)
        else:
            state, loss = vocabulary_descend(rows, self.weight, gradient, alpha, flat_targets, update=self.update, keep_state=keep_state)
        return (None if state is None else state.view(x.shape)), loss

    def slope(self, gradient: Tensor) -> Tensor:
        """dE/dp (B, S, V), p = softmax(x), of g (B, S, D)."""
        return gradient @ self.weight.T

    def loss(self, x: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
        """Cross-entropy of a state read as logits; reduction "none" gives (B, S)."""
        loss = F.cross_entropy(x.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction=reduction)
        return loss.view(targets.shape) if reduction == "none" else loss


@dataclass(frozen=True)
class EmbeddingState:
    """A frame embedding per position, mapped by the projection that observed frames share; criterion: SmoothL1, beta 1."""
    projection: nn.Linear

    @property
    def size(self) -> int:
        return self.projection.in_features

    def embed(self, x: Tensor) -> Tensor:
        return self.projection(x.to(self.projection.weight.dtype))

    def descend(self, x: Tensor, gradient: Tensor, step_size: Tensor, targets: Tensor | None, *, connected: bool = False,
                keep_state: bool = True) -> tuple[Tensor | None, Tensor | None]:
        state = x - step_size * self.slope(gradient).to(x.dtype)
        loss = None if targets is None else self.loss(state, targets)
        return (state if connected else state.detach()) if keep_state else None, loss

    def slope(self, gradient: Tensor) -> Tensor:
        """dE/dx (B, S, size) of g (B, S, D)."""
        return gradient @ self.projection.weight

    def loss(self, x: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
        """SmoothL1 against the true embeddings; reduction "none" gives (B, S), the mean over the embedding."""
        if reduction == "none":
            return F.smooth_l1_loss(x, targets.to(x.dtype), beta=1.0, reduction="none").mean(-1)
        return F.smooth_l1_loss(x, targets.to(x.dtype), beta=1.0, reduction=reduction)
