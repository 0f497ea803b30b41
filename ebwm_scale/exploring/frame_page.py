"""Held-out clips and episodes as values for templates/explore_frames.html.j2: what was seen, the
candidate for the next frame after each step, what the energy says of wrong frames, imagined
futures, and in worlds with actions what each would lead to and a plan.

    frames 0 .. c - 1     observed
    frame  c              the next one: considered step by step, and judged
    frames c .. c + k - 1 imagined
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ebwm_scale.config import resolved
from ebwm_scale.control.actions import ActionSpec, action_spec
from ebwm_scale.control.planner import SOLVERS, Planner
from ebwm_scale.core.errors import UserError
from ebwm_scale.data.format.manifest import Manifest
from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.exploring.frame_actions import LOOKED_AT, numbers_text, within_what_was_done
from ebwm_scale.exploring.frame_futures import Moment, action_pad, future_film, planned
from ebwm_scale.exploring.frame_parts import (
    Candidate,
    Truth,
    judged_frames,
    next_frame,
    shot,
)
from ebwm_scale.exploring.frame_request import FrameFields, FrameRequest
from ebwm_scale.exploring.frame_source import (
    FrameSource,
    frame_source,
    frames_seen,
    pixels_of,
)
from ebwm_scale.exploring.text_page import NamedModel
from ebwm_scale.inference.frame_by_frame import FrameView, Judged, judge, look_ahead
from ebwm_scale.inference.imagination import ACTION, Window
from ebwm_scale.reporting.pictures import scale_of_differences
from ebwm_scale.reporting.plain import page_text

MOST_SEEN = 16  # observed frames that are shown, the last ones
MAX_NAME = 80  # characters of an episode's name


@dataclass
class FrameExplorer:
    """One or two models of frames of the same data."""

    models: Sequence[NamedModel]
    observe: Observation
    source: FrameSource
    fields: FrameFields
    manifest: Manifest
    spec: ActionSpec | None = None
    planners: dict[tuple, Planner] = field(default_factory=dict)

    @staticmethod
    def open(models: Sequence[NamedModel], split: Any) -> FrameExplorer:
        """split: of a dataset of video. UserError for one without anything to show."""
        first = models[0].model
        observe = Observation(split.manifest, next(first.parameters()).device)
        source = frame_source(observe, split)
        if not len(source):
            raise UserError(
                f"{split.manifest.path}: has no held-out clip to show; make the dataset with a "
                "validation split"
            )
        has_actions = any(each.name == ACTION for each in observe.content.conditions)
        fields = FrameFields(
            source.unit,
            len(source),
            max(source.num_frames(number) for number in range(len(source))),
            resolved.num_groups(first.config),
            any(each.thinks for each in models),
            has_actions,
        )
        spec = None
        if has_actions:
            spec = within_what_was_done(action_spec(split.manifest, observe), source)
        return FrameExplorer(models, observe, source, fields, split.manifest, spec)

    def start(self, seed: int) -> FrameRequest:
        """What a page shows at first: as much context as `ebwm think --episode` takes."""
        groups = self.fields.num_groups
        num_context = max(1, (groups + 1) // 2)
        longest = self.fields.longest
        num_context = min(num_context, max(1, longest - 1))
        horizon = groups - num_context + 1 if groups > 1 else 1
        ahead = max(1, min(4, longest - num_context))
        return FrameRequest(
            num_context=num_context, num_ahead=ahead, seed=seed, horizon=min(horizon, 4)
        )

    def answer(self, request: FrameRequest) -> dict[str, Any]:
        """The values of a page for a request; UserError for one that cannot be."""
        at = self._moment(request)
        shown = frames_seen(self.observe, at.window)
        notes = []
        if shown is None:
            notes.append("The encoder cannot go back to frames: no pictures can be shown.")
        if request.num_starts > 1 and self._starts_are_alike(request):
            notes.append(
                "All starts begin at the same state: give Langevin noise to have them differ."
            )
        views = [
            look_ahead(each.model, at.window, at.num_context, request.thinking(each.thinks))
            for each in self.models
        ]
        truth = None
        if at.num_true:
            states = at.window.states[at.num_context]
            pixels = pixels_of(self.observe, states[None])
            truth = Truth(states, None if pixels is None else pixels[0])
        values = self.form(request) | {
            "title": self._title(request, at),
            "seen": self._seen(at, shown),
            "scale": scale_of_differences() if shown is not None else [],
            "next": [
                next_frame(f"n{number}", each.name, each.kind, view, truth, self.observe)
                for number, (each, view) in enumerate(zip(self.models, views))
            ],
            "judged": None if truth is None else self._judged(request, at, truth, views),
            "future": future_film(self.models, at, request),
            "actions": None,
            "plan": None,
            "notes": notes,
        }
        if self.spec is not None:
            values["actions"] = action_pad(self.models[0], at, self.spec, request)
            values["plan"] = self._plan(request, at, notes)
        return values

    def form(self, request: FrameRequest) -> dict[str, Any]:
        """The values of a page's form alone."""
        texts = self.fields.texts(request)
        fields = [
            {
                "name": each.name,
                "label": f"{each.label}, {each.low:g} to {each.high:g}"
                if each.name in ("number", "first", "num_context", "num_ahead")
                else each.label,
                "value": texts[each.name],
                "empty": each.empty or "",
                "mode": "numeric" if each.is_whole else "decimal",
            }
            for each in self.fields.fields
        ]
        return {
            "fields": fields,
            "unit": self.fields.unit,
            "number": request.number,
            "count": self.fields.count,
            "accepts": request.accept_only_if_lower,
            "thinks": self.fields.thinks,
            "has_actions": self.spec is not None,
            "action": page_text(request.action),
            "solver": request.solver,
            "solvers": list(SOLVERS),
            "looked_at": min(LOOKED_AT, self.fields.count),
            "asked": self._told(request),
            "title": "",
            "notes": [],
        }

    def _starts_are_alike(self, request: FrameRequest) -> bool:
        thinking = [each.model.config.state.initial for each in self.models if each.thinks]
        return "random_noise" not in thinking and not request.noise

    def _moment(self, request: FrameRequest) -> Moment:
        """UserError where a clip or an episode has no such frames."""
        total = self.source.num_frames(request.number)
        last = request.first + request.num_context
        # What was done in the last frame is not known, and a conditioned model asks for it.
        is_conditioned = bool(self.models[0].model.config.data.conditions)
        usable = total - is_conditioned
        if last > usable:
            behind = " with one behind them" if is_conditioned else ""
            raise UserError(
                f"{self.fields.unit} {request.number} has {total} frames: from frame "
                f"{request.first} on it has no {request.num_context} to observe{behind}; give an "
                "earlier first frame, or fewer observed ones"
            )
        ahead = max(request.num_ahead, request.horizon if self.spec is not None else 0, 1)
        count = min(total, last + ahead) - request.first
        window = self.source.window(request.number, request.first, count)
        return Moment(window, request.num_context, self.observe)

    def _title(self, request: FrameRequest, at: Moment) -> str:
        name = page_text(at.window.episode, MAX_NAME)
        return (
            f"{self.fields.unit} {request.number} of 0 to {self.fields.count - 1} ({name}), "
            f"frames {at.window.start} to {at.number(0)} observed"
        )

    def _seen(self, at: Moment, shown: Any) -> list[dict[str, Any]]:
        """The observed frames, with what was done at each."""
        done = at.actions()
        shots = []
        for place in range(max(0, at.num_context - MOST_SEEN), at.num_context):
            lines = [f"frame {at.window.start + place}"]
            if done is not None and place < len(done):
                lines.append(f"action {numbers_text(done[place])}")
            shots.append(shot(None if shown is None else shown[place], *lines))
        return shots

    def _judged(
        self, request: FrameRequest, at: Moment, truth: Truth, views: Sequence[FrameView]
    ) -> dict[str, Any]:
        """The true next frame beside wrong ones, and what the models predict."""
        c = at.num_context
        kinds = [("the true next frame", "truth", truth.states)]
        total = self.source.num_frames(request.number)
        now = request.first + c
        far = 0 if now > total // 2 else total - 1
        if abs(far - now) > 0:
            states = self.source.frame_states(request.number, far)
            kinds.append((f"another time: frame {far}", "wrong", states))
        if len(self.source) > 1:
            other = (request.number + len(self.source) // 2) % len(self.source)
            place = min(now, self.source.num_frames(other) - 1)
            states = self.source.frame_states(other, place)
            kinds.append((f"another {self.fields.unit}: {other}", "wrong", states))
        kinds.append(("the last observed frame again", "wrong", at.window.states[c - 1]))
        for each, view in zip(self.models, views):
            kinds.append((f"what {each.name} predicts", "own", view.prediction))
        states = [each.float().cpu() for _, _, each in kinds]
        pixels = pixels_of(self.observe, torch.stack(states))
        candidates = []
        for number, (kind, role, _) in enumerate(kinds):
            frame = None if pixels is None else pixels[number]
            candidates.append(Candidate(kind, role, shot(frame, kind)))
        found = [
            (each.name, judge(each.model, at.window, c, states, view.prediction))
            for each, view in zip(self.models, views)
        ]
        acted = self._under_another_action(at)
        if acted is not None:
            window, numbers = acted
            kind = f"the true frame, had the action been {numbers}"
            candidates.append(Candidate(kind, "wrong", shot(truth.frame, kind)))
            found = [
                (name, _joined(judged, self._judged_alone(each, window, c, truth, request)))
                for (name, judged), each in zip(found, self.models)
            ]
        return judged_frames(candidates, found)

    def _judged_alone(
        self, each: NamedModel, window: Window, c: int, truth: Truth, request: FrameRequest
    ) -> Judged:
        view = look_ahead(each.model, window, c, request.thinking(each.thinks))
        return judge(each.model, window, c, [truth.states], view.prediction)

    def _under_another_action(self, at: Moment) -> tuple[Window, str] | None:
        """The window with another last action: mirrored at the mean, or the next id."""
        if self.spec is None or at.num_true < 1:
            return None
        actions = at.window.conditions[ACTION]
        own = actions[at.num_context - 1]
        if self.spec.is_discrete:
            other = (own + 1) % self.spec.num_values.to(own)
        else:
            other = -own  # standardised: mirrored at the mean
        if torch.equal(other, own):
            return None
        changed = actions.clone()
        changed[at.num_context - 1] = other
        conditions = {**at.window.conditions, ACTION: changed}
        numbers = numbers_text(self.spec.to_stored(other[None])[0])
        return dataclasses.replace(at.window, conditions=conditions), numbers

    def _plan(self, request: FrameRequest, at: Moment, notes: list[str]) -> dict[str, Any] | None:
        if at.window.frames is None:
            notes.append("The dataset keeps no frames, which a plan needs: none is made.")
            return None
        total = self.source.num_frames(request.number)
        goal = request.goal
        if goal is None:
            goal = min(total - 1, request.first + at.num_context - 1 + request.horizon)
        if goal >= total:
            raise UserError(
                f"the goal is frame {goal}: {self.fields.unit} {request.number} has frames 0 to "
                f"{total - 1}"
            )
        frame = self.source.window(request.number, goal, 1).frames
        assert frame is not None, "the window has some"
        planner = self._planner(request)
        planner.begin()
        values = planned(self.models[0], planner, at, frame[0], f"frame {goal}")
        return values | {"goal": goal, "solver": request.solver}

    def _planner(self, request: FrameRequest) -> Planner:
        """UserError for a plan that the run cannot make."""
        thinking = request.thinking(self.models[0].thinks)
        key = (request.solver, request.horizon, request.budget, request.seed, thinking)
        if key not in self.planners:
            self.planners.clear()
            model = self.models[0].model
            self.planners[key] = Planner(
                model,
                model.config,
                self.manifest,
                solver=request.solver,
                horizon=request.horizon,
                budget=request.budget,
                seed=request.seed,
                thinking=thinking,
            )
            assert self.spec is not None, "plans are made of actions"
            self.planners[key].spec = self.spec
        return self.planners[key]

    def _told(self, request: FrameRequest) -> str:
        """The request in a line, for a page without its form; what is not set is left out."""
        texts = self.fields.texts(request)
        parts = [
            f"{each.label} {texts[each.name]}" for each in self.fields.fields if texts[each.name]
        ]
        if request.accept_only_if_lower:
            parts.append("a step is accepted only if it lowers the energy")
        if self.spec is not None:
            parts.append(f"plan: solver {request.solver}")
        return page_text("; ".join(parts))


def _joined(first: Judged, second: Judged) -> Judged:
    energies = None
    if first.energies is not None and second.energies is not None:
        energies = [*first.energies, *second.energies]
    return Judged(energies, [*first.distances, *second.distances])
