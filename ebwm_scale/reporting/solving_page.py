"""solving.json as one self-contained page: what is solved after each number of steps, and how hard
it was.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from ebwm_scale.core.errors import DataError
from ebwm_scale.reporting.numbers import show
from ebwm_scale.reporting.page import card, with_interval
from ebwm_scale.reporting.page import render as render_page
from ebwm_scale.reporting.plain import bounded, page_text
from ebwm_scale.reporting.spectrum import spectrum_sentences
from ebwm_scale.reporting.style import LIGHT

MAX_POINTS = 300  # of a curve or a table
_COLOURS = ("curve1", "curve2", "curve3")


def write_solving(folder: Path, result: dict[str, Any]) -> Path:
    """solving.json and the page beside it, whose path is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "solving.json").write_text(json.dumps(result, indent=1, allow_nan=False))
    page = folder / "solving.html"
    page.write_text(render(result), encoding="utf-8", errors="replace")
    return page


def render(result: dict[str, Any]) -> str:
    """The page as HTML text. Raises DataError for what is no result of evaluate_solving."""
    try:
        return _render(bounded(result))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise DataError(
            f"not a result of ebwm evaluate on tasks: {page_text(repr(error), 160)}; evaluate again"
        ) from None


def _render(result: dict[str, Any]) -> str:
    points = result["steps"][:MAX_POINTS]
    plots = []
    if len(points) > 1:
        plots = [
            card("Solved instances", lambda axes: _curve(axes, result, "solved")),
            card("Right tokens", lambda axes: _curve(axes, result, "accuracy")),
            card("Solved, easy and hard", lambda axes: _easy_and_hard(axes, result)),
        ]
    return render_page(
        "solving.html.j2",
        title="Solving",
        checkpoint=page_text(str(result.get("checkpoint", "tasks")), 300),
        task=page_text(str(result["task"]), 100),
        split=page_text(str(result["split"]), 100),
        num_samples=f"{result['num_samples']:,}",
        num_targets=f"{result['num_targets']:,}",
        sentences=_sentences(result),
        plots=plots,
        steps=_steps_table(result, points),
        difficulty=_difficulty_table(points) if points[0]["by_difficulty"] else None,
    )


def _steps_table(result: dict[str, Any], points: list[dict]) -> dict[str, Any]:
    rows = [
        [
            _steps_name(point, result),
            with_interval(point["solved"]),
            with_interval(point["accuracy"]),
            with_interval(point["loss"]),
            _gain(point, "rise_of_solved"),
            _gain(point, "fall_of_loss"),
        ]
        for point in points
    ]
    heads = [
        "steps",
        "solved instances",
        "right tokens",
        "loss, nats per scored token",
        "more solved than in the row above",
        "less loss than in the row above",
    ]
    return {"heads": heads, "rows": rows}


def _gain(point: dict, what: str) -> str:
    if "gain_over_previous" not in point:
        return "–"
    return with_interval(point["gain_over_previous"][what])


def _difficulty_table(points: list[dict]) -> dict[str, Any]:
    """Share of solved instances: a row per range of difficulty, a column per number of steps."""
    heads = ["difficulty", "instances", *(str(point["num_steps"]) for point in points)]
    rows = []
    for number, part in enumerate(points[0]["by_difficulty"][:MAX_POINTS]):
        solved = [with_interval(point["by_difficulty"][number]["solved"]) for point in points]
        rows.append([_range(part), str(part["num_samples"]), *solved])
    return {"heads": heads, "rows": rows}


def _sentences(result: dict[str, Any]) -> list[str]:
    if "early_stopping" not in result:
        return []
    stopping = result["early_stopping"]
    first = (
        f"Stopping early (tolerance {show(stopping['tolerance'])}) takes "
        f"{with_interval(stopping['mean_steps'])} of {stopping['max_steps']} steps, and solves "
        f"{with_interval(stopping['stopped']['solved'])} of the instances; running on solves "
        f"{with_interval(stopping['running_on']['solved'])}."
    )
    lines = [first]
    if "rank_correlation_of_steps_with_difficulty" in stopping:
        correlation = stopping["rank_correlation_of_steps_with_difficulty"]
        lines.append(
            "Rank correlation of the steps taken with the difficulty: "
            f"{with_interval(correlation)}."
        )
    return lines + spectrum_sentences(result)


def _steps_name(point: dict, result: dict[str, Any]) -> str:
    if result["trained_steps"] is None:
        return "none: no energy model"
    mark = " (trained)" if point["num_steps"] == result["trained_steps"] else ""
    return f"{point['num_steps']}{mark}"


def _range(part: dict) -> str:
    if part["lowest"] == part["highest"]:
        return str(part["lowest"])
    return f"{part['lowest']} to {part['highest']}"


def _curve(axes: Axes, result: dict[str, Any], what: str) -> str:
    points = result["steps"][:MAX_POINTS]
    _with_band(axes, points, [point[what] for point in points], LIGHT["curve3"], None)
    _mark_trained(axes, result)
    return f"From {show(points[0][what]['mean'])} to {show(points[-1][what]['mean'])}."


def _easy_and_hard(axes: Axes, result: dict[str, Any]) -> str:
    points = result["steps"][:MAX_POINTS]
    parts = points[0]["by_difficulty"]
    if not parts:
        return "The dataset gives no difficulties."
    shown = sorted({0, len(parts) // 2, len(parts) - 1})
    for number, colour in zip(shown, _COLOURS):
        values = [point["by_difficulty"][number]["solved"] for point in points]
        _with_band(axes, points, values, LIGHT[colour], f"difficulty {_range(parts[number])}")
    _mark_trained(axes, result)
    axes.legend(fontsize=7)
    return "Share of solved instances by their difficulty."


def _mark_trained(axes: Axes, result: dict[str, Any]) -> None:
    axes.axvline(result["trained_steps"], color=LIGHT["muted"], linewidth=0.7, linestyle=":")
    axes.set_xlabel("refinement steps")
    axes.set_ylabel("share")


def _with_band(
    axes: Axes, points: list[dict], values: list[dict], colour: str, label: str | None
) -> None:
    x = [point["num_steps"] for point in points]
    low, high = [value["low"] for value in values], [value["high"] for value in values]
    axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    means = [value["mean"] for value in values]
    axes.plot(x, means, color=colour, marker="o", markersize=3, label=label)
