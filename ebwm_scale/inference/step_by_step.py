"""What a model of text considers for each position of a text, step by step.

    text = continued(model, prompt, 8, config)        the tokens that `ebwm think` would choose
    views = look(model, text, first, config)          of each position from `first` on

Every number comes from the predictions of inference/generation.py, with the context and the noise
that they have in `ebwm think`: nothing is computed a second way. Of an energy model a view has a
moment before the first step, one after each, and what one more step would do; of Transformer++ one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ebwm_scale.config import resolved
from ebwm_scale.inference.energy_plane import POINTS, EnergyPlane, plane_through
from ebwm_scale.inference.generation import (
    Sampling,
    Session,
    candidate_energies,
    continue_texts,
)
from ebwm_scale.inference.thinking import ThinkingConfig
from ebwm_scale.model.states import VocabularyState
from ebwm_scale.world_model import WorldModel

MOST_CANDIDATES = 10  # of a position
NUM_LINES = 3  # from the most probable candidate to as many others
LINE_POINTS = 17


@dataclass(frozen=True)
class Moment:
    """After so many steps: energy of the state, in the landscape of the step that follows, or after
    the last one in the last landscape; and the probabilities of the view's candidates. energy None:
    of a baseline.
    """

    num_steps: int
    energy: float | None
    probabilities: list[float]


@dataclass(frozen=True)
class Line:
    """Energies on the straight line, in the space of embeddings, from a certain prediction of one
    token to that of another: LINE_POINTS of them, both ends included.
    """

    start: int
    end: int
    energies: list[float]


@dataclass(frozen=True)
class View:
    """What a model considers for one position.

    candidates: token ids, the most probable at the end first; the token that stands there is among
    them. certain: the energy of each as a certain prediction, None where there is none. one_more:
    after a step more than asked for. steps, accepted: of the start that won, see Thought.
    settles_after: steps until no probability moves any more, of at most twice those asked for.
    plane: the energy around the path of the steps, None where there is none (energy_plane.py).
    """

    candidates: list[int]
    moments: list[Moment]
    one_more: Moment | None = None
    certain: list[float] | None = None
    lines: list[Line] = dataclasses.field(default_factory=list)
    plane: EnergyPlane | None = None
    steps: int | None = None
    accepted: int | None = None
    start: int = 0
    num_starts: int = 1
    settles_after: int | None = None


@dataclass(frozen=True)
class _Seen:
    """One prediction: states (n + 1, V) of one start, energies (n + 1) or none; window: the tokens
    that it was made from.
    """

    window: Tensor
    states: Tensor
    energies: list[float] | None
    steps: int | None = None
    accepted: int | None = None
    start: int = 0


def continued(
    model: WorldModel,
    prompt: Tensor,
    count: int,
    config: ThinkingConfig = ThinkingConfig(),
    sampling: Sampling | None = None,
    end: int | None = None,
) -> Tensor:
    """A prompt (S,) with at most `count` further tokens, those of `ebwm think`."""
    chosen = [prompt]
    sampling = sampling or Sampling(seed=config.seed)
    if count:
        tokens = continue_texts(
            model, [prompt], count, config=config, sampling=sampling, end=end, energies=False
        )
        chosen += [token for token, _ in tokens]
    return torch.cat(chosen)


@torch.no_grad()
def look(
    model: WorldModel,
    tokens: Tensor,
    first: int,
    config: ThinkingConfig = ThinkingConfig(),
    *,
    settled: float | None = None,
    also: Sequence[Sequence[int]] = (),
) -> list[View]:
    """What a model considers for each of the positions first, first + 1, ... of a text (S,), given
    the tokens before it; 1 <= first <= S.

    settled: the largest change of a probability at a position that has settled; None leaves
    settles_after out. also: further candidates of each position.
    """
    asked = _predictions(model, tokens, first, config)
    starts = [seen.start for seen in asked]
    num_steps = config.num_steps or model.config.refinement.num_steps
    longer: Sequence[_Seen | None] = [None] * len(asked)
    settling: Sequence[_Seen | None] = [None] * len(asked)
    if model.config.model.kind == "energy":
        one_more = dataclasses.replace(config, num_steps=num_steps + 1)
        longer = _predictions(model, tokens, first, one_more, starts)
        if settled is not None:
            rules = dataclasses.replace(
                config, num_steps=2 * num_steps, settled=settled, tolerance=None
            )
            settling = _predictions(model, tokens, first, rules, starts)
    views = []
    for index, seen in enumerate(asked):
        place = first + index
        extra = [int(tokens[place]), *(also[index] if index < len(also) else ())]
        view = _view(model, seen, extra)
        further, settling_one = longer[index], settling[index]
        if further is not None and seen.steps == num_steps:  # it has not stopped by itself
            view = dataclasses.replace(view, one_more=_last_moment(further, view.candidates))
        if settling_one is not None:
            view = dataclasses.replace(view, settles_after=settling_one.steps)
        views.append(dataclasses.replace(view, num_starts=config.num_starts))
    return views


def _predictions(
    model: WorldModel,
    tokens: Tensor,
    first: int,
    config: ThinkingConfig,
    starts: Sequence[int] | None = None,
) -> list[_Seen]:
    """What is seen of the prediction for each position from `first` on: of the start that won, or
    of the one that `starts` names.

    The positions are thought of together, each with its own window. All have the noise of the first
    sample, as one text has that is continued token by token.
    """
    windows = _windows(model, tokens, first)
    if not windows:
        return []
    same = torch.zeros(len(windows), dtype=torch.int64)
    session = Session(model, windows, config, sample_ids=same)
    states: list[Tensor] = []
    prediction = session.predict(lambda _, now: states.append(now.cpu().clone()))
    thought = prediction.thought
    if thought is None or prediction.start is None:
        return [
            _Seen(window, state[None], None)
            for window, state in zip(session.rows, prediction.state.float().cpu())
        ]
    result = []
    for row, window in enumerate(session.rows):
        start = int(prediction.start[row]) if starts is None else starts[row]
        steps = int(thought.steps[row, start])
        kept = steps + 1  # others may have gone on when this one had stopped
        own = [now[row, start] for now in states[:kept]]
        assert thought.energy is not None, "a start is chosen by its energy"
        before = thought.trace[:steps, row, start].tolist()
        energies = [*before, float(thought.energy[row, start])]
        accepted = int(thought.accepted[row, start])
        result.append(_Seen(window, torch.stack(own), energies, steps, accepted, start))
    return result


def _windows(model: WorldModel, tokens: Tensor, first: int) -> list[Tensor]:
    """What a text continued token by token sees before each position from `first` on."""
    length = resolved.context_length(model.config)
    windows = []
    window = model.visible_prompt(tokens[:first][-length:])
    for place in range(first, len(tokens)):
        windows.append(window)
        window = torch.cat([window, tokens[place : place + 1]])
        if len(window) > length:
            window = window[-max(1, length // 2) :]
        window = model.visible_prompt(window)
    return windows


def _view(model: WorldModel, seen: _Seen, extra: Sequence[int]) -> View:
    """Without what needs other predictions."""
    probabilities = seen.states.softmax(-1)
    candidates = _candidates(probabilities, extra)
    moments = [
        Moment(
            number if seen.energies is not None else 1,
            None if seen.energies is None else seen.energies[number],
            row[candidates].tolist(),
        )
        for number, row in enumerate(probabilities)
    ]
    certain = None
    lines: list[Line] = []
    plane = None
    if seen.energies is not None and has_certain_energies(model):
        space = model.state_space()
        assert isinstance(space, VocabularyState), "texts have a vocabulary"
        embedded = space.weight[candidates]
        path = space.embed(seen.states.to(embedded.device)[None].clone()).vectors[0].float()
        certain, lines, plane = _energies(model, seen.window, candidates, embedded, path)
    return View(
        candidates,
        moments,
        certain=certain,
        lines=lines,
        plane=plane,
        steps=seen.steps,
        accepted=seen.accepted,
        start=seen.start,
    )


def has_certain_energies(model: WorldModel) -> bool:
    """Whether a candidate has an energy of its own: not where the context or a workspace depends on
    the steps before.
    """
    is_first_encoding = model.config.refinement.reencode == "none"
    return is_first_encoding and model.config.state.workspace is None


def _candidates(probabilities: Tensor, extra: Sequence[int]) -> list[int]:
    """The most probable at the end, those of the other moments, and further ones."""
    last = probabilities[-1]
    count = min(MOST_CANDIDATES - 3, last.numel())
    chosen = last.topk(count).indices.tolist()
    for row in probabilities[:-1].flip(0):
        if len(chosen) < MOST_CANDIDATES:
            chosen.append(int(row.argmax()))
    chosen = list(dict.fromkeys([*chosen[:MOST_CANDIDATES], *extra]))
    return sorted(chosen, key=lambda token: -float(last[token]))


def _last_moment(seen: _Seen, candidates: list[int]) -> Moment:
    assert seen.energies is not None, "only an energy model takes steps"
    probabilities = seen.states[-1].softmax(-1)[candidates].tolist()
    return Moment(len(seen.states) - 1, seen.energies[len(seen.states) - 1], probabilities)


def _energies(
    model: WorldModel, window: Tensor, candidates: list[int], embedded: Tensor, path: Tensor
) -> tuple[list[float], list[Line], EnergyPlane | None]:
    """Of candidates (K, D) as certain predictions, on lines from the first one, and on the plane of
    a path (N + 1, D), in one pass.
    """
    device = embedded.device
    share = torch.linspace(0, 1, LINE_POINTS, device=device)[:, None].to(embedded.dtype)
    ends = range(1, min(NUM_LINES + 1, len(candidates)))
    between = [(1 - share) * embedded[0] + share * embedded[end] for end in ends]
    second = embedded[min(1, len(candidates) - 1)]
    plane = plane_through(path, second.to(path))
    parts = [embedded, *between]
    if plane is not None:
        parts += [path.to(embedded), plane.grid().to(embedded)]
    found = candidate_energies(model, window, torch.cat(parts)).split([len(part) for part in parts])
    energies = [each.tolist() for each in found]
    lines = [
        Line(candidates[0], candidates[end], own)
        for end, own in zip(ends, energies[1:], strict=False)
    ]
    if plane is None:
        return energies[0], lines, None
    rows = found[-1].reshape(POINTS, POINTS).tolist()
    return energies[0], lines, EnergyPlane(plane, rows, energies[-2])
