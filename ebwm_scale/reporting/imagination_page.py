"""imagination.json as one self-contained page: how far a model imagines, what it makes of actions,
how well it judges next frames, and held-out episodes that move beside what is imagined of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from ebwm_scale.core.errors import DataError
from ebwm_scale.evaluation.shown_futures import ShownFuture
from ebwm_scale.reporting.films import film
from ebwm_scale.reporting.page import card, with_interval
from ebwm_scale.reporting.page import render as render_page
from ebwm_scale.reporting.plain import bounded, page_text
from ebwm_scale.reporting.report_page import SIGNS
from ebwm_scale.reporting.result_pages import refuses_other_results, write_result
from ebwm_scale.reporting.style import LIGHT
from ebwm_scale.reporting.world_verdict import judge_world

WHO = {  # key of a row -> its name on the page, in the order of the columns
    "model": "this model",
    "against": "the other model",
    "shuffled_actions": "under other actions",
    "persistence": "last frame",
    "linear_extrapolation": "straight line",
}
ACTORS = {
    "model": "this model",
    "against": "the other model",
    "persistence": "planning with the last frame",
    "random": "random actions",
}
COLOURS = ("curve4", "baseline", "curve1", "muted", "curve2")
JUDGES = {
    "energy": "energy",
    "energy_above_prediction": "energy above its own prediction's",
    "prediction_error": "its prediction error",
    "prediction_error_of_against": "the other model's prediction error",
}
WRONG = {
    "another_time": "frames of another time",
    "another_episode": "frames of another episode",
    "another_action": "another action",
}
PIXELS = {"psnr": "PSNR, dB", "ssim": "SSIM"}
Film = dict[str, str]  # title, caption, image
_IMAGE = re.compile(r"data:image/png;base64,[A-Za-z0-9+/=]+")


def write_imagination(
    folder: Path, result: dict[str, Any], futures: Sequence[ShownFuture] = ()
) -> Path:
    """imagination.json and the page beside it, whose path is returned.

    Where plan_actions.json of the same checkpoint lies there, the page shows it as well.
    """
    planning = _read_planning(folder, result.get("checkpoint"))
    films = films_of(futures)
    return write_result(
        folder, "imagination", result, lambda result: render(result, films, planning)
    )


def _read_planning(folder: Path, checkpoint: Any) -> dict[str, Any] | None:
    try:
        planning = json.loads((folder / "plan_actions.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder / 'plan_actions.json'}: cannot be read: {page_text(str(error), 160)}; plan "
            "again, or remove it"
        ) from None
    is_ours = isinstance(planning, dict) and planning.get("checkpoint") == checkpoint
    return planning if is_ours else None


def films_of(futures: Sequence[ShownFuture]) -> list[Film]:
    """Each future beside what was, moving; imagined columns have a border."""
    films = []
    for future in futures:
        columns = [future.truth, *future.imagined.values()]
        image = film(
            columns, imagined=range(1, len(columns)), interval_s=max(0.2, future.interval_s)
        )
        who = ", ".join(WHO.get(name, name) for name in future.imagined)
        films.append(
            {
                "title": f"{future.episode}, from frame {future.start}",
                "caption": f"seen, then imagined from frame {future.num_context + 1} on by: {who}",
                "image": image,
            }
        )
    return films


def render(
    result: dict[str, Any],
    films: Sequence[Film] = (),
    planning: dict[str, Any] | None = None,
) -> str:
    """The page as HTML text. planning: the content of plan_actions.json, for a page of both.

    Raises DataError for what is no result of evaluate_imagination, or none of planning.
    """
    with refuses_other_results("ebwm evaluate on a world"):
        return _render(bounded(result), films, None if planning is None else bounded(planning))


def _render(result: dict[str, Any], films: Sequence[Film], planning: dict[str, Any] | None) -> str:
    errors, pixels = result["errors"], result["pixels"]
    plots = [card("Error of imagined frames", lambda axes: _curves(axes, errors, "SmoothL1"))]
    tables = [_table("SmoothL1 in the model's space", errors), _gains(errors)]
    for key, name in PIXELS.items():
        if key in pixels:
            tables.append(_table(name, pixels[key]))
    tables.append(_judges(result["judge"]))
    if "steps" in result:
        tables.append(_steps(result["steps"]))
    return render_page(
        "imagination.html.j2",
        title="Imagination",
        checkpoint=page_text(str(result.get("checkpoint", "a world model")), 300),
        against=page_text(str(result.get("against") or ""), 300),
        num_windows=f"{result['num_windows']:,}",
        num_episodes=f"{result['num_episodes']:,}",
        context_frames=str(result["context_frames"]),
        missing=page_text(str(pixels.get("missing", "")), 200),
        verdict=_verdict(result, planning),
        signs=SIGNS,
        films=[
            {key: page_text(str(each[key]), 10**8) for key in ("title", "caption", "image")}
            for each in films
            if _IMAGE.fullmatch(each["image"])
        ],
        planned=_planned(planning),
        left_out=", ".join(str(int(horizon)) for horizon in result["horizons_left_out"]),
        plots=plots,
        tables=tables,
    )


def _verdict(result: dict[str, Any], planning: dict[str, Any] | None) -> dict[str, Any]:
    """For the macro `verdict`."""
    answer, sentence, checks = judge_world(result, planning)
    tone = {"Yes": "yes", "No": "no"}.get(answer, "unknown")
    values = {"question": "Does it imagine its world?", "answer": answer, "tone": tone}
    return values | {"sentence": sentence, "checks": checks}


def _planned(planning: dict[str, Any] | None) -> dict[str, Any] | None:
    """A table of who acted in the environment."""
    if planning is None:
        return None
    measures = [key for key in ("success", "return") if planning["actors"]["model"][key]]
    rows = []
    for name, actor in planning["actors"].items():
        cells = [with_interval(actor[key]) for key in measures]
        rows.append([ACTORS.get(name, name), *cells, f"{actor['seconds_per_plan']:.3g}"])
    return {
        "env": page_text(str(planning["env"]), 300),
        "goal": page_text(str(planning["goal"]), 300),
        "solver": page_text(str(planning["solver"]), 100),
        "num_episodes": str(int(planning["num_episodes"])),
        "heads": ["who acts", *measures, "seconds per plan"],
        "rows": rows,
    }


def _table(title: str, rows: list[dict]) -> dict[str, Any]:
    shown = [key for key in WHO if key in rows[0]]
    return {
        "title": title,
        "heads": ["steps ahead", *(WHO[key] for key in shown)],
        "rows": [
            [str(row["horizon"]), *(with_interval(row[key]) for key in shown)] for row in rows
        ],
    }


def _gains(rows: list[dict]) -> dict[str, Any]:
    shown = [key for key in WHO if f"gain_over_{key}" in rows[0]]
    return {
        "title": "By how much this model's error is lower, paired",
        "heads": ["steps ahead", *(f"than {WHO[key]}" for key in shown)],
        "rows": [
            [str(row["horizon"]), *(with_interval(row[f"gain_over_{key}"]) for key in shown)]
            for row in rows
        ],
    }


def _judges(judges: dict[str, Any]) -> dict[str, Any]:
    kinds = [kind for kind in WRONG if any(kind in values for values in judges.values())]
    rows = []
    for judge, values in judges.items():
        row = [JUDGES[judge]]
        for kind in kinds:
            row.append(with_interval(values[kind]["auroc"]) if kind in values else "–")
            share = values[kind]["within_a_context"] if kind in values else None
            row.append(with_interval(share) if share else "–")
        rows.append(row)
    heads = ["judge"]
    for kind in kinds:
        heads += [f"{WRONG[kind]}: AUROC", "within one context"]
    return {"title": "Real next frames told from", "heads": heads, "rows": rows}


def _steps(rows: list[dict]) -> dict[str, Any]:
    table = []
    for row in rows:
        gain = with_interval(row["gain_over_previous"]) if "gain_over_previous" in row else "–"
        table.append([str(row["num_steps"]), with_interval(row["error"]), gain])
    heads = ["refinement steps", "error of the next frame", "less than in the row above"]
    return {"title": "What refinement steps add", "heads": heads, "rows": table}


def _curves(axes: Axes, rows: list[dict], label: str) -> str:
    x = [row["horizon"] for row in rows]
    shown = [key for key in WHO if key in rows[0]]
    for key, colour in zip(shown, COLOURS):
        points = [row[key] for row in rows]
        low, high = [point["low"] for point in points], [point["high"] for point in points]
        axes.fill_between(x, low, high, color=LIGHT[colour], alpha=0.15, linewidth=0)
        means = [point["mean"] for point in points]
        axes.plot(x, means, color=LIGHT[colour], marker="o", markersize=3, label=WHO[key])
    axes.set_xlabel("steps ahead")
    axes.set_ylabel(label)
    axes.legend(fontsize=7)
    return "Lower is better; bands are 95 % intervals over episodes."
