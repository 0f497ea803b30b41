"""evaluation.json as one self-contained page: thinking curves with their intervals, and what the energy says."""

from __future__ import annotations

from html import escape
from typing import Any

from matplotlib.axes import Axes

from .pages import card, page, table, with_interval
from .report_plots import LIGHT, show


def render(result: dict[str, Any]) -> str:
    """The page as HTML text."""
    unit = "nats per token" if result["modality"] == "text" else "SmoothL1"
    loss = result["loss"]
    parts = [
        f'<header><h1>{escape(result.get("checkpoint", "evaluation"))}</h1><p class="muted">{result["num_samples"]:,} validation samples, {result["num_targets"]:,} targets; '
        f"95 % intervals from a bootstrap over samples</p></header>",
        f"<p>Loss {with_interval(loss)} {unit}"
        + (f", perplexity {show(loss['perplexity'])}" if "perplexity" in loss else "")
        + ".</p>",
    ]
    if result["kind"] != "baseline":
        parts += [f"<p>{escape(sentence)}</p>" for sentence in _sentences(result)]
        figures = [
            ("Loss against refinement steps", lambda axes: _curves(axes, result, unit)),
            (
                "Error by tenth of final energy",
                lambda axes: _tenths(axes, result["energy"]["tenths"], "energy", unit),
            ),
            (
                "Steps used by tenth of error",
                lambda axes: _tenths(
                    axes, result["allocation"]["tenths_of_error"], "error", "steps"
                ),
            ),
        ]
        if result.get("starts"):
            figures.insert(
                1,
                (
                    "Loss against starts, lowest energy kept",
                    lambda axes: _starts(axes, result["starts"], unit),
                ),
            )
        parts.append(
            f'<div class="grid">{"".join(card(title, draw) for title, draw in figures)}</div>'
        )
        rows = [
            [
                f"{p['num_steps']}{' (trained)' if p['num_steps'] == result['trained_steps'] else ''}",
                with_interval(p),
                show(p["mean_energy"]),
            ]
            for p in result["steps"]
        ]
        parts.append(
            table(
                ["steps", f"loss, {unit}", "mean energy"],
                [["0", with_interval(result["initial"]), "–"], *rows],
            )
        )
    if result.get("foreign_texts"):
        share = "share_of_pairs_in_which_real_has_lower_"
        parts.append(
            "<p>Texts of another kind: the share of pairs in which the validation text has the lower energy, or loss (0.5: cannot tell).</p>"
        )
        parts.append(
            table(
                ["text", "sequences", "by energy", f"its loss, {unit}", "by loss"],
                [
                    [
                        text["name"],
                        str(text["num_samples"]),
                        with_interval(text[share + "energy"]) if share + "energy" in text else "–",
                        with_interval(text["mean_loss"]),
                        with_interval(text[share + "loss"]),
                    ]
                    for text in result["foreign_texts"]
                ],
            )
        )
    return page("Evaluation", parts)


def _sentences(result: dict[str, Any]) -> list[str]:
    lines = []
    if "gain_of_later_steps" in result:
        gain = result["gain_of_later_steps"]
        verdict = (
            "helps"
            if gain["low"] > 0
            else "hurts"
            if gain["high"] < 0
            else "makes no difference that this many samples show"
        )
        lines.append(
            f"Thinking on after the first step, up to the {result['trained_steps']} that were trained, {verdict}: the loss falls by {with_interval(gain)}."
        )
    correlation = result["energy"]["rank_correlation_with_error"]
    says = (
        "rises with the error"
        if correlation["low"] > 0
        else "falls with the error"
        if correlation["high"] < 0
        else "says nothing about the error"
    )
    lines.append(f"The final energy {says}: rank correlation {with_interval(correlation)}.")
    allocation = result["allocation"]
    lines.append(
        f"Stopping early (tolerance {show(allocation['tolerance'])}) uses {show(allocation['mean_steps'])} of {allocation['max_steps']} steps, {allocation['saved']:.0%} fewer, at a loss of "
        f"{with_interval(allocation['loss_stopped'])} against {with_interval(allocation['loss_running_on'])}; rank correlation of steps and error "
        f"{with_interval(allocation['rank_correlation_of_steps_with_error'])}."
    )
    if "uncertainty" in result:
        lines.append(
            f"Spread of energy over starts against the error: rank correlation {with_interval(result['uncertainty']['rank_correlation_of_energy_spread_with_error'])}."
        )
    if "foreign" in result:
        lines.append(
            f"Real text has the lower energy than shuffled text in {with_interval(result['foreign']['share_of_pairs_in_which_real_is_lower'])} of pairs (0.5: cannot tell)."
        )
    return lines


def _curves(axes: Axes, result: dict[str, Any], unit: str) -> str:
    for points, colour, label, style in (
        (result["steps"], LIGHT["curve3"], "every step taken", "-"),
        (result["steps_accept_only_if_lower"], LIGHT["baseline"], "accepted only if lower", "--"),
    ):
        _with_band(axes, [p["num_steps"] for p in points], points, colour, label, style)
    axes.axvline(result["trained_steps"], color=LIGHT["muted"], linewidth=0.7, linestyle=":")
    axes.set_xlabel("refinement steps"), axes.set_ylabel(unit), axes.legend(fontsize=7)
    return (
        f"Trained with {result['trained_steps']}; initial state {show(result['initial']['mean'])}."
    )


def _starts(axes: Axes, points: list[dict], unit: str) -> str:
    _with_band(
        axes, [p["num_starts"] for p in points], points, LIGHT["curve3"], "lowest energy", "-"
    )
    axes.set_xlabel("starts"), axes.set_ylabel(unit)
    return f"Mean energy {show(points[0]['mean_energy'])} with {points[0]['num_starts']}, {show(points[-1]['mean_energy'])} with {points[-1]['num_starts']}."


def _tenths(axes: Axes, points: list[dict], by: str, what: str) -> str:
    axes.plot(
        [p["by"] for p in points],
        [p["mean"] for p in points],
        color=LIGHT["curve3"],
        marker="o",
        markersize=3,
    )
    axes.set_xlabel(f"mean {by} of the tenth"), axes.set_ylabel(what)
    return f"From {show(points[0]['mean'])} in the lowest tenth to {show(points[-1]['mean'])} in the highest."


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
