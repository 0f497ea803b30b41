"""How likely a model finds a text as the continuation of another: log-likelihoods, and energies of
the tokens themselves.

    scorer = Scorer(model, tokenizer, config)
    scorer.score([("The queryset ", "is evaluated"), ...])      -> [ContinuationScore, ...]

A token's probability is that of the state refinement ends with at the position before it. An energy
model also says what it makes of the tokens themselves: the energy of each as a certain prediction
(a one-hot state), which needs no refinement. Nothing depends on the order or the batching of the
pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ebwm_scale.config import resolved
from ebwm_scale.core.errors import UserError
from ebwm_scale.inference.energy_functions import SequenceEnergy
from ebwm_scale.inference.initial_states import SequenceSampler
from ebwm_scale.inference.thinking import ThinkingConfig, think
from ebwm_scale.model.conditions import Conditions
from ebwm_scale.model.states import VocabularyState
from ebwm_scale.world_model import WorldModel


@dataclass(frozen=True)
class ContinuationScore:
    """log_likelihood: nats, summed over num_tokens; is_greedy: every token is the most probable
    one; energy: mean of the tokens as certain predictions.
    """

    log_likelihood: float
    is_greedy: bool
    num_tokens: int
    num_bytes: int
    energy: float | None


@dataclass(frozen=True)
class Window:
    """Tokens of one forward pass, of which the last `scored` are scored given all before them."""

    request: int
    tokens: list[int]
    scored: int


class Scorer:
    """model: of text, energy or baseline.

    config: how to think (energy models). batch_size: windows at a time.
    """

    def __init__(
        self,
        model: WorldModel,
        tokenizer,
        config: ThinkingConfig = ThinkingConfig(),
        *,
        batch_size: int = 8,
    ):
        if model.config.state.kind != "vocabulary":
            raise UserError(
                "continuations of text are scored, and this is a model of video; take a run that "
                "was trained on text"
            )
        if resolved.group_size(model.config) > 1:
            raise UserError(
                "continuations of text are scored, and this model predicts groups of tokens: "
                "ebwm evaluate says how many tasks it solves"
            )
        self.model, self.tokenizer, self.config, self.batch_size = (
            model,
            tokenizer,
            config,
            batch_size,
        )
        self.context_length = resolved.context_length(model.config)

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[ContinuationScore]:
        """(context, continuation) each; a context may be empty: then a document begins.

        What does not fit into the model's context is cut from the left.
        """
        tokens = [self.tokens_of(*pair) for pair in pairs]
        sums = self._sums(
            [
                window
                for index, (whole, first) in enumerate(tokens)
                for window in windows(index, whole, first, self.context_length)
            ],
            len(pairs),
        )
        return [
            ContinuationScore(
                total,
                greedy,
                len(whole) - first,
                len(continuation.encode("utf-8")),
                None if energy is None else energy / max(1, len(whole) - first),
            )
            for (total, greedy, energy), (whole, first), (_, continuation) in zip(
                sums, tokens, pairs
            )
        ]

    def tokens_of(self, context: str, continuation: str) -> tuple[list[int], int]:
        """(all tokens, index of the first scored one).

        The text is tokenized as a whole where that leaves the context's own tokens as they are.
        """
        before = self.tokenizer.encode(context)
        whole = self.tokenizer.encode(context + continuation)
        if whole[: len(before)] != before:
            whole = before + self.tokenizer.encode(continuation)
        return [self.tokenizer.eos_id, *whole], 1 + len(before)

    @torch.no_grad()
    def _sums(self, todo: list[Window], count: int) -> list[tuple[float, bool, float | None]]:
        sums: list[list] = [
            [0.0, True, 0.0 if self.model.config.model.kind == "energy" else None]
            for _ in range(count)
        ]
        todo = sorted(todo, key=lambda window: (len(window.tokens), window.request))
        device = next(self.model.parameters()).device
        for first in range(0, len(todo), self.batch_size):
            group = todo[first : first + self.batch_size]
            padded = torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(window.tokens) for window in group], batch_first=True
            ).to(device)
            observed, targets = padded[:, :-1], padded[:, 1:]
            state = last_states(self.model, observed, self.config)
            chosen = state.gather(2, targets[..., None])[..., 0]
            likely, greedy = (chosen - state.logsumexp(-1)).double(), chosen >= state.amax(-1)
            energy = self._energies(observed, targets)
            for row, window in enumerate(group):
                scored = slice(len(window.tokens) - 1 - window.scored, len(window.tokens) - 1)
                total = sums[window.request]
                total[0] += float(likely[row, scored].sum())
                total[1] = total[1] and bool(greedy[row, scored].all())
                if energy is not None:
                    total[2] += float(energy[row, scored].double().sum())
        return [tuple(total) for total in sums]

    def _energies(self, observed: Tensor, targets: Tensor) -> Tensor | None:
        return (
            None
            if self.model.config.model.kind == "baseline"
            else energies_of_tokens(self.model, observed, targets)
        )


def windows(request: int, tokens: list[int], first: int, length: int) -> Iterator[Window]:
    """Cover tokens[first:] by windows of at most `length` predictions; each predicts its last ones
    given as much as fits before them.
    """
    for start in range(first, len(tokens), length):
        end = min(len(tokens), start + length)
        yield Window(request, tokens[max(0, end - 1 - length) : end], end - start)


def last_states(
    model: WorldModel,
    observed: Tensor,
    config: ThinkingConfig,
    conditions: Conditions | None = None,
) -> Tensor:
    """Predictions (B, S, size) for the state after each observed one.

    observed: tokens (B, S) or states (B, S, dimension). conditions: of its groups, see
    model/conditions.py. A baseline's output, or what thinking ends with; of several starts the one
    with the lowest energy. Every row draws the noise of sample 0, so that a text's score is its
    own.
    """
    if model.config.model.kind == "baseline":
        prediction = model.predict_directly(observed, conditions)
        return prediction if prediction.dtype == torch.float64 else prediction.float()
    frames = observed if model.config.state.kind == "embedding" else None
    sample_ids = torch.zeros(len(observed), dtype=torch.int64)
    embedded = model.embed_observed(observed, conditions)
    energy_function = SequenceEnergy(model, embedded, model.first_visible(observed))
    state = None
    lowest = None
    for start in range(config.num_starts):
        noise = SequenceSampler(model, config.seed, sample_ids, observed.shape[1], start)
        thought = think(model, energy_function, noise.initial(frames), config, noise=noise)
        assert thought.energy is not None, "thinking measures where it ended"
        if state is None or lowest is None:
            state = thought.state
            lowest = thought.energy
        else:
            is_lower = thought.energy < lowest
            state = torch.where(is_lower[..., None], thought.state, state)
            lowest = torch.where(is_lower, thought.energy, lowest)
    assert state is not None, "there is at least one start"
    return state


def energies_of_tokens(model: WorldModel, observed: Tensor, targets: Tensor) -> Tensor:
    """Energies (B, S), in the last landscape, of tokens as certain predictions (one-hot states).

    observed, targets: tokens (B, S).
    """
    energy_function = SequenceEnergy(
        model, model.embed_observed(observed), model.first_visible(observed)
    )
    state_space = model.state_space()
    if not isinstance(state_space, VocabularyState):
        raise TypeError("only a model of text has energies of tokens")
    one_hot = state_space.weight[targets.clamp(min=0)]
    return energy_function(one_hot, model.energy_network.num_landscapes - 1)
