"""plan_actions.json as one self-contained page: who reached the goal, and episodes that move."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ebwm_scale.control.mpc import Outcome
from ebwm_scale.core.errors import DataError
from ebwm_scale.reporting.films import film
from ebwm_scale.reporting.page import render as render_page
from ebwm_scale.reporting.page import with_interval
from ebwm_scale.reporting.plain import bounded, page_text

WHO = {  # actor -> its name on the page
    "model": "this model",
    "against": "the other model",
    "persistence": "planning with the last frame",
    "random": "random actions",
}
MEASURES = {  # key of an actor -> head of a column
    "success": "success",
    "return": "return",
    "steps": "steps",
    "nearest_distance": "nearest to the goal",
    "last_distance": "distance at the end",
}
GAINS = {"success": "success", "return": "return", "nearest_distance": "nearest to the goal"}
_IMAGE = re.compile(r"data:image/png;base64,[A-Za-z0-9+/=]+")


def films_of(
    played: Mapping[str, Sequence[Outcome]], count: int, interval_s: float
) -> list[dict[str, str]]:
    """Films of the first `count` episodes of each actor: real, imagined, and the goal's frame."""
    films = []
    for number in range(count):
        for name, outcomes in played.items():
            outcome = outcomes[number]
            said = {True: "reached", False: "not reached", None: ""}[outcome.success]
            title = f"{WHO.get(name, name)}, episode {number + 1}"
            caption = f"{outcome.steps} steps, return {outcome.total_reward:.4g}"
            if said:
                caption += f", goal {said}"
            films.append({"title": title, "caption": caption, "image": _film(outcome, interval_s)})
    return films


def _film(outcome: Outcome, interval_s: float) -> str:
    columns = [outcome.frames]
    imagined = []
    if outcome.imagined is not None and len(outcome.imagined):
        imagined = [1]
        columns.append(np.concatenate([outcome.frames[:1], outcome.imagined]))
    if isinstance(outcome.goal, np.ndarray):
        columns.append(np.broadcast_to(outcome.goal, outcome.frames.shape))
    return film(columns, imagined=imagined, interval_s=interval_s)


def write_plan_actions(
    folder: Path, result: dict[str, Any], films: Sequence[dict[str, str]] = ()
) -> Path:
    """plan_actions.json and the page beside it, whose path is returned."""
    text = json.dumps(result, indent=1, allow_nan=False)
    html = render(result, films)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan_actions.json").write_text(text)
    page = folder / "plan_actions.html"
    page.write_text(html, encoding="utf-8", errors="replace")
    return page


def render(result: dict[str, Any], films: Sequence[dict[str, str]] = ()) -> str:
    """The page as HTML text. Raises DataError for what is no result of ebwm plan-actions."""
    try:
        return _render(bounded(result), films)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise DataError(
            f"not a result of ebwm plan-actions: {page_text(repr(error), 160)}; plan again"
        ) from None


def _render(result: dict[str, Any], films: Sequence[dict[str, str]]) -> str:
    actors = result["actors"]
    shown = [key for key in MEASURES if any(actor[key] is not None for actor in actors.values())]
    rows = []
    for name, actor in actors.items():
        cells = [with_interval(actor[key]) if actor[key] is not None else "–" for key in shown]
        rows.append([WHO.get(name, name), *cells, f"{actor['seconds_per_plan']:.3g}"])
    heads = ["who acts", *(MEASURES[key] for key in shown), "seconds per plan"]
    tables = [{"title": "What came of the episodes", "heads": heads, "rows": rows}]
    gained = [key for key in GAINS if any(key in gains for gains in result["gains"].values())]
    if gained:
        tables.append(
            {
                "title": "This model minus the others, paired",
                "heads": ["than", *(GAINS[key] for key in gained)],
                "rows": [
                    [
                        WHO.get(name, name),
                        *(with_interval(gains[key]) if key in gains else "–" for key in gained),
                    ]
                    for name, gains in result["gains"].items()
                ],
            }
        )
    return render_page(
        "plan_actions.html.j2",
        title="Planned actions",
        checkpoint=page_text(str(result.get("checkpoint", "a world model")), 300),
        env=page_text(str(result["env"]), 300),
        against=page_text(str(result.get("against") or ""), 300),
        goal=page_text(str(result["goal"]), 300),
        solver=page_text(str(result["solver"]), 100),
        num_episodes=str(int(result["num_episodes"])),
        max_steps=str(int(result["max_steps"])),
        horizon=str(int(result["horizon"])),
        budget=str(int(result["budget"])),
        notes=[page_text(str(note), 500) for note in result.get("notes", [])],
        tables=tables,
        films=[
            {key: page_text(str(each[key]), 10**8) for key in ("title", "caption", "image")}
            for each in films
            if _IMAGE.fullmatch(each["image"])
        ],
    )
