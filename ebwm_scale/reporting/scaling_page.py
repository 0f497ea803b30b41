"""Scaling studies as one self-contained page: loss against size, FLOPs and data per form, fits with
intervals, crossovers, equal FLOPs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from ebwm_scale.evaluation.scaling_laws import QUANTITIES, compare, iso_flop
from ebwm_scale.reporting.numbers import by_sign, show
from ebwm_scale.reporting.page import card, with_interval
from ebwm_scale.reporting.page import render as render_page
from ebwm_scale.reporting.plain import page_text
from ebwm_scale.reporting.style import LIGHT

COLOURS = ("baseline", "curve3", "initial", "curve0", "unigram", "curve5")


def analyse(study: dict[str, Any]) -> dict[str, Any]:
    """The fits of a study's runs: {"fits": [...], "iso_flop": {...}}."""
    quantities = [x for x, (_, axes) in QUANTITIES.items() if study["axis"] in axes]
    return {
        "fits": [compare(study["runs"], x) for x in quantities],
        "iso_flop": iso_flop(study["runs"]),
    }


MAX_STUDIES = 50


def render(studies: Sequence[dict[str, Any]]) -> str:
    """The page of several studies, each with "title", "axis", "runs", "command" and analyse()'s
    result.
    """
    return render_page(
        "scaling.html.j2",
        title="Scaling studies",
        studies=[_study(study) for study in studies[:MAX_STUDIES]],
    )


def _study(study: dict[str, Any]) -> dict[str, Any]:
    runs, unit = study["runs"], study["unit"]
    seeds = sorted({str(run["seed"]) for run in runs})
    said = [sentence for fit in study["fits"] for sentence in sentences(fit, unit)]
    plots = [
        card(f"Loss against {fit['what']}", lambda axes, fit=fit: _fit(axes, fit, unit))
        for fit in study["fits"]
    ]
    if study["iso_flop"]["budgets"]:
        plots.append(
            card(
                "Lowest loss within a budget of FLOPs",
                lambda axes: _iso(axes, study["iso_flop"], unit),
            )
        )
    heads = [
        "form",
        study["axis"],
        "parameters",
        "FLOPs per step",
        "steps",
        f"loss, {unit}",
        "per refinement step, mean over seeds",
    ]
    return {
        "title": page_text(str(study["title"]), 200),
        "num_runs": len(runs),
        "seeds": page_text(", ".join(seeds), 400),
        "command": page_text(str(study["command"]), 1_000),
        "missing": page_text(", ".join(map(str, study["missing"])), 1_000),
        "sentences": [page_text(sentence) for sentence in said],
        "plots": [plot | {"caption": page_text(plot["caption"])} for plot in plots],
        "heads": [page_text(str(head), 120) for head in heads],
        "rows": _rows(runs),
    }


def _rows(runs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """One row per form and point of the axis."""
    cells: dict[tuple[str, str], list[dict]] = {}
    for run in runs:
        cells.setdefault((str(run["form"]), str(run["point"])), []).append(run)
    rows = []
    for (form, point), runs_of_cell in cells.items():
        group = sorted(runs_of_cell, key=lambda run: str(run["seed"]))
        steps = []
        if all(run["loss_per_step"] for run in group):
            steps = np.mean([run["loss_per_step"] for run in group], 0)
        rows.append(
            [
                page_text(form, 120),
                page_text(point, 120),
                f"{group[0]['parameters']:,}",
                show(group[0]["flops_per_step"]),
                str(group[0]["curve"][-1][0]),
                ", ".join(f"{run['loss']:.4f}" for run in group),
                " → ".join(f"{loss:.4f}" for loss in steps) if len(steps) > 1 else "",
            ]
        )
    return rows


def sentences(fit: dict[str, Any], unit: str) -> list[str]:
    """What a fit says, and what it does not."""
    lines = [
        f"Against {fit['what']}: "
        + "; ".join(
            f"{form} falls with exponent {with_interval(row['exponent'])}"
            for form, row in fit["forms"].items()
        )
        + "."
    ]
    for form, row in fit["against_reference"].items():
        difference = row["exponent_difference"]
        verdict = by_sign(
            difference,
            "scales faster than",
            "scales slower than",
            "scales no differently, as far as these runs show, than",
        )
        text = (
            f"{form} {verdict} {fit['reference']}: exponents differ by "
            f"{with_interval(difference)}, "
            f"relative rate {100 * row['relative_rate']['mean']:+.1f} % "
            f"[{100 * row['relative_rate']['low']:+.1f}, "
            f"{100 * row['relative_rate']['high']:+.1f}]. "
            f"At the largest x its fit is {with_interval(row['loss_difference_at_largest'])} "
            f"{unit} above."
        )
        crossover = row["crossover"]
        if crossover is None:
            text += " The fits do not cross beyond it."
        elif crossover["share_of_resamples"] < 0.975:
            text += (
                f" No crossover is established: only {crossover['share_of_resamples']:.0%} of "
                "resamples have one."
            )
        else:
            text += (
                f" Extrapolated, the fits cross at {show(crossover['median'])} "
                f"[{show(crossover['low'])}, {show(crossover['high'])}]."
            )
        lines.append(text)
    return lines


def _fit(axes: Axes, fit: dict[str, Any], unit: str) -> str:
    for (form, row), colour in zip(fit["forms"].items(), COLOURS):
        places = np.array([point["x"] for point in row["points"]])
        for point in row["points"]:
            axes.plot(
                [point["x"]] * len(point["losses"]),
                point["losses"],
                ".",
                color=LIGHT[colour],
                markersize=4,
            )
        line = np.geomspace(places.min(), places.max(), 40)
        axes.plot(
            line,
            row["factor"] * line ** -row["exponent"]["mean"],
            color=LIGHT[colour],
            label=page_text(form, 60),
        )
    _logarithmic(axes, fit["what"], unit)
    return (
        "Points are runs, lines are fits. Largest relative distance of a mean from its line: "
        + ", ".join(f"{form} {row['residual']:.1%}" for form, row in fit["forms"].items())
        + "."
    )


def _iso(axes: Axes, result: dict[str, Any], unit: str) -> str:
    for (form, row), colour in zip(result["forms"].items(), COLOURS):
        axes.fill_between(
            result["budgets"],
            row["lowest"],
            row["highest"],
            color=LIGHT[colour],
            alpha=0.18,
            linewidth=0,
        )
        axes.plot(
            result["budgets"],
            row["mean"],
            color=LIGHT[colour],
            marker="o",
            markersize=3,
            label=page_text(form, 60),
        )
    _logarithmic(axes, "FLOPs, matrix products and attention", unit)
    said = [
        f"{form} {row['difference']['mean'][-1]:+.4g} [{row['difference']['lowest'][-1]:+.4g}, "
        f"{row['difference']['highest'][-1]:+.4g}]"
        for form, row in result["forms"].items()
        if "difference" in row
    ]
    return (
        "Difference at the largest common budget, mean and range over seeds: "
        + "; ".join(said)
        + "."
    )


def _logarithmic(axes: Axes, x: str, y: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="y", which="minor", labelsize=6.5)
    axes.set_xlabel(x)
    axes.set_ylabel(page_text(y, 60))
    axes.legend(fontsize=7)
