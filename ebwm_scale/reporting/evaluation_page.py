"""evaluation.json as one self-contained page: thinking curves with their intervals, and what the
energy says.
"""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes

from ebwm_scale.core.renamed_keys import with_new_names
from ebwm_scale.reporting.exits import exit_sentences
from ebwm_scale.reporting.numbers import by_sign, show
from ebwm_scale.reporting.page import card, with_interval
from ebwm_scale.reporting.page import render as render_page
from ebwm_scale.reporting.plain import bounded, page_text
from ebwm_scale.reporting.result_pages import refuses_other_results
from ebwm_scale.reporting.spectrum import spectrum_sentences
from ebwm_scale.reporting.style import LIGHT

MAX_POINTS = 300  # of a curve or a table


def render(result: dict[str, Any]) -> str:
    """The page as HTML text. Raises DataError for what is no result of ebwm_scale.evaluate."""
    with refuses_other_results("ebwm_scale.evaluate"):
        return _render(with_new_names(bounded(result)))


def _render(result: dict[str, Any]) -> str:
    unit = "nats per token" if result["modality"] == "text" else "SmoothL1"
    perplexity = result["loss"].get("perplexity")
    is_energy = result["kind"] != "baseline"
    return render_page(
        "evaluation.html.j2",
        title="Evaluation",
        checkpoint=page_text(str(result.get("checkpoint", "evaluation")), 300),
        num_samples=f"{result['num_samples']:,}",
        num_targets=f"{result['num_targets']:,}",
        loss=with_interval(result["loss"]),
        perplexity=show(perplexity) if perplexity is not None else "",
        unit=unit,
        sentences=_sentences(result) if is_energy else [],
        plots=_plots(result, unit) if is_energy else [],
        steps=_steps_table(result, unit) if is_energy else None,
        other_texts=_texts_table(result, unit) if result.get("out_of_distribution_texts") else None,
    )


def _plots(result: dict[str, Any], unit: str) -> list[dict[str, Any]]:
    plots = [card("Loss against refinement steps", lambda axes: _curves(axes, result, unit))]
    if result.get("starts"):
        starts = result["starts"][:MAX_POINTS]
        plots.append(
            card(
                "Loss against starts, lowest energy kept", lambda axes: _starts(axes, starts, unit)
            )
        )
    deciles = result["energy"]["deciles"]
    of_error = result["allocation"]["deciles_of_error"]
    plots += [
        card(
            "Error by decile of final energy", lambda axes: _deciles(axes, deciles, "energy", unit)
        ),
        card(
            "Steps used by decile of error", lambda axes: _deciles(axes, of_error, "error", "steps")
        ),
    ]
    return plots


def _steps_table(result: dict[str, Any], unit: str) -> dict[str, Any]:
    rows = [["0", with_interval(result["initial"]), "–"]]
    for point in result["steps"][:MAX_POINTS]:
        trained = " (trained)" if point["num_steps"] == result["trained_steps"] else ""
        rows.append(
            [f"{point['num_steps']}{trained}", with_interval(point), show(point["mean_energy"])]
        )
    return {"heads": ["steps", f"loss, {unit}", "mean energy"], "rows": rows}


def _texts_table(result: dict[str, Any], unit: str) -> dict[str, Any]:
    rows = []
    for text in result["out_of_distribution_texts"][:MAX_POINTS]:
        by_energy = with_interval(text["auroc_of_energy"]) if "auroc_of_energy" in text else "–"
        rows.append(
            [
                page_text(str(text["name"]), 200),
                str(text["num_samples"]),
                by_energy,
                with_interval(text["mean_loss"]),
                with_interval(text["auroc_of_loss"]),
            ]
        )
    return {
        "heads": ["text", "sequences", "AUROC by energy", f"its loss, {unit}", "AUROC by loss"],
        "rows": rows,
    }


def _sentences_of_starts(result: dict[str, Any]) -> list[str]:
    """Whether the lowest of several starts is better than any, by steps; older files do not say."""
    lines = []
    of_trained = {"num_steps": result["trained_steps"], "starts": result.get("starts") or []}
    for found in [*result.get("starts_of_fewer_steps", []), of_trained]:
        for point in found["starts"][:MAX_POINTS]:
            if "below_any" not in point:
                continue
            below = point["below_any"]
            verdict = by_sign(below, "better than", "worse than", "no better than")
            lines.append(
                f"After {found['num_steps']} steps the lowest energy of {point['num_starts']} "
                f"starts is {verdict} any of them: its loss is {with_interval(below)} lower."
            )
    return lines


def _sentences(result: dict[str, Any]) -> list[str]:
    lines = []
    if "gain_of_later_steps" in result:
        gain = result["gain_of_later_steps"]
        verdict = by_sign(gain, "falls", "rises", "changes no more than this many samples show")
        lines.append(
            f"From the first step to the {result['trained_steps']} that were trained the loss "
            f"{verdict}: "
            f"it falls by {with_interval(gain)}. Whether more steps help shows beside a model "
            "trained with one."
        )
    correlation = result["energy"]["rank_correlation_with_error"]
    says = by_sign(
        correlation, "rises with the error", "falls with the error", "says nothing about the error"
    )
    lines.append(f"The final energy {says}: rank correlation {with_interval(correlation)}.")
    allocation = result["allocation"]
    lines.append(
        f"Stopping early (tolerance {show(allocation['tolerance'])}) uses "
        f"{show(allocation['mean_steps'])} of {allocation['max_steps']} steps, "
        f"{allocation['saved']:.0%} fewer, at a loss of "
        f"{with_interval(allocation['loss_stopped'])} against "
        f"{with_interval(allocation['loss_running_on'])}; rank correlation of steps and error "
        f"{with_interval(allocation['rank_correlation_of_steps_with_error'])}."
    )
    if "uncertainty" in result:
        spread = result["uncertainty"]["rank_correlation_of_energy_spread_with_error"]
        lines.append(
            "Spread of energy over starts against the error: rank correlation "
            f"{with_interval(spread)}."
        )
    lines += _sentences_of_starts(result)
    if "out_of_distribution" in result:
        lines.append(
            "Real text is told from shuffled text by its energy with an AUROC of "
            f"{with_interval(result['out_of_distribution']['auroc'])}: the share of pairs in which "
            "the real one has the lower energy (0.5: cannot tell)."
        )
    return lines + exit_sentences(result) + spectrum_sentences(result)


def _curves(axes: Axes, result: dict[str, Any], unit: str) -> str:
    for points, colour, label, style in (
        (result["steps"], LIGHT["curve3"], "every step taken", "-"),
        (result["steps_accept_only_if_lower"], LIGHT["baseline"], "accepted only if lower", "--"),
    ):
        _with_band(axes, [p["num_steps"] for p in points], points, colour, label, style)
    axes.axvline(result["trained_steps"], color=LIGHT["muted"], linewidth=0.7, linestyle=":")
    axes.set_xlabel("refinement steps")
    axes.set_ylabel(unit)
    axes.legend(fontsize=7)
    return (
        f"Trained with {result['trained_steps']}; initial state {show(result['initial']['mean'])}."
    )


def _starts(axes: Axes, points: list[dict], unit: str) -> str:
    _with_band(
        axes, [p["num_starts"] for p in points], points, LIGHT["curve3"], "lowest energy", "-"
    )
    axes.set_xlabel("starts")
    axes.set_ylabel(unit)
    return (
        f"Mean energy {show(points[0]['mean_energy'])} with {points[0]['num_starts']}, "
        f"{show(points[-1]['mean_energy'])} with {points[-1]['num_starts']}."
    )


def _deciles(axes: Axes, points: list[dict], by: str, what: str) -> str:
    axes.plot(
        [p["by"] for p in points],
        [p["mean"] for p in points],
        color=LIGHT["curve3"],
        marker="o",
        markersize=3,
    )
    axes.set_xlabel(f"mean {by} of the decile")
    axes.set_ylabel(what)
    return (
        f"From {show(points[0]['mean'])} in the lowest decile to {show(points[-1]['mean'])} in the "
        "highest."
    )


def _with_band(
    axes: Axes, x: list[float], points: list[dict], colour: str, label: str, style: str
) -> None:
    axes.fill_between(
        x,
        [p["low"] for p in points],
        [p["high"] for p in points],
        color=colour,
        alpha=0.18,
        linewidth=0,
    )
    axes.plot(
        x,
        [p["mean"] for p in points],
        color=colour,
        marker="o",
        markersize=3,
        linestyle=style,
        label=label,
    )
