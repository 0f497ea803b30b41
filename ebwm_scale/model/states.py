"""What is refined: the state spaces, each with four things: its size, how it enters a step, one descent step, and the criterion.

    x (B, S, size)              a candidate next state per position, float32 (float64 in tests) whatever the weights' dtype
    enter(x)                    what a step needs of x: its embedding e (B, S, D), and for a vocabulary p = softmax(x)
    descend(entered, g, alpha)  the step along -dE/dx, given g = dE/de: the chain rule through the embedding is the state's own business

They hold no parameters of their own, only references to the world model's.
So the inner gradient of the network is always a D-vector per position, and nothing of size V passes through autograd's second order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from ..term_gradients import Cut, sink_of
from ebwm_kernels.vocabulary import (
    IGNORE,
    NO_CLAMPS,
    Clamps,
    clamped_step,
    vocabulary_descend,
    vocabulary_descend_reference,
    vocabulary_embed,
    vocabulary_embed_reference,
    vocabulary_step,
)


class Entered(NamedTuple):
    """A state inside a step. embedded (B, S, D); what descends: probabilities (B, S, V), x (B, S, size), or x through probabilities.

    spare: memory of a state's size that nobody needs any more.
    """

    embedded: Tensor
    probabilities: Tensor | None = None
    x: Tensor | None = None
    spare: Tensor | None = None


class Descended(NamedTuple):
    """After a step. x: the next state, if asked for; entered: that state inside the next step, where it is free; loss: with targets."""

    x: Tensor | None
    entered: Entered | None
    loss: Tensor | None


@dataclass(frozen=True)
class VocabularyState:
    """V logits per position, embedded as softmax(x) @ weight; criterion: cross-entropy in nats."""

    weight: Tensor  # (V, D): an own matrix, or the token embedding's
    update: str  # "probabilities", "logits" or "mirror"
    clamps: Clamps = NO_CLAMPS
    sink: Tensor | None = (
        None  # (V, D) where the map's gradient is added up, see kernels/vocabulary.py
    )

    @property
    def size(self) -> int:
        return self.weight.shape[0]

    def cut(self, by: Cut) -> "VocabularyState":
        """The same on a leaf in place of the map, which receives the map's gradient."""
        leaf = by(self.weight)
        return replace(self, weight=leaf, sink=sink_of(leaf))

    def count(self, targets: Tensor) -> Tensor:
        """Over how many of the targets (..., S) a mean loss is taken; a tensor without dimensions."""
        return (targets != IGNORE).sum()

    def enter(self, x: Tensor) -> Entered:
        """x is overwritten where it can be."""
        rows = x.flatten(0, 1)
        if x.requires_grad:
            entered = vocabulary_embed_reference(rows, self.weight)
        else:
            entered = vocabulary_embed(
                rows,
                self.weight,
                sink=self.sink,
                out=rows if self.update == "probabilities" else None,
            )
        probabilities, embedded = (u.unflatten(0, x.shape[:2]) for u in entered)
        return Entered(
            embedded,
            None if self.update == "mirror" else probabilities,
            None if self.update == "probabilities" else x,
        )

    def descend(
        self,
        entered: Entered,
        gradient: Tensor,
        step_size: Tensor,
        targets: Tensor | None,
        count: Tensor | None,
        *,
        connected: bool = False,
        keep_state: bool = True,
        go_on: bool = False,
        loss_weight: float = 1.0,
    ) -> Descended:
        """The step along -dE/dx and its loss, a sum over the targets divided by `count`.

        connected: the next state carries the graph of this step (refinement.graph full). go_on: another step follows, without noise.
        loss_weight: the loss's weight in what is back-propagated: the sink and the next entered state bring the map's gradient of it.
        """
        moving = entered.probabilities if entered.x is None else entered.x
        shape = moving.shape
        p, x = (None if u is None else u.flatten(0, 1) for u in (entered.probabilities, entered.x))
        hidden = (-step_size * gradient.to(moving.dtype)).flatten(0, 1)
        flat_targets = None if targets is None else targets.flatten()
        options = {"count": count, "sink": self.sink, "loss_weight": loss_weight}
        if connected:
            state = vocabulary_descend_reference(
                self.weight, hidden, probabilities=p, x=x, clamps=self.clamps
            )
            loss = (
                None
                if targets is None
                else F.cross_entropy(state, flat_targets, ignore_index=IGNORE, reduction="sum")
                / count.clamp(min=1)
            )
        elif (
            go_on and not keep_state and self.update == "probabilities" and self.clamps == NO_CLAMPS
        ):  # two tensors of the state's size take turns
            after, embedded, loss = vocabulary_step(
                p, self.weight, hidden, flat_targets, out=entered.spare, **options
            )
            return Descended(
                None, Entered(embedded.view(gradient.shape), after.view(shape), spare=p), loss
            )
        else:
            state, loss = vocabulary_descend(
                self.weight,
                hidden,
                flat_targets,
                probabilities=p,
                x=x,
                keep_state=keep_state or go_on,
                clamps=self.clamps,
                out=entered.spare,
                **options,
            )
        return Descended(None if state is None else state.view(shape), None, loss)

    def slope(self, gradient: Tensor) -> Tensor:
        """dE/dp (B, S, V), p = softmax(x), of g (B, S, D)."""
        return gradient @ self.weight.T

    def loss(self, x: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
        """Cross-entropy of a state read as logits; reduction "none" gives (B, S)."""
        loss = F.cross_entropy(
            x.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction=reduction
        )
        return loss.view(targets.shape) if reduction == "none" else loss


@dataclass(frozen=True)
class EmbeddingState:
    """A frame embedding per position, mapped by the projection that observed frames share; criterion: SmoothL1, beta 1."""

    projection: nn.Linear
    clamps: Clamps = NO_CLAMPS

    @property
    def size(self) -> int:
        return self.projection.in_features

    def cut(self, by: Cut) -> "EmbeddingState":
        return self  # a module of parameters

    def count(self, targets: Tensor) -> Tensor:
        return targets.new_tensor(targets.shape[:-1].numel())

    def enter(self, x: Tensor) -> Entered:
        return Entered(self.projection(x.to(self.projection.weight.dtype)), x=x)

    def descend(
        self,
        entered: Entered,
        gradient: Tensor,
        step_size: Tensor,
        targets: Tensor | None,
        count: Tensor | None,
        *,
        connected: bool = False,
        keep_state: bool = True,
        go_on: bool = False,
        loss_weight: float = 1.0,
    ) -> Descended:
        state = clamped_step(
            entered.x, -step_size * self.slope(gradient).to(entered.x.dtype), self.clamps
        )
        loss = (
            None if targets is None else self.loss(state, targets, reduction="none").sum() / count
        )
        return Descended(
            (state if connected else state.detach()) if keep_state or go_on else None, None, loss
        )

    def slope(self, gradient: Tensor) -> Tensor:
        """dE/dx (B, S, size) of g (B, S, D)."""
        return gradient @ self.projection.weight

    def loss(self, x: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
        """SmoothL1 against the true embeddings; reduction "none" gives (B, S), the mean over the embedding."""
        if reduction == "none":
            return F.smooth_l1_loss(x, targets.to(x.dtype), beta=1.0, reduction="none").mean(-1)
        return F.smooth_l1_loss(x, targets.to(x.dtype), beta=1.0, reduction=reduction)
