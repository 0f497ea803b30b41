"""The plots of a run report: curves of one run (and a comparison run) -> inline SVG that follows
the page's colours (svg.py), and one PNG.

A drawing function fills one pair of axes and returns the sentence under the plot, with the numbers
in it; None means that the run did not log what the plot needs. Figures are small on purpose: their
text has to stay legible on a phone.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ebwm_scale.reporting.axes import (
    chosen_steps,
    curve_style,
    label_axes,
    legend,
    limit_range,
    log_scale,
    markers,
)
from ebwm_scale.reporting.curves import Curve, number, of_refinement_step, series, thin_by_stride
from ebwm_scale.reporting.facts import UNITS
from ebwm_scale.reporting.norm_plots import norm_plots
from ebwm_scale.reporting.numbers import show, show_change
from ebwm_scale.reporting.run_data import SPIKE
from ebwm_scale.reporting.style import LIGHT, NARROW, STYLE, TALL, WIDE
from ebwm_scale.reporting.svg import figure_as_svg

if TYPE_CHECKING:
    from ebwm_scale.reporting.run_data import Run

RECENT = 0.1  # "at the end" means the last tenth of the logged training steps

Draw = Callable[[Axes, "Run", "Run | None"], "str | None"]


@dataclass(frozen=True)
class Plot:
    title: str
    caption: str
    svg: Markup | None  # None: nothing to draw, the caption says why
    narrow_svg: Markup | None = None  # a second shape of the same plot, for phones


def report_plots(run: Run, baseline: Run | None) -> tuple[Plot, list[Plot]]:
    """The headline plot, and the others in the order of the page."""
    headline = _plot("headline", "Validation loss", draw_validation, run, baseline, WIDE)
    tall = _plot("headline-narrow", "Validation loss", draw_validation, run, baseline, TALL)
    headline = Plot(headline.title, headline.caption, headline.svg, tall.svg)
    others = [
        ("profile", "What each refinement step does", draw_profile),
        ("training-loss", "Training loss", draw_training_loss),
        ("energy", "Energy before each refinement step", draw_energy),
        ("step-size", "Step size of the refinement", draw_step_size),
        *_curvature_plot(run),
        ("gradient-norm", "Gradient norm", draw_gradient_norm),
        *norm_plots(run),
        ("learning-rate", "Learning rate", draw_learning_rate),
        ("throughput", "Throughput", draw_throughput),
    ]
    return headline, [
        _plot(name, title, draw, run, baseline, NARROW) for name, title, draw in others
    ]


def headline_png(run: Run, baseline: Run | None) -> bytes:
    """The headline plot on white, for places that show no SVG."""
    with matplotlib.rc_context(STYLE):
        figure, _ = _draw(draw_validation, run, baseline, WIDE)
        if not run.validation:
            figure.text(0.5, 0.5, _why_empty("headline", run), ha="center", backgroundcolor="white")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    return buffer.getvalue()


def draw_validation(axes: Axes, run: Run, baseline: Run | None) -> str | None:
    if not run.validation:
        return None
    steps = [row["step"] for row in run.validation]
    notes = []
    shown = []
    count = max(len(row["loss_per_step"]) for row in run.validation)
    for index in chosen_steps(count):
        x, y = thin_by_stride(*of_refinement_step(run.validation, index))
        if not np.isfinite(y).any():
            continue
        label = run.curve_label(index, count)
        axes.plot(x, y, label=label, **curve_style(index, count), **markers(x))
        shown.append(y)
    references = []
    if baseline and baseline.validation:
        x, y = thin_by_stride(*series(baseline.validation, "loss"))
        axes.plot(
            x,
            y,
            color=LIGHT["baseline"],
            linestyle=(0, (5, 1.5)),
            label=baseline.label,
            **markers(x, "s"),
        )
        references.append(y[x <= 1.25 * steps[-1]] if steps[-1] else y)
        if x[-1] > 1.25 * steps[-1] > 0:
            axes.set_xlim(right=1.25 * steps[-1])
            notes.append(f"The curve of {baseline.label} goes on to step {x[-1]:,.0f}.")
    reference = run.reference_loss
    if reference == reference:
        axes.axhline(
            reference,
            color=LIGHT["unigram"],
            linestyle=(0, (1, 1.4)),
            linewidth=1.8,
            label=run.reference_name,
        )
        references.append(np.array([reference]))
    notes += limit_range(axes, shown, references)
    x, y = thin_by_stride(*series(run.validation, "initial_loss"))
    finite = y[np.isfinite(y)]
    if len(finite):
        low, high = axes.get_ylim()
        # a far start would press everything else into one line
        if finite.max() < high + 2 * (high - low):
            axes.plot(
                x,
                y,
                color=LIGHT["initial"],
                linestyle=(0, (4, 1.5, 1, 1.5)),
                linewidth=1.2,
                label="initial state",
            )
            axes.set_ylim(low, max(high, finite.max() + 0.04 * (high - low)))
        else:
            notes.append(f"The initial state is off the scale, at {show(finite[-1])}.")
    label_axes(axes, run.loss_unit)
    legend(axes)
    first, last = run.validation[0]["loss"], run.validation[-1]["loss"]
    sentence = (
        f"Loss on held-out data in {run.loss_unit}; lower is better. "
        f"It was {show(first)} at step {steps[0]:,} and is {show(last)} at step {steps[-1]:,}."
    )
    return " ".join([sentence, *notes])


def draw_profile(axes: Axes, run: Run, baseline: Run | None) -> str | None:
    if not run.validation or not run.refines:
        return None
    row = run.validation[-1]
    losses = row["loss_per_step"]
    initial = number(row.get("initial_loss"))
    y = np.array([initial, *losses])
    finite = np.isfinite(y)
    if not finite[1:].any():
        return None
    draw = finite.copy()
    note = ""
    spread = np.ptp(y[1:][finite[1:]]) + 0.5 * y[1:][finite[1:]].mean()
    if finite[0] and initial > y[1:][finite[1:]].max() + 4 * spread:
        draw[0] = False  # as above: the changes between the steps are what the plot is for
        note = f" The initial state is off the scale, at {show(initial)}."
    x = np.arange(len(y))
    axes.plot(x[draw], y[draw], color=LIGHT["curve3"], marker="o", markersize=5)
    if len(losses) <= 8:
        for position in x[draw]:
            axes.annotate(
                show(float(y[position])),
                (position, y[position]),
                xytext=(3, 6),
                textcoords="offset points",
                fontsize=8,
            )
    axes.margins(x=0.12, y=0.2)
    axes.xaxis.set_major_locator(MaxNLocator(min(8, len(losses) + 1), integer=True))
    axes.set_xlabel("refinement steps taken (0: random start)")
    axes.set_ylabel(run.loss_unit)
    changes = enumerate(np.diff([initial, *losses]), start=1)
    steps = [
        f"step {i} changes it by {show_change(change)}"
        for i, change in changes
        if np.isfinite(change)
    ]
    listed = "; ".join(steps if len(steps) <= 4 else [*steps[:2], "…", steps[-1]])
    return f"Validation loss along the refinement at training step {row['step']:,}: {listed}.{note}"


def draw_training_loss(axes: Axes, run: Run, baseline: Run | None) -> str | None:
    shown, notes = [], []
    curves = run.training.of_list("loss_per_step")
    for index in chosen_steps(len(curves)):
        curve = curves[index]
        if not curve.num_finite:
            continue
        x = curve.x
        if index == len(curves) - 1 and run.training.thinned:
            axes.fill_between(
                x, curve.low, curve.high, color=LIGHT["curve5"], alpha=0.15, linewidth=0
            )
        label = run.curve_label(index, len(curves))
        style = curve_style(index, len(curves))
        axes.plot(x, curve.mean, label=label, **style, **markers(x, few=8))
        shown.append(curve.mean)
    if not shown:
        return None
    reference = run.reference_loss
    references = [np.array([reference])] if reference == reference else []
    notes += limit_range(axes, shown, references)
    if references:
        axes.axhline(
            reference,
            color=LIGHT["unigram"],
            linestyle=(0, (1, 1.4)),
            label=run.reference_name,
        )
    notes += _draw_spikes(axes, run)
    label_axes(axes, run.loss_unit)
    legend(axes)
    broken = run.training.num_broken
    if broken:
        notes.append(f"{broken:,} logged steps have a loss that is not finite and are left out.")
    sentence = f"Loss on the training batches, {run.training.num_rows:,} logged steps."
    return " ".join([sentence, *notes])


def _draw_spikes(axes: Axes, run: Run) -> list[str]:
    """Where the loss spiked, with the steps that were undone; what there is to say of it."""
    spikes = [row for row in run.events.newest if row.get("event") == SPIKE]
    if not spikes:
        return []
    went_back = 0
    for index, spike in enumerate(spikes):
        step = number(spike.get("step"))
        if step != step:
            continue
        label = "a spike, and the steps undone" if index == 0 else None
        axes.axvline(step, color=LIGHT["unigram"], linewidth=0.8, alpha=0.6, label=label)
        went_back += spike.get("back_to") is not None
        undone = spike.get("undone")
        pairs = [p for p in undone if isinstance(p, list) and len(p) == 2] if undone else []
        points = np.array([[number(x), number(y)] for x, y in pairs]).reshape(-1, 2)
        axes.plot(points[:, 0], points[:, 1], color=LIGHT["unigram"], linewidth=0.8, alpha=0.6)
    times = "once" if went_back == 1 else f"{went_back} times"
    spiked = "once" if len(spikes) == 1 else f"{len(spikes)} times"
    return [f"The loss spiked {spiked}; the run went back {times}."]


def draw_energy(axes: Axes, run: Run, baseline: Run | None) -> str | None:
    curves = run.training.of_list("energy_per_step")
    at_end = []
    for index in chosen_steps(len(curves)):
        curve = curves[index]
        if not curve.num_finite:
            continue
        x, style = curve.x, curve_style(index, len(curves))
        label = f"before step {index + 1}"
        axes.plot(x, curve.mean, label=label, **style, **markers(x, few=8))
        end = curve.mean_at_end(RECENT)
        if end == end:
            at_end.append(end)
    if not axes.get_lines():
        return None
    limit_range(
        axes, [np.concatenate([line.get_ydata() for line in axes.get_lines()])], [], both=True
    )
    label_axes(axes, "mean energy")
    legend(axes)
    if len(at_end) < 2:
        return (
            "Mean energy of the states before each update; lower means a better fit to the context."
        )
    conditioned = run.setting("model", "conditioning") not in (None, "default")
    if run.setting("refinement", "landscapes") == "per_step" and conditioned:
        return (
            f"Mean energy of the states before each update; at the end {show(at_end[0])} before "
            "the first and "
            f"{show(at_end[-1])} before the last. Each step has a landscape of its own here, so "
            "their levels do not compare."
        )
    verb = "falls" if at_end[-1] < at_end[0] else "does not fall"
    return (
        f"Mean energy of the states before each update. At the end of training it {verb} along "
        "the refinement: "
        f"{show(at_end[0])} before the first step, {show(at_end[-1])} before the last."
    )


def draw_step_size(axes: Axes, run: Run, baseline: Run | None) -> str | None:
    curve = _curve(run, "step_size")
    if curve is None:
        return None
    _single(axes, run, curve, "step size α")
    learnable = run.setting("refinement", "learnable")
    learned = "logged"
    if isinstance(learnable, bool):
        learned = "learned" if learnable else "fixed"
    return (
        f"How far one refinement step moves down the energy gradient ({learned}): from "
        f"{show(curve.first)} to {show(curve.last)}."
    )


def _curvature_plot(run: Run) -> list[tuple[str, str, Draw]]:
    """The plot of what evaluation.curvature_samples measured; nothing where it was off."""
    if not any(row.get("alpha_curvature") for row in run.validation):
        return []
    return [("curvature", "Step size times the energy's largest curvature", draw_curvature)]


def draw_curvature(axes: Axes, run: Run, baseline: Run | None) -> str | None:
    rows = [row for row in run.validation if row.get("alpha_curvature")]
    count = max(len(row["alpha_curvature"]) for row in rows)
    x = np.array([row["step"] for row in rows])
    for index in chosen_steps(count):
        lists = [row["alpha_curvature"] for row in rows]
        y = np.array([values[index] if index < len(values) else np.nan for values in lists])
        style = curve_style(index, count)
        axes.plot(x, y, label=f"before step {index + 1}", **style, **markers(x, few=8))
    axes.axhline(2, color=LIGHT["baseline"], linestyle=(0, (5, 1.5)), label="2: steps overshoot")
    label_axes(axes, "α times curvature")
    legend(axes)
    shares = [value for value in rows[-1].get("share_overshoot", []) if value == value]
    if not shares:
        return "Above 2 a refinement step ends further from the minimum than it began."
    return (
        "Above 2 a refinement step ends further from the minimum than it began. At the last "
        f"validation {max(shares):.0%} of the positions are above 2 in front of some step."
    )


def draw_gradient_norm(axes: Axes, run: Run, baseline: Run | None) -> str | None:
    curve = _curve(run, "grad_norm")
    if curve is None or not curve.highest > 0:
        return None
    broken = run.training.num_rows - curve.num_finite
    axes.set_yscale("log", nonpositive="mask")
    _single(axes, run, curve, "gradient norm, log scale")
    clipping = number(run.setting("optimizer", "gradient_clipping"))
    text = f"Before clipping; median {show(curve.median)}, largest {show(curve.highest)}."
    if clipping > 0:
        low, high = axes.get_ylim()
        axes.axhline(
            clipping,
            color=LIGHT["baseline"],
            linestyle=(0, (5, 1.5)),
            linewidth=1.2,
            label=f"clipped above {clipping:g}",
        )
        axes.set_ylim(min(low, clipping * 0.9), max(high, clipping * 1.1))
        legend(axes)
        text += f" Clipped in {curve.share_above(clipping):.0%} of the logged steps."
    log_scale(axes)
    return text + (f" {broken:,} values are missing or not finite." if broken else "")


def draw_learning_rate(axes: Axes, run: Run, baseline: Run | None) -> str | None:
    curve = _curve(run, "learning_rate")
    if curve is None:
        return None
    _single(axes, run, curve, "learning rate")
    axes.set_ylim(bottom=0)
    return f"Peak {curve.highest:.3g}, at the last logged step {curve.last:.3g}."


def draw_throughput(axes: Axes, run: Run, baseline: Run | None) -> str | None:
    known = {unit: _curve(run, f"{unit}_per_s") for unit in UNITS}
    unit = next((unit for unit, curve in known.items() if curve is not None), UNITS[0])
    curve = known[unit]
    if curve is None:
        return None
    _single(axes, run, curve, f"{unit} per second")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    text = f"Median {show(curve.median)} {unit} per second"
    seconds = run.training.median("step_time_s")
    return text + (f", {show(seconds)} seconds per step." if seconds == seconds else ".")


def _plot(
    name: str, title: str, draw: Draw, run: Run, baseline: Run | None, size: tuple[float, float]
) -> Plot:
    with matplotlib.rc_context(STYLE):
        figure, caption = _draw(draw, run, baseline, size)
        if caption is None:
            return Plot(title, _why_empty(name, run), None)
        svg = figure_as_svg(figure, name, f"{title}. {caption}")
    return Plot(title, caption, svg)


def _draw(
    draw: Draw, run: Run, baseline: Run | None, size: tuple[float, float]
) -> tuple[Figure, str | None]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, draw(figure.add_subplot(), run, baseline)


def _why_empty(name: str, run: Run) -> str:
    if not run.refines and name in ("profile", "energy", "step-size"):
        return f"{run.label} predicts in one go: there is nothing to refine."
    what = "finite value for this plot"
    if name.startswith(("headline", "profile")):
        what = "validation row"
    return f"metrics.jsonl has no {what} yet."


def _curve(run: Run, name: str) -> Curve | None:
    """The training's curve of a number; None if it has no finite value."""
    curve = run.training.curves.get(name)
    return curve if curve is not None and curve.num_finite else None


def _single(axes: Axes, run: Run, curve: Curve, label: str) -> None:
    x = curve.x
    if run.training.thinned:
        axes.fill_between(x, curve.low, curve.high, color=LIGHT["curve3"], alpha=0.18, linewidth=0)
    axes.plot(x, curve.mean, color=LIGHT["curve3"], **markers(x, few=8))
    label_axes(axes, label)
