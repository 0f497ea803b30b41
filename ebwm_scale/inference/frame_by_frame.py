"""What a model of frames considers for the next one, step by step, and how it judges frames.

    view = look_ahead(model, window, c, config)        starts of frame c, after 0, 1, .. steps
    judged = judge(model, window, c, candidates)       energies of frames that could be the next

Every number comes from the predictions of inference/generation.py, with the context, the conditions
and the noise that they have in `ebwm think`: nothing is computed a second way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ebwm_scale.config import resolved
from ebwm_scale.inference.generation import Prediction, Session, candidate_energies
from ebwm_scale.inference.imagination import Window, known_ahead
from ebwm_scale.inference.step_by_step import has_certain_energies
from ebwm_scale.inference.thinking import ThinkingConfig
from ebwm_scale.world_model import WorldModel


@dataclass(frozen=True)
class FrameMoment:
    """A frame (P, dimension) after so many steps, and its energy in the landscape of the step that
    follows, or after the last one in the last landscape. energy None: of a baseline.
    """

    num_steps: int
    state: Tensor
    energy: float | None


@dataclass(frozen=True)
class FrameStart:
    """One initial state on its way. one_more: after a step more than asked for, None where it has
    stopped by itself. accepted: steps that changed it.
    """

    moments: list[FrameMoment]
    one_more: FrameMoment | None = None
    accepted: int = 0

    @property
    def last(self) -> FrameMoment:
        return self.moments[-1]


@dataclass(frozen=True)
class FrameView:
    """All starts, and which of them has the lowest energy: the prediction."""

    starts: list[FrameStart]
    chosen: int = 0

    @property
    def prediction(self) -> Tensor:
        """The frame (P, dimension) that is predicted."""
        return self.starts[self.chosen].last.state


@dataclass(frozen=True)
class Judged:
    """Frames that could be the next one. energies: (n,) in the last landscape, None where a frame
    alone has none; distances (n,): SmoothL1 from what the model predicts.
    """

    energies: list[float] | None
    distances: list[float]


@torch.no_grad()
def look_ahead(
    model: WorldModel,
    window: Window,
    num_context: int,
    config: ThinkingConfig = ThinkingConfig(),
) -> FrameView:
    """What a model considers for the frame behind the first `num_context` of a window."""
    prediction, states = _predicted(model, window, num_context, config)
    size = resolved.group_size(model.config)
    thought = prediction.thought
    if thought is None or prediction.start is None:
        frame = prediction.state.float().reshape(size, -1).cpu()
        return FrameView([FrameStart([FrameMoment(1, frame, None)])])
    num_steps = config.num_steps or model.config.refinement.num_steps
    longer = dataclasses.replace(config, num_steps=num_steps + 1)
    further, states_further = _predicted(model, window, num_context, longer)
    starts = []
    for start in range(config.num_starts):
        first = start * size
        rows = slice(first, first + size)
        steps = int(thought.steps[0, first])
        assert thought.energy is not None, "a start is chosen by its energy"
        energies = [*thought.trace[:steps, 0, first].tolist(), float(thought.energy[0, first])]
        # others may have gone on when this one had stopped
        moments = [FrameMoment(n, states[n][rows], energies[n]) for n in range(steps + 1)]
        one_more = None
        if steps == num_steps:
            assert further.thought is not None and further.thought.energy is not None
            if int(further.thought.steps[0, first]) == num_steps + 1:
                energy = float(further.thought.energy[0, first])
                one_more = FrameMoment(num_steps + 1, states_further[num_steps + 1][rows], energy)
        accepted = int(thought.accepted[0, first])
        starts.append(FrameStart(moments, one_more, accepted))
    return FrameView(starts, int(prediction.start[0]))


@torch.no_grad()
def judge(
    model: WorldModel,
    window: Window,
    num_context: int,
    frames: Sequence[Tensor],
    prediction: Tensor,
) -> Judged:
    """How a model finds frames (P, dimension) as the one behind the first of a window.

    prediction (P, dimension): its own, from which distances are taken.
    """
    distances = [frame_error(frame, prediction) for frame in frames]
    if model.config.model.kind != "energy" or not has_certain_energies(model):
        return Judged(None, distances)
    device = next(model.parameters()).device
    candidates = torch.cat([frame.to(device) for frame in frames])[None]
    embedded = model.state_space().embed(candidates).vectors[0]
    conditions = {name: values[:num_context] for name, values in window.conditions.items()}
    energies = candidate_energies(model, window.context(num_context), embedded, conditions)
    return Judged(energies.tolist(), distances)


def frame_error(frame: Tensor, truth: Tensor) -> float:
    """Mean SmoothL1 of two frames (P, dimension), as in the errors of imagination."""
    return float(F.smooth_l1_loss(frame.float().cpu(), truth.float().cpu(), beta=1.0))


def _predicted(
    model: WorldModel, window: Window, num_context: int, config: ThinkingConfig
) -> tuple[Prediction, list[Tensor]]:
    """The prediction of one frame, and its states (K P, dimension) after 0, 1, .. steps."""
    given = known_ahead(window, num_context)
    session = Session(
        model,
        [window.context(num_context)],
        config,
        conditions=[{name: values[:num_context] for name, values in given.items()}],
    )
    states: list[Tensor] = []
    prediction = session.predict(lambda _, now: states.append(now[0].float().cpu().clone()))
    return prediction, states
