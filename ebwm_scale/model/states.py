"""What is refined: the state spaces, each with its size, its embedding, its update and its loss.

    x (B, S, size)         a candidate next state per position, float32 (float64 in tests)
                           whatever the weights' dtype; after a first step with
                           `refinement.candidates` a CandidateState (candidates.py)
    embed(x)               what a step needs of x: e (B, S, D), and for text p = softmax(x)
    update(e, g, alpha)    the step along -dE/dx, given g = dE/de, and the loss after it:
                           the chain rule through the embedding is the state space's own business

They hold no parameters of their own, only references to the world model's. The inner gradient of
the network is always a D-vector per position, and nothing of size V passes through autograd's
second order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebwm_kernels.vocabulary.api import vocabulary_descend_reference, vocabulary_embed_reference
from ebwm_kernels.vocabulary.autograd import vocabulary_descend, vocabulary_embed, vocabulary_step
from ebwm_kernels.vocabulary.formulas import NO_CLAMPS, Clamps, clamped_step, state_dtype
from ebwm_kernels.vocabulary.graph_steps import descend_with_graph, embed_with_graph
from ebwm_kernels.vocabulary.softmax_cross_entropy import IGNORE, LEAST_COUNT
from ebwm_scale.model.candidates import CandidateState, CandidateSteps
from ebwm_scale.model.fused import is_fused


class EmbeddedState(NamedTuple):
    """A state inside a step.

    vectors (B, S, D) enter the network. The rest is what the update reads: probabilities
    (B, S, V) alone where they are what moves, state (B, S, size) alone where it moves directly,
    both where the state moves through the softmax; neither for a state of zeros that moves
    directly. moved (B, S, D): the state is moved @ W.T, after steps of a kind that started there.
    scratch: memory of a state's size whose contents nobody needs any more. candidates: the state,
    where only its candidates move; probabilities are then theirs, (B S, K).
    """

    vectors: Tensor
    probabilities: Tensor | None = None
    state: Tensor | None = None
    moved: Tensor | None = None
    scratch: Tensor | None = None
    candidates: CandidateState | None = None

    def decayed(self, kept: Tensor | float) -> EmbeddedState:
        """The same with the state that an update starts from times `kept`, a number or (B, S, 1).

        What entered the network and what the gradient goes through stay.
        """
        state = None if self.state is None else self.state * kept
        moved = None if self.moved is None else self.moved * kept
        return self._replace(state=state, moved=moved)


class StateUpdate(NamedTuple):
    """After a step.

    state: the next state, if it was asked for. next_embedded: that state inside the next step,
    where it costs nothing. loss: a scalar, with targets. z_term: the z-loss's part of it, without
    a graph, where there is one.
    """

    state: Tensor | CandidateState | None
    next_embedded: EmbeddedState | None
    loss: Tensor | None
    z_term: Tensor | None = None


class Targets(NamedTuple):
    """values: token ids (B, S) or embeddings (B, S, size); count: how many a mean loss is over.

    The count is that of the whole batch, also in a part of it: losses of parts add up. Where n
    processes share a sequence it is an n-th of what they score together (model/sequence.py).
    """

    values: Tensor
    count: Tensor

    def slice(self, samples: slice, positions: slice) -> Targets:
        return Targets(self.values[samples, positions], self.count)


class UpdateChoices(Protocol):
    """What an update reads of a step's plan (refinement/step_plan.py)."""

    @property
    def is_last(self) -> bool: ...
    @property
    def needs_graph(self) -> bool: ...
    @property
    def next_needs_graph(self) -> bool: ...
    @property
    def keep_graph(self) -> bool: ...
    @property
    def keep_state(self) -> bool: ...
    @property
    def loss_weight(self) -> float: ...
    @property
    def ends_graph(self) -> bool: ...
    @property
    def chooses_candidates(self) -> bool: ...
    @property
    def keep_whole(self) -> bool: ...


@dataclass(frozen=True)
class VocabularyState:
    """V logits per position, embedded as softmax(x) @ weight; loss: cross-entropy in nats.

    weight (V, D): a map of its own, or the token embedding's. update_rule: `refinement.update`.
    grad_buffer (V, D): where the map's gradient is summed, see ebwm_kernels.vocabulary.api.
    num_candidates: how many tokens of a position further steps move, below V; None: all.
    z_weight: of the z-loss in the loss of `update` (train.z_loss); 0 outside of training.
    backend: of the passes over states, see ebwm_kernels.pointwise.
    """

    weight: Tensor
    update_rule: str
    clamps: Clamps = NO_CLAMPS
    grad_buffer: Tensor | None = None
    num_candidates: int | None = None
    z_weight: float = 0.0
    backend: str = "auto"

    @property
    def size(self) -> int:
        return self.weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the states."""
        return state_dtype(self.weight)

    def targets(self, values: Tensor) -> Targets:
        """Token ids (B, S); IGNORE where a position does not count."""
        return Targets(values, (values != IGNORE).sum())

    def scored(self, values: Tensor) -> Tensor:
        """(B, S), bool: which positions of target values count."""
        return values != IGNORE

    def embed(self, x: Tensor | CandidateState) -> EmbeddedState:
        """x (B, S, V) is overwritten where it can be."""
        if isinstance(x, CandidateState):
            vectors, probabilities = self._candidate_steps().embed(x)
            return EmbeddedState(vectors, probabilities=probabilities, candidates=x)
        rows = x.flatten(0, 1)
        probabilities_move = self.update_rule == "probabilities"
        if x.requires_grad and self._fuses_graph:
            return self._embed_with_graph(rows, x.shape[:2])
        if x.requires_grad:
            probabilities, vectors = vocabulary_embed_reference(rows, self.weight)
        else:
            probabilities, vectors = vocabulary_embed(
                rows,
                self.weight,
                grad_buffer=self.grad_buffer,
                out=rows if probabilities_move else None,
                backend=self.backend,
            )
        probabilities = probabilities.unflatten(0, x.shape[:2])
        vectors = vectors.unflatten(0, x.shape[:2])
        if probabilities_move:
            return EmbeddedState(vectors, probabilities=probabilities)
        if self.update_rule == "mirror":
            return EmbeddedState(vectors, state=x)
        return EmbeddedState(vectors, probabilities=probabilities, state=x)

    def embed_zeros(self, shape: tuple[int, int]) -> EmbeddedState:
        """`embed` of a state of zeros for (B, S) positions, whose softmax is uniform.

        All rows have the same vector, the map's mean row: no product over the vocabulary. What is
        of the state's size is one number, seen V times for every row; nobody may write there.
        """
        vectors = self.weight.mean(0).expand(*shape, -1)
        if self.update_rule == "mirror":
            return EmbeddedState(vectors)
        numbers = self.weight.detach().new_tensor([1 / self.size, 0], dtype=self.dtype)
        probabilities, state = (number.expand(*shape, self.size) for number in numbers)
        if self.update_rule == "probabilities":
            return EmbeddedState(vectors, probabilities=probabilities)
        return EmbeddedState(vectors, probabilities=probabilities, state=state)

    def update(
        self,
        embedded: EmbeddedState,
        energy_grad: Tensor,
        alpha: Tensor,
        targets: Targets | None,
        step: UpdateChoices,
        carried: Tensor | None = None,
    ) -> StateUpdate:
        """The step along -dE/dx and its loss.

        energy_grad (B, S, D): dE/d vectors. alpha: scalar or (B, S, 1). carried (B, S, D): added
        to -alpha dE/d vectors, what `refinement.momentum` keeps of the steps before.
        """
        direction = -alpha * energy_grad.to(self.dtype)
        if carried is not None:
            direction = direction + carried
        if embedded.candidates is not None or self._chooses(step):
            return self._update_candidates(embedded, direction, targets, step)
        if step.keep_graph and self._fuses_graph:
            return self._fused_update_with_graph(embedded, direction, targets)
        if step.keep_graph:
            return self._update_with_graph(embedded, direction, targets)
        # Mirror steps from zeros add up in front of the map: nothing of the state's size is kept.
        adds_up = self.update_rule == "mirror" and embedded.state is None
        can_embed = self.update_rule == "probabilities" or adds_up
        can_embed = can_embed and self.clamps == NO_CLAMPS and self.z_weight == 0
        # The map's gradient of this loss comes with that of the next embedded state.
        can_embed = can_embed and (step.loss_weight == 0 or step.next_needs_graph)
        if can_embed and not step.is_last and not step.keep_state:
            return self._update_and_embed(embedded, direction, targets, step)
        return self._update_and_score(embedded, direction, targets, step)

    def _update_with_graph(
        self, embedded: EmbeddedState, direction: Tensor, targets: Targets | None
    ) -> StateUpdate:
        """In plain autograd: the next state carries the graph of this step."""
        shape = direction.shape[:2]
        state = vocabulary_descend_reference(
            self.weight,
            direction.flatten(0, 1),
            probabilities=_as_rows(embedded.probabilities),
            x=_as_rows(embedded.state),
            clamps=self.clamps,
        )
        loss = None
        if targets is not None:
            total = F.cross_entropy(
                state, targets.values.flatten(), ignore_index=IGNORE, reduction="sum"
            )
            loss = total / targets.count.clamp(min=LEAST_COUNT)
        z_term = None
        if loss is not None and targets is not None and self.z_weight:
            counted = (targets.values.flatten() != IGNORE).to(state.dtype)
            squares = state.logsumexp(-1).square() * counted
            z_term = self.z_weight * squares.sum() / targets.count.clamp(min=LEAST_COUNT)
            loss = loss + z_term
            z_term = z_term.detach()
        return StateUpdate(state.unflatten(0, shape), None, loss, z_term)

    @property
    def _fuses_graph(self) -> bool:
        """Whether steps whose states carry a graph run fused."""
        return is_fused(self.backend, self.weight)

    def _embed_with_graph(self, rows: Tensor, shape: torch.Size) -> EmbeddedState:
        keep_p = self.update_rule != "mirror"
        state, probabilities, vectors = embed_with_graph(
            rows, self.weight, keep_p=keep_p, grad_buffer=self.grad_buffer
        )
        vectors, state = vectors.unflatten(0, shape), state.unflatten(0, shape)
        if probabilities is not None:
            probabilities = probabilities.unflatten(0, shape)
        if self.update_rule == "probabilities":
            return EmbeddedState(vectors, probabilities=probabilities)
        return EmbeddedState(vectors, probabilities=probabilities, state=state)

    def _fused_update_with_graph(
        self, embedded: EmbeddedState, direction: Tensor, targets: Targets | None
    ) -> StateUpdate:
        """The same as _update_with_graph."""
        start, through = embedded.probabilities, None
        if embedded.state is not None:
            start, through = embedded.state, embedded.probabilities
        state, loss, z_term = descend_with_graph(
            self.weight,
            direction.flatten(0, 1),
            None if targets is None else targets.values.flatten(),
            start=_as_rows(start),
            through=_as_rows(through),
            clamps=self.clamps,
            count=None if targets is None else targets.count,
            grad_buffer=self.grad_buffer,
            z_weight=self.z_weight,
        )
        return StateUpdate(state.unflatten(0, direction.shape[:2]), None, loss, z_term)

    def _update_and_embed(
        self,
        embedded: EmbeddedState,
        direction: Tensor,
        targets: Targets | None,
        step: UpdateChoices,
    ) -> StateUpdate:
        """Straight into the next step: two tensors of the state's size take turns."""
        shape = direction.shape[:2]
        probabilities_move = self.update_rule == "probabilities"
        start = _as_rows(embedded.probabilities) if probabilities_move else None
        next_probabilities, vectors, loss = vocabulary_step(
            start,
            self.weight,
            direction.flatten(0, 1),
            None if targets is None else targets.values.flatten(),
            count=None if targets is None else targets.count,
            grad_buffer=self.grad_buffer,
            loss_weight=step.loss_weight,
            out=embedded.scratch,
            moved=_as_rows(embedded.moved),
            backend=self.backend,
        )
        next_embedded = EmbeddedState(vectors.unflatten(0, shape))
        if not probabilities_move:
            moved = direction.detach()
            if embedded.moved is not None:
                moved = moved + embedded.moved
            return StateUpdate(None, next_embedded._replace(moved=moved), loss)
        # A backward that is still to come reads them; the uniform start is one number, seen many
        # times.
        is_memory = step.ends_graph and start is not None and start.stride(-1) == 1
        next_embedded = next_embedded._replace(
            probabilities=next_probabilities.unflatten(0, shape),
            scratch=start if is_memory else None,
        )
        return StateUpdate(None, next_embedded, loss)

    def _update_and_score(
        self,
        embedded: EmbeddedState,
        direction: Tensor,
        targets: Targets | None,
        step: UpdateChoices,
    ) -> StateUpdate:
        """The next state without a graph, and its loss with one."""
        z_term = self._no_z_term(targets)
        # Where only the next step has a graph, nobody reads the gradients of this one's loss.
        with torch.set_grad_enabled(step.needs_graph):
            state, loss = vocabulary_descend(
                self.weight,
                direction.flatten(0, 1),
                None if targets is None else targets.values.flatten(),
                probabilities=_as_rows(embedded.probabilities),
                x=_as_rows(embedded.state),
                keep_state=step.keep_state or not step.is_last,
                count=None if targets is None else targets.count,
                grad_buffer=self.grad_buffer,
                loss_weight=step.loss_weight,
                clamps=self.clamps,
                out=embedded.scratch,
                moved=_as_rows(embedded.moved),
                z_weight=self.z_weight,
                z_sum=z_term,
                backend=self.backend,
            )
        if state is not None:
            state = state.unflatten(0, direction.shape[:2])
        return StateUpdate(state, None, loss, z_term)

    def _no_z_term(self, targets: Targets | None) -> Tensor | None:
        """Where a z-loss is summed; None without one."""
        if targets is None or not self.z_weight:
            return None
        return torch.zeros((), dtype=self.dtype, device=self.weight.device)

    def _chooses(self, step: UpdateChoices) -> bool:
        return step.chooses_candidates and self.num_candidates is not None

    def _candidate_steps(self) -> CandidateSteps:
        assert self.num_candidates is not None, "the state has candidates"
        return CandidateSteps(
            self.weight,
            self.update_rule,
            self.clamps,
            self.grad_buffer,
            self.num_candidates,
            self.backend,
        )

    def _update_candidates(
        self,
        embedded: EmbeddedState,
        direction: Tensor,
        targets: Targets | None,
        step: UpdateChoices,
    ) -> StateUpdate:
        """The first step, after which candidates are chosen, or one that moves them."""
        steps = self._candidate_steps()
        loss = None
        z_term = self._no_z_term(targets)
        # Where only the next step has a graph, nobody reads the gradients of this one's loss.
        with torch.set_grad_enabled(step.needs_graph):
            if embedded.candidates is None:
                state = steps.first(
                    direction,
                    None if targets is None else targets.values,
                    probabilities=embedded.probabilities,
                    state=embedded.state,
                    keep_whole=step.keep_whole,
                    out=embedded.scratch,
                )
            else:
                assert embedded.probabilities is not None, "candidates enter by their probabilities"
                state = steps.update(embedded.candidates, embedded.probabilities, direction)
            if targets is not None:
                loss = steps.loss(
                    state, targets.values, targets.count, z_weight=self.z_weight, z_sum=z_term
                )
        if step.is_last and not step.keep_whole:
            return StateUpdate(None, None, loss, z_term)
        return StateUpdate(state if step.keep_graph else state.detach(), None, loss, z_term)

    def embedding_vjp(self, energy_grad: Tensor) -> Tensor:
        """dE/dp (B, S, V), p = softmax(x), of dE/de (B, S, D)."""
        return energy_grad @ self.weight.T

    def decay_energy(self, x: Tensor) -> Tensor:
        """R (B, S) of states (B, S, V), whose step along -dR is the decay of x.

        Mirror descent: the divergence of softmax(x) from the uniform distribution. Of logits that
        move themselves: |x|^2 / 2.
        """
        if self.update_rule != "mirror":
            return x.square().sum(-1) / 2
        log_probabilities = x.log_softmax(-1)
        return (log_probabilities.exp() * log_probabilities).sum(-1) + math.log(self.size)

    def loss(self, x: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
        """Cross-entropy of a state read as logits; reduction "none" gives (B, S)."""
        loss = F.cross_entropy(
            x.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction=reduction
        )
        if reduction == "none":
            return loss.view(targets.shape)
        return loss


@dataclass(frozen=True)
class EmbeddingState:
    """A frame embedding per position; loss: SmoothL1, beta 1.

    projection: maps it to D numbers; observed frames share it.
    """

    projection: nn.Linear
    clamps: Clamps = NO_CLAMPS

    @property
    def size(self) -> int:
        return self.projection.in_features

    @property
    def dtype(self) -> torch.dtype:
        """Of the states."""
        return state_dtype(self.projection.weight)

    def targets(self, values: Tensor) -> Targets:
        """Embeddings (B, S, size)."""
        return Targets(values, values.new_tensor(values.shape[:-1].numel()))

    def scored(self, values: Tensor) -> Tensor:
        """(B, S), bool: all positions of target values count."""
        return values.new_ones(values.shape[:-1], dtype=torch.bool)

    def embed(self, x: Tensor | CandidateState) -> EmbeddedState:
        """x (B, S, size)."""
        assert isinstance(x, Tensor), "a frame has no candidates"
        return EmbeddedState(self.projection(x.to(self.projection.weight.dtype)), state=x)

    def embed_zeros(self, shape: tuple[int, int]) -> EmbeddedState:
        """`embed` of a state of zeros for (B, S) positions."""
        weight = self.projection.weight
        state = torch.zeros(*shape, self.size, dtype=state_dtype(weight), device=weight.device)
        return self.embed(state)

    def update(
        self,
        embedded: EmbeddedState,
        energy_grad: Tensor,
        alpha: Tensor,
        targets: Targets | None,
        step: UpdateChoices,
        carried: Tensor | None = None,
    ) -> StateUpdate:
        """The step along -dE/dx and its loss; arguments as those of VocabularyState.update."""
        x = embedded.state
        assert x is not None, "a frame moves directly"
        direction = -alpha * self.embedding_vjp(energy_grad).to(x.dtype)
        if carried is not None:
            of_carried = self.embedding_vjp(carried.to(self.projection.weight.dtype))
            direction = direction + of_carried.to(x.dtype)
        state = clamped_step(x, direction, self.clamps)
        loss = None
        if targets is not None:
            loss = self.loss(state, targets.values, reduction="none").sum() / targets.count
        if step.is_last and not step.keep_state:
            return StateUpdate(None, None, loss)
        if not step.keep_graph:
            state = state.detach()
        return StateUpdate(state, None, loss)

    def embedding_vjp(self, energy_grad: Tensor) -> Tensor:
        """dE/dx (B, S, size) of dE/de (B, S, D)."""
        return energy_grad @ self.projection.weight

    def decay_energy(self, x: Tensor) -> Tensor:
        """R = |x|^2 / 2, (B, S) of states (B, S, size), whose step along -dR is the decay of x."""
        return x.square().sum(-1) / 2

    def loss(self, x: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
        """SmoothL1 against the true embeddings.

        reduction "none" gives (B, S), the mean over the embedding.
        """
        if reduction == "none":
            return F.smooth_l1_loss(x, targets.to(x.dtype), beta=1.0, reduction="none").mean(-1)
        return F.smooth_l1_loss(x, targets.to(x.dtype), beta=1.0, reduction=reduction)


def _as_rows(x: Tensor | None) -> Tensor | None:
    """(B, S, size) as (B S, size)."""
    return None if x is None else x.flatten(0, 1)
