"""The observed stream of a group of samples, encoded once for all steps and tiles that read it.

Gradients of all its readers collect in detached copies of its keys and values. After the last
reader they are back-propagated through the observed stream once (deferred_backward.py).
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from ebwm_scale.model.energy_transformer import Context, EnergyTransformer
from ebwm_scale.refinement import block_recompute
from ebwm_scale.refinement.deferred_backward import DeferredBackward


class ContextCache:
    """Contexts of observed embeddings (B, S, D), by landscape.

    num_reads: how often each landscape's context is read by a differentiated step in one tile.
    with_backward: gradients are needed. by_block: encode with block_recompute. first_visible: of
    the samples' positions, see Context.
    """

    def __init__(
        self,
        network: EnergyTransformer,
        observed: Tensor,
        *,
        num_reads: Counter[int],
        num_tiles: int,
        with_backward: bool,
        by_block: bool,
        first_visible: Tensor | None = None,
    ):
        self.network = network
        self.observed = observed
        self.with_backward = with_backward
        self.by_block = by_block
        self.first_visible = first_visible
        self.contexts: dict[int, Context] = {}
        self.backwards: dict[int, DeferredBackward] = {}
        self.reads_left: Counter[int] = Counter()
        for landscape, count in num_reads.items():
            self.reads_left[network.context_key(landscape)] += count * num_tiles

    def get(self, landscape: int) -> Context:
        """The context that a step in this landscape reads, encoded at its first use."""
        key = self.network.context_key(landscape)
        if key not in self.contexts:
            with_graph = self.with_backward and self.reads_left[key] > 0
            backward = DeferredBackward(enabled=self.with_backward)
            with torch.set_grad_enabled(with_graph):
                context = self._encode(landscape)
            self.contexts[key] = context.map(backward.detach)
            self.backwards[key] = backward
        return self.contexts[key]

    def release(self, landscape: int) -> None:
        """A step that reads it has been back-propagated; after the last one it is as well."""
        key = self.network.context_key(landscape)
        self.reads_left[key] -= 1
        if self.reads_left[key] == 0:
            del self.contexts[key]
            self.backwards.pop(key).backward()

    def _encode(self, landscape: int) -> Context:
        if self.by_block:
            return block_recompute.encode_context(
                self.network, self.observed, landscape, self.first_visible
            )
        return self.network.encode_context(self.observed, landscape, self.first_visible)
