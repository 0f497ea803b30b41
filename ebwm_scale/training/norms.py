"""Norms of gradients, weights and updates by layer and by kind of parameter
(logging.norms_every_steps), the same at every ZeRO stage.

    gradient   of the mean loss, in front of the clipping
    weight     before the update
    update     what the optimizer adds, with the decay

Every process sums squares over the numbers that it updates, and one sum over all of them follows. A
gradient is read where the optimizer is given it, which is the one place that all stages, precisions
and offloading share: flat, in float32, clipped. So the factor of the clipping is taken out again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ebwm_scale.core.world import World
from ebwm_scale.training.deepspeed.engine import Engine
from ebwm_scale.training.place import Place

KINDS = ("gradient", "weight", "update")
LAYER = re.compile(r"network\.(?:layers|modulations)\.(\d+)\.")
# The first that is found in a parameter's name says of which kind it is.
GROUPS = (
    ("norm", "norms"),
    (".attention.", "attention"),
    (".feed_forward.", "feed_forward"),
    ("embedding", "embeddings"),
    ("frame_projection", "embeddings"),
    ("state_map", "output"),
    ("output", "output"),
    ("modulation", "conditioning"),
    ("step_size", "step_size"),
    ("exit_logits", "exits"),
)


def parts_of(name: str) -> list[str]:
    """The layer and the kind that a parameter counts for; "head" for what is in neither list."""
    kind = next((group for sign, group in GROUPS if sign in name), "head")
    layer = LAYER.match(name)
    return [kind] if layer is None else [f"layer_{layer[1]}", kind]


class NormMeter:
    """Of one engine. Every rank has one, and measures at the same steps."""

    def __init__(self, engine: Engine, world: World):
        self.engine = engine
        self.world = world
        self.limit = engine.config.optimizer.gradient_clipping
        names = [name for name, p in engine.module.named_parameters() if p.requires_grad]
        self.parts = list(dict.fromkeys(part for name in names for part in parts_of(name)))

    @contextmanager
    def measured(self) -> Iterator[dict[str, dict[str, float]]]:
        """Around the engine's step that updates: the norms are in the dictionary afterwards, part
        -> kind -> number. Takes a copy of the weights meanwhile.
        """
        found: dict[str, dict[str, float]] = {}
        places = list(self.engine.state.places())
        before = {name: place.part_of(place.tensor.detach()).clone() for name, place in places}
        squares = torch.zeros(len(KINDS), len(self.parts), dtype=torch.float64)
        inner = self.engine.state.inner
        hook = inner.register_step_pre_hook(lambda *_: self._read_gradients(squares, places, inner))
        try:
            yield found
        finally:
            hook.remove()
        for name, place in places:
            now = place.part_of(place.tensor.detach())
            self._add(squares, "weight", name, before[name])
            self._add(squares, "update", name, now - before[name])
        total = self.world.all_reduce(squares.to(self.world.device)).sqrt().cpu()
        for column, part in enumerate(self.parts):
            found[part] = {kind: total[row, column].item() for row, kind in enumerate(KINDS)}

    def before_clipping(self, norms: dict[str, dict[str, float]], norm: float) -> None:
        """Take the clipping's factor out of the gradients' norms. norm: of all of them."""
        if self.limit and norm + 1e-6 > self.limit:
            for of_part in norms.values():
                of_part["gradient"] *= (norm + 1e-6) / self.limit

    def _read_gradients(self, squares: Tensor, places: list[tuple[str, Place]], inner) -> None:
        """DeepSpeed may give the optimizer a group at a time: what it steps now is read."""
        stepped = {id(p) for group in inner.param_groups for p in group["params"]}
        for name, place in places:
            gradient = place.tensor.grad
            if id(place.tensor) in stepped and gradient is not None:
                self._add(squares, "gradient", name, place.part_of(gradient.contiguous()))

    def _add(self, squares: Tensor, kind: str, name: str, numbers: Tensor) -> None:
        square = torch.linalg.vector_norm(numbers, dtype=torch.float64).square().cpu()
        for part in parts_of(name):
            squares[KINDS.index(kind), self.parts.index(part)] += square
