"""Imagined futures on an explorer's page of frames: films beside the truth, of chosen actions, and
of a plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ebwm_scale.control.actions import ActionSpec
from ebwm_scale.control.planner import Plan, Planner
from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.exploring.frame_actions import (
    action_options,
    futures_under,
    numbers_text,
    situation_of,
)
from ebwm_scale.exploring.frame_parts import film_ms, reel, shot
from ebwm_scale.exploring.frame_request import FrameRequest
from ebwm_scale.exploring.frame_source import frames_seen, pixels_of, stored_actions
from ebwm_scale.exploring.text_page import NamedModel
from ebwm_scale.inference.frame_by_frame import frame_error
from ebwm_scale.inference.imagination import ACTION, Imagined, Window, imagine
from ebwm_scale.reporting.line_chart import Curve, line_chart
from ebwm_scale.reporting.numbers import show

NOTHING = float("nan")
SEEN = "what was seen"
# a name, frames if they can be shown, and what is said of each
_Row = tuple[str, np.ndarray | None, Sequence[str | None]]


@dataclass(frozen=True)
class Moment:
    """Where a page looks: a window of c observed frames and the true ones behind them."""

    window: Window
    num_context: int
    observe: Observation

    @property
    def num_true(self) -> int:
        """Frames behind the observed ones."""
        return self.window.num_frames - self.num_context

    def number(self, ahead: int) -> int:
        """Of the clip's or episode's frame so many behind the last observed one."""
        return self.window.start + self.num_context - 1 + ahead

    def actions(self) -> np.ndarray | None:
        """(F - 1, width) as stored."""
        return stored_actions(self.observe, self.window.conditions)


def future_film(
    models: Sequence[NamedModel], at: Moment, request: FrameRequest
) -> dict[str, Any] | None:
    """What each model imagines under what was done, beside the truth; None behind the last frame.

    The first model's frames are those of `ebwm think --episode`.
    """
    count = min(request.num_ahead, at.num_true)
    if count < 1:
        return None
    truth = at.window.states[at.num_context :]
    seen = frames_seen(at.observe, at.window)
    ahead = None if seen is None else seen[at.num_context :]
    rows: list[_Row] = [(SEEN, ahead, [None] * count)]
    curves = []
    for each in models:
        imagined = imagine(
            each.model,
            [at.window],
            num_context=at.num_context,
            num_steps=count,
            config=request.thinking(each.thinks),
            energies=True,
        )
        states = imagined.states[0]
        errors = [frame_error(state, true) for state, true in zip(states, truth)]
        rows.append((each.name, pixels_of(at.observe, states), _said(imagined, 0, errors)))
        curves.append(Curve(each.name, list(range(1, count + 1)), errors))
    last = at.window.states[at.num_context - 1]
    copied = [frame_error(last, true) for true in truth[:count]]
    curves.append(Curve("copying the last frame", list(range(1, count + 1)), copied))
    return {
        "reel": _film("future", at, count, rows),
        "rows": _strips(at, count, rows),
        "chart": line_chart(
            "Error of imagined frames",
            curves,
            x_label="frames ahead",
            y_label="SmoothL1 from the true frame, in standard deviations of the training data",
            x_ticks=list(range(1, count + 1, max(1, count // 8))),
        ),
    }


def action_pad(
    model: NamedModel, at: Moment, spec: ActionSpec, request: FrameRequest
) -> dict[str, Any]:
    """Actions to choose from, and a film of what is imagined under each. UserError for an action of
    the form that is none.
    """
    own = at.actions()
    taken = None
    if own is not None and len(own) >= at.num_context:
        taken = own[at.num_context - 1]
    offered = action_options(spec, taken, request.action)
    thinking = request.thinking(model.thinks)
    imagined = futures_under(
        model.model,
        situation_of(at.window, at.num_context),
        spec,
        offered.options,
        request.num_ahead,
        thinking,
    )
    choices = []
    last = at.window.states[at.num_context - 1]
    for number, option in enumerate(offered.options):
        pixels = pixels_of(at.observe, imagined.states[number])
        changes = [frame_error(state, last) for state in imagined.states[number]]
        said = _said(imagined, number, changes, "change since the last frame")
        rows = [(f"action {option.numbers}", pixels, said)]
        choices.append(
            {
                "value": str(number),
                "name": option.name,
                "numbers": option.numbers,
                "shot": shot(None if pixels is None else pixels[0], option.numbers),
                "reel": _film(f"action{number}", at, request.num_ahead, rows),
            }
        )
    chosen = len(choices) - 1 if taken is not None or request.action else 0
    columns = offered.columns
    return {
        "columns": columns,
        "pad": choices[: columns * (len(choices) // columns)] if columns else choices,
        "choices": choices,
        "chosen": str(chosen),
        "is_discrete": spec.is_discrete,
    }


def planned(
    model: NamedModel, planner: Planner, at: Moment, goal: np.ndarray, about: str
) -> dict[str, Any]:
    """A plan from the last observed frame to a goal, as a film. goal: uint8 (height, width, 3)."""
    seen = at.window.frames
    assert seen is not None, "asked for only where frames are kept"
    conditions = at.observe.restored(
        {
            name: values[: at.num_context - (name == ACTION)]
            for name, values in at.window.conditions.items()
        }
    )
    known = {name: values.cpu().numpy() for name, values in conditions.items()}
    plan = planner.plan(seen[: at.num_context], known, goal)
    goal_states = planner.states_of(goal[None])[0]
    distances = _distances(plan.states, goal_states)
    shown = planner.shown(plan.states)
    count = len(plan.actions)
    said = [f"distance {show(distance)}" for distance in distances]
    true = np.stack([seen[min(at.num_context + n, len(seen) - 1)] for n in range(count)])
    rows = [
        (f"{model.name} plans", shown, said),
        (SEEN, true, [None] * count),
    ]
    fixed = [shot(goal, "the goal", about, kind="truth")]
    return {
        "reel": _film("plan", at, count, rows, fixed=fixed),
        "strips": _strips(at, count, rows[:1]),
        "actions": _plan_table(plan, at, distances),
        "sentence": _plan_sentence(plan, planner, distances, at, goal_states),
        "charts": [chart for chart in _plan_charts(plan, distances) if chart is not None],
    }


def _distances(states: Tensor, goal: Tensor) -> list[float]:
    return (states - goal.to(states)).square().mean((-2, -1)).tolist()


def _plan_sentence(
    plan: Plan, planner: Planner, distances: list[float], at: Moment, goal: Tensor
) -> str:
    now = _distances(at.window.states[at.num_context - 1][None], goal)[0]
    return (
        f"The solver {planner.solver_name} imagined {plan.evaluations} futures of "
        f"{planner.horizon} steps; the cost of the best is {show(plan.cost)}. The goal is "
        f"{show(now)} away from the last observed frame, and {show(distances[-1])} from the last "
        "one planned: mean squared distances in the model’s space."
    )


def _plan_table(plan: Plan, at: Moment, distances: list[float]) -> dict[str, Any]:
    done = at.actions()
    rows = []
    for number, action in enumerate(plan.actions):
        place = at.num_context - 1 + number
        was = "–" if done is None or place >= len(done) else numbers_text(done[place])
        rows.append([str(number + 1), numbers_text(action), was, show(distances[number])])
    return {"heads": ["step", "planned action", "what was done", "distance"], "rows": rows}


def _plan_charts(plan: Plan, distances: list[float]) -> list[dict[str, Any] | None]:
    steps = list(range(1, len(distances) + 1))
    rounds = list(range(1, len(plan.history) + 1))
    return [
        line_chart(
            "Distance of planned frames from the goal",
            [Curve("planned", steps, distances)],
            x_label="steps ahead",
            y_label="Mean squared distance in the model’s space",
            x_ticks=steps,
        ),
        line_chart(
            "The search",
            [Curve("best so far", rounds, plan.history)],
            x_label="iterations of the solver",
            y_label="Cost of the best plan",
            x_ticks=rounds[:: max(1, len(rounds) // 6)],
        ),
    ]


def _film(
    key: str, at: Moment, count: int, rows: Sequence[_Row], *, fixed: Sequence[dict] = ()
) -> dict[str, Any]:
    """Rows (name, frames, what is said of each) side by side, moving; the last observed frame
    first.
    """
    seen = frames_seen(at.observe, at.window)
    last = None if seen is None else seen[at.num_context - 1]
    words = [f"frame {at.number(0)}, the last observed one"]
    shots = [[shot(last, name, "last observed") for name, *_ in rows]]
    for ahead in range(1, count + 1):
        words.append(f"frame {at.number(ahead)}, {ahead} ahead")
        now = []
        for name, frames, said in rows:
            kind = "" if name == SEEN else "candidate"
            frame = None if frames is None else frames[ahead - 1]
            text = said[ahead - 1]
            now.append(shot(frame, name, *([] if text is None else [text]), kind=kind))
        shots.append(now)
    return reel(key, words, shots, fixed=fixed, interval_ms=film_ms(at.observe), start=1)


def _strips(at: Moment, count: int, rows: Sequence[_Row]) -> list[dict[str, Any]]:
    """Rows as strips, time to the right."""
    strips = []
    for name, frames, said in rows:
        shots = []
        for ahead in range(1, count + 1):
            frame = None if frames is None else frames[ahead - 1]
            text = said[ahead - 1]
            lines = [f"frame {at.number(ahead)}", *([] if text is None else text.split(", "))]
            kind = "" if name == SEEN else "candidate"
            shots.append(shot(frame, *lines, kind=kind))
        strips.append({"name": name, "shots": shots})
    return strips


def _said(imagined: Imagined, row: int, errors: Sequence[float], what: str = "error") -> list[str]:
    """Of each imagined frame its energy, if there is one, and an error."""
    said = []
    for ahead, error in enumerate(errors):
        energy = NOTHING
        if imagined.energies is not None:
            energy = float(imagined.energies[row, ahead])
        parts = [f"energy {show(energy)}"] if energy == energy else []
        said.append(", ".join([*parts, f"{what} {show(error)}"]))
    return said
