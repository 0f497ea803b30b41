"""Parts of an explorer's page of frames as plain values for templates/explore_frames.html.j2.

    shot       {"image": a data: URI or None, "lines": texts, "alt": text, "kind": a class or ""}
    reel       moments, one at a time under a slider: {"key", "moments": words, "shots": a list of
               shots for each, "fixed": shots that stay beside them, "interval_ms", "start": the
               moment that is shown first}

Pictures are of what the model sees: frames that have gone through its encoder and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.exploring.frame_source import interval_of, pixels_of
from ebwm_scale.inference.frame_by_frame import (
    FrameMoment,
    FrameStart,
    FrameView,
    Judged,
    frame_error,
)
from ebwm_scale.reporting.line_chart import LOOKS, Curve, line_chart
from ebwm_scale.reporting.numbers import show
from ebwm_scale.reporting.pictures import difference, picture

STEP_MS = 900  # a moment of a refinement
FASTEST_MS = 120  # a moment of a film
CURVES = len(LOOKS)


@dataclass(frozen=True)
class Truth:
    """The frame that came next, if it is known: states (P, dimension); frame uint8 (height, width,
    3) as the encoder shows them, None where no pictures can be made.
    """

    states: Tensor
    frame: np.ndarray | None


def shot(frame: np.ndarray | None, *lines: str, kind: str = "") -> dict[str, Any]:
    return {
        "image": None if frame is None else picture(frame),
        "lines": lines,
        "alt": ", ".join(lines),
        "kind": kind,
    }


def reel(
    key: str,
    moments: Sequence[str],
    shots: Sequence[Sequence[dict]],
    *,
    fixed: Sequence[dict] = (),
    interval_ms: int = STEP_MS,
    start: int = 0,
) -> dict[str, Any]:
    return {
        "key": key,
        "moments": moments,
        "shots": shots,
        "fixed": fixed,
        "interval_ms": interval_ms,
        "start": start,
    }


def film_ms(observe: Observation) -> int:
    """How long a frame is shown."""
    return max(FASTEST_MS, min(1000, round(1000 * interval_of(observe))))


def next_frame(
    key: str, name: str, kind: str, view: FrameView, truth: Truth | None, observe: Observation
) -> dict[str, Any]:
    """What one model considers for the next frame: a card for each start, and charts."""
    thinks = view.starts[0].last.energy is not None
    return {
        "name": name,
        "kind": kind,
        "thinks": thinks,
        "starts": [
            _start(f"{key}-{number}", number, start, view, truth, observe)
            for number, start in enumerate(view.starts)
        ],
        "charts": [chart for chart in _charts(view, truth) if chart is not None and thinks],
    }


def _all_moments(start: FrameStart) -> list[FrameMoment]:
    return [*start.moments, *([start.one_more] if start.one_more is not None else [])]


def _start(
    key: str,
    number: int,
    start: FrameStart,
    view: FrameView,
    truth: Truth | None,
    observe: Observation,
) -> dict[str, Any]:
    moments = _all_moments(start)
    pixels = pixels_of(observe, torch.stack([moment.state for moment in moments]))
    words, shots = [], []
    last = len(start.moments) - 1
    for place, moment in enumerate(moments):
        frame = None if pixels is None else pixels[place]
        lines = [_moment_name(place, last, moment.energy is None)]
        said = []
        if moment.energy is not None:
            said.append(f"energy {show(moment.energy)}")
        if truth is not None:
            said.append(f"error {show(frame_error(moment.state, truth.states))}")
        own = [shot(frame, *lines, *said, kind="candidate")]
        if truth is not None and truth.frame is not None and frame is not None:
            own.append(shot(difference(frame, truth.frame), "difference from", "the true frame"))
        words.append(", ".join([*lines, *said]))
        shots.append(own)
    fixed = [] if truth is None else [shot(truth.frame, "the true next frame", kind="truth")]
    title = "its prediction"
    if len(view.starts) > 1:
        title = f"start {number + 1}"
        if number == view.chosen:
            title += ": the lowest energy, the prediction"
    return {
        "title": title,
        "is_chosen": len(view.starts) > 1 and number == view.chosen,
        "reel": reel(key, words, shots, fixed=fixed, start=last),
        "sentence": _sentence(start, truth),
    }


def _moment_name(place: int, last: int, is_only: bool) -> str:
    if is_only:
        return "prediction"
    if place == 0:
        return "before the first step"
    if place > last:
        return f"after step {place}, one more than asked for"
    return f"after step {place}"


def _sentence(start: FrameStart, truth: Truth | None) -> str:
    if start.last.energy is None:
        return ""
    steps = len(start.moments) - 1
    text = f"{steps} {'step' if steps == 1 else 'steps'} taken"
    if start.accepted != steps:
        text += f", {start.accepted} of them accepted"
    if start.one_more is None or start.one_more.energy is None:
        return f"{text}."
    text += (
        f". One more would take the energy from {show(start.last.energy)} to "
        f"{show(start.one_more.energy)}"
    )
    if truth is not None:
        before = frame_error(start.last.state, truth.states)
        after = frame_error(start.one_more.state, truth.states)
        text += f", and the error from {show(before)} to {show(after)}"
    return f"{text}."


def _charts(view: FrameView, truth: Truth | None) -> list[dict[str, Any] | None]:
    """Energies and errors over steps; a curve a start."""
    energies, errors = [], []
    longest = 1
    for number, start in enumerate(view.starts[:CURVES]):
        moments = _all_moments(start)
        steps = [moment.num_steps for moment in moments]
        longest = max(longest, steps[-1])
        name = f"start {number + 1}" if len(view.starts) > 1 else "the candidate"
        values = [float("nan") if m.energy is None else m.energy for m in moments]
        energies.append(Curve(name, steps, values))
        if truth is not None:
            own = [frame_error(moment.state, truth.states) for moment in moments]
            errors.append(Curve(name, steps, own))
    ticks = list(range(0, longest + 1, max(1, -(-longest // 8))))
    return [
        line_chart(
            "Energy of the candidate",
            energies,
            x_label="refinement steps taken",
            y_label="Energy, in the landscape of each step; no unit",
            x_ticks=ticks,
        ),
        line_chart(
            "Error of the candidate",
            errors,
            x_label="refinement steps taken",
            y_label="SmoothL1 from the true frame, in standard deviations of the training data",
            x_ticks=ticks,
        ),
    ]


@dataclass(frozen=True)
class Candidate:
    """A frame that could be the next one. role: truth, wrong or own (what a model predicts)."""

    kind: str
    role: str
    shot: dict[str, Any]


def judged_frames(
    candidates: Sequence[Candidate], found: Sequence[tuple[str, Judged]]
) -> dict[str, Any]:
    """How models find frames, the truth first. found: by model's name, of all of them in order."""
    columns = []
    sentences = []
    for name, judged in found:
        for what, values in (
            ("energy", judged.energies),
            ("distance from its prediction", judged.distances),
        ):
            if values is None:
                continue
            columns.append({"head": f"{name}: {what}", "cells": _cells(values)})
            wrong = [
                (candidate.kind, value)
                for candidate, value in zip(candidates, values)
                if candidate.role == "wrong"
            ]
            lower = [kind for kind, value in wrong if value < values[0]]
            said = f"the lowest of the {len(wrong) + 1}"
            if lower:
                said = f"above {len(lower)} of {len(wrong)} wrong ones ({', '.join(lower)})"
            sentences.append(f"{name}: the true frame’s {what} is {said}.")
    rows = [
        {
            "shot": candidate.shot,
            "kind": candidate.kind,
            "role": candidate.role,
            "cells": [column["cells"][number] for column in columns],
        }
        for number, candidate in enumerate(candidates)
    ]
    return {"heads": [column["head"] for column in columns], "rows": rows, "sentences": sentences}


def _cells(values: Sequence[float]) -> list[dict[str, Any]]:
    """Numbers with bars from the lowest to the highest."""
    low, high = min(values), max(values)
    span = high - low or 1.0
    return [
        {
            "value": show(value),
            "width": f"{100 * (value - low) / span:.1f}",
            "is_lowest": value == low,
        }
        for value in values
    ]
