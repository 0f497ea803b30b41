"""solving.json as one self-contained page: whether thinking pays, what is solved after each number
of steps, how hard it was, and some instances step by step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from ebwm_scale.reporting.exits import exit_sentences
from ebwm_scale.reporting.numbers import show
from ebwm_scale.reporting.page import card, with_interval
from ebwm_scale.reporting.page import render as render_page
from ebwm_scale.reporting.plain import bounded, page_text
from ebwm_scale.reporting.report_page import SIGNS
from ebwm_scale.reporting.result_pages import refuses_other_results, write_result
from ebwm_scale.reporting.solving_examples import examples_of
from ebwm_scale.reporting.solving_verdict import judge_solving, name_of_other, word_for_steps
from ebwm_scale.reporting.spectrum import spectrum_sentences
from ebwm_scale.reporting.style import LIGHT

MAX_POINTS = 300  # of a curve or a table
_COLOURS = ("curve1", "curve2", "curve3")


def write_solving(folder: Path, result: dict[str, Any]) -> Path:
    """solving.json and the page beside it, whose path is returned."""
    return write_result(folder, "solving", result, render)


def render(result: dict[str, Any]) -> str:
    """The page as HTML text. Raises DataError for what is no result of evaluate_solving."""
    with refuses_other_results("ebwm evaluate on tasks"):
        return _render(bounded(result))


def _render(result: dict[str, Any]) -> str:
    points = result["steps"][:MAX_POINTS]
    return render_page(
        "solving.html.j2",
        title="Solving",
        checkpoint=page_text(str(result.get("checkpoint", "tasks")), 300),
        task=page_text(str(result["task"]), 100),
        split=page_text(str(result["split"]), 100),
        num_samples=f"{result['num_samples']:,}",
        num_targets=f"{result['num_targets']:,}",
        verdict=_verdict(result),
        signs=SIGNS,
        sentences=_sentences(result),
        examples=examples_of(result),
        plots=plots_of(result, points) if len(points) > 1 else [],
        steps=_steps_table(result, points),
        difficulty=_difficulty_table(points) if points[0]["by_difficulty"] else None,
    )


def _verdict(result: dict[str, Any]) -> dict[str, Any] | None:
    """For the macro `verdict`."""
    judged = judge_solving(result)
    if judged is None:
        return None
    answer, sentence, checks = judged
    question = "Does thinking pay?" if result["kind"] == "energy" else "Does looping pay?"
    tone = {"Yes": "yes", "No": "no"}.get(answer, "unknown")
    values = {"question": question, "answer": answer, "tone": tone}
    return values | {"sentence": sentence, "checks": checks}


def plots_of(result: dict[str, Any], points: list[dict]) -> list[dict[str, Any]]:
    """What is solved by number of steps, and what else a result holds, for the macro `figure`."""
    plots = [
        card("Solved instances", lambda axes: _curve(axes, result, "solved", "share")),
        card("Right tokens", lambda axes: _curve(axes, result, "accuracy", "share")),
        card("Loss", lambda axes: _curve(axes, result, "loss", "nats per scored token")),
    ]
    if points[0]["by_difficulty"]:
        plots.append(card("Solved, easy and hard", lambda axes: _easy_and_hard(axes, result)))
    gains = result.get("gain_of_later_steps", {}).get("by_difficulty")
    if gains:
        plots.append(
            card("What later steps add, by difficulty", lambda axes: _gains(axes, result, gains))
        )
    stopped = result.get("settling", {}).get("by_difficulty")
    if stopped:
        plots.append(
            card("Steps until it stops, by difficulty", lambda axes: _stops(axes, stopped))
        )
    return plots


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
    if "against" in result:
        other = result["against"]
        shares = [with_interval(other[what]) for what in ("solved", "accuracy", "loss")]
        name = name_of_other(other)
        rows.append([name[0].upper() + name[1:], *shares, "–", "–"])
    heads = [
        f"{word_for_steps(result)}s",
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
        "Stopping when the energy falls no more (tolerance "
        f"{show(stopping['tolerance'])}) takes "
        f"{with_interval(stopping['mean_steps'])} of {stopping['max_steps']} steps, and solves "
        f"{with_interval(stopping['stopped']['solved'])} of the instances; running on solves "
        f"{with_interval(stopping['running_on']['solved'])}."
    )
    lines = [first]
    if "settling" in result:
        settling = result["settling"]
        lines.append(
            "Stopping when the answer settles (no scored probability changes by more than "
            f"{show(settling['largest_change'])}) takes {with_interval(settling['mean_steps'])} of "
            f"{settling['max_steps']} steps, and solves "
            f"{with_interval(settling['stopped']['solved'])}."
        )
    if "rank_correlation_of_steps_with_difficulty" in stopping:
        correlation = stopping["rank_correlation_of_steps_with_difficulty"]
        lines.append(
            "Rank correlation of the steps that the energy's fall allows with the difficulty: "
            f"{with_interval(correlation)}."
        )
    return lines + exit_sentences(result) + spectrum_sentences(result)


def _steps_name(point: dict, result: dict[str, Any]) -> str:
    if result["trained_steps"] is None:
        return "none: no energy model"
    mark = " (trained)" if point["num_steps"] == result["trained_steps"] else ""
    return f"{point['num_steps']}{mark}"


def _range(part: dict) -> str:
    if part["lowest"] == part["highest"]:
        return str(part["lowest"])
    return f"{part['lowest']} to {part['highest']}"


def _curve(axes: Axes, result: dict[str, Any], what: str, unit: str) -> str:
    points = result["steps"][:MAX_POINTS]
    _with_band(axes, points, [point[what] for point in points], LIGHT["curve3"], None)
    said = f"From {show(points[0][what]['mean'])} to {show(points[-1][what]['mean'])}."
    if "against" in result:
        value, name = result["against"][what], name_of_other(result["against"])
        axes.axhspan(value["low"], value["high"], color=LIGHT["baseline"], alpha=0.15, linewidth=0)
        axes.axhline(value["mean"], color=LIGHT["baseline"], linestyle=(0, (5, 1.5)), label=name)
        axes.legend(fontsize=7)
        said += f" {name[0].upper() + name[1:]}: {show(value['mean'])}."
    _mark_trained(axes, result, unit)
    return said


def _easy_and_hard(axes: Axes, result: dict[str, Any]) -> str:
    points = result["steps"][:MAX_POINTS]
    parts = points[0]["by_difficulty"]
    shown = sorted({0, len(parts) // 2, len(parts) - 1})
    for number, colour in zip(shown, _COLOURS):
        values = [point["by_difficulty"][number]["solved"] for point in points]
        _with_band(axes, points, values, LIGHT[colour], f"difficulty {_range(parts[number])}")
    _mark_trained(axes, result, "share")
    axes.legend(fontsize=7)
    return "Share of solved instances by their difficulty."


def _gains(axes: Axes, result: dict[str, Any], gains: list[dict]) -> str:
    _by_difficulty(axes, gains, [part["rise_of_solved"] for part in gains])
    axes.axhline(0, color=LIGHT["muted"], linewidth=0.7)
    axes.set_ylabel("more solved than after the first")
    return (
        f"Share solved after {word_for_steps(result)} {result['trained_steps']} minus share solved "
        "after the first, paired by instance."
    )


def _stops(axes: Axes, parts: list[dict]) -> str:
    values = [part["mean_steps"] for part in parts]
    _by_difficulty(axes, parts, values)
    axes.set_ylabel("steps")
    return (
        f"From {show(values[0]['mean'])} steps for the easiest to {show(values[-1]['mean'])} for "
        "the hardest."
    )


def _by_difficulty(axes: Axes, parts: list[dict], values: list[dict]) -> None:
    """A point with its interval for each range of difficulty."""
    places = range(len(parts))
    means = [value["mean"] for value in values]
    below = [max(0.0, value["mean"] - value["low"]) for value in values]
    above = [max(0.0, value["high"] - value["mean"]) for value in values]
    axes.errorbar(
        places,
        means,
        yerr=[below, above],
        color=LIGHT["curve3"],
        marker="o",
        markersize=4,
        linewidth=1.2,
        capsize=2.5,
    )
    axes.set_xticks(list(places), [_range(part) for part in parts])
    axes.set_xlabel("difficulty")


def _mark_trained(axes: Axes, result: dict[str, Any], unit: str) -> None:
    axes.axvline(result["trained_steps"], color=LIGHT["muted"], linewidth=0.7, linestyle=":")
    axes.set_xlabel("loops" if result["kind"] == "baseline" else "refinement steps")
    axes.set_ylabel(unit)


def _with_band(
    axes: Axes, points: list[dict], values: list[dict], colour: str, label: str | None
) -> None:
    x = [point["num_steps"] for point in points]
    low, high = [value["low"] for value in values], [value["high"] for value in values]
    axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    means = [value["mean"] for value in values]
    axes.plot(x, means, color=colour, marker="o", markersize=3, label=label)
