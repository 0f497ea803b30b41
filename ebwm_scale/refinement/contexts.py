"""What the steps read of the observed stream of a group of samples.

Step 0, and every step without `refinement.reencode`, reads the first encoding: the observed stream
alone, encoded once for all steps and tiles that read it. With `refinement.reencode` a further step
reads one that the predictions before it shaped (e_t: position t's embedded candidate):

    front    the observed stream in front of the blocks that are encoded again, once per landscape,
             behind all earlier passes (`model.loops`)
    first    the rest of the blocks on front
    again    the rest of the blocks on front + U e (+ Uz w, of mapped workspaces)

Gradients of all readers of front and first collect in detached copies of their tensors. After the
last reader they are back-propagated once (deferred_backward.py). `again` is a part of its own
step's graph: through U e it reaches the map of states and, under graph full, the steps before.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ebwm_scale.model.context import Context, ObservedStream
from ebwm_scale.model.energy_transformer import EnergyTransformer
from ebwm_scale.refinement import block_recompute
from ebwm_scale.refinement.deferred_backward import DeferredBackward
from ebwm_scale.refinement.step_plan import StepPlan

FRONT = "front"
FIRST = "first"


class ContextCache:
    """Contexts of observed embeddings (B, S, D), by landscape.

    num_tiles: how many tiles take the planned steps; one, of whole samples, where the plan encodes
    again. with_backward: gradients are needed. by_block: encode with block_recompute.
    first_visible: of the samples' positions, see Context.
    """

    def __init__(
        self,
        network: EnergyTransformer,
        observed: Tensor,
        plan: Sequence[StepPlan],
        *,
        num_tiles: int,
        with_backward: bool,
        by_block: bool,
        first_visible: Tensor | None = None,
    ):
        self.network = network
        self.observed = observed
        self.with_backward = with_backward
        self.first_visible = first_visible
        self.advance = network.advance
        if by_block:
            self.advance = functools.partial(block_recompute.advance, network)
        self.encoded: dict[tuple[str, int], ObservedStream | Context] = {}
        self.backwards: dict[tuple[str, int], DeferredBackward] = {}
        self.reads_left: Counter[tuple[str, int]] = Counter()
        self.again: Context | None = None
        for step in plan:
            if step.needs_graph:
                self.reads_left[self._read_by(step)] += num_tiles
        for part, key in list(self.reads_left):
            if part == FIRST:
                self.reads_left[FRONT, key] += 1

    def of_step(self, step: StepPlan, embedded: Tensor, workspace: Tensor | None = None) -> Context:
        """The context that a step reads; embedded, workspace (B, S, D): what enters it."""
        if step.encodes_again:
            self.again = self._encode_again(step, embedded, workspace)
        if step.encoded_before == 0:
            return self._first(step.landscape)
        assert self.again is not None, "the plan encodes before it reads"
        return self.again

    def release(self, step: StepPlan) -> None:
        """A step has been back-propagated; after the last reader what it read is as well."""
        self._release(self._read_by(step))

    def _read_by(self, step: StepPlan) -> tuple[str, int]:
        """What a step reads of what is encoded once: (part, context key)."""
        part = FIRST if step.encoded_before == 0 else FRONT
        return part, self.network.context_key(step.landscape)

    def _release(self, name: tuple[str, int]) -> None:
        self.reads_left[name] -= 1
        if self.reads_left[name] > 0:
            return
        del self.encoded[name]
        self.backwards.pop(name).backward()
        part, key = name
        if part == FIRST:
            self._release((FRONT, key))

    def _front(self, landscape: int) -> ObservedStream:
        def encode() -> ObservedStream:
            stream = self.network.start(self.observed, landscape, self.first_visible, self.advance)
            return self.advance(stream, landscape, self.network.first_reencoded)

        stream = self._once(FRONT, landscape, encode)
        assert isinstance(stream, ObservedStream)
        return stream

    def _first(self, landscape: int) -> Context:
        context = self._once(
            FIRST, landscape, lambda: self._finish(self._front(landscape), landscape)
        )
        assert isinstance(context, Context)
        return context

    def _encode_again(self, step: StepPlan, embedded: Tensor, workspace: Tensor | None) -> Context:
        """embedded, workspace (B, S, D): position t's have seen o_1 .. o_t only."""
        front = self._front(step.landscape)
        if not step.needs_graph:
            embedded = embedded.detach()
            workspace = None if workspace is None else workspace.detach()
        with torch.set_grad_enabled(self.with_backward and step.encodes_with_graph):
            stream = self.network.add_predictions(front, embedded, workspace)
            return self._finish(stream, step.landscape)

    def _finish(self, stream: ObservedStream, landscape: int) -> Context:
        """The context of a stream that has some blocks still in front of it."""
        stream = self.advance(stream, landscape, len(self.network.layers))
        return self.network.context_of(stream)

    def _once(
        self, part: str, landscape: int, encode: Callable[[], ObservedStream | Context]
    ) -> ObservedStream | Context:
        """What `encode` returns, at the first use, on detached copies of its tensors."""
        name = (part, self.network.context_key(landscape))
        if name not in self.encoded:
            with_graph = self.with_backward and self.reads_left[name] > 0
            backward = DeferredBackward(enabled=self.with_backward)
            with torch.set_grad_enabled(with_graph):
                encoded = encode()
            self.encoded[name] = encoded.map(backward.detach)
            self.backwards[name] = backward
        return self.encoded[name]
