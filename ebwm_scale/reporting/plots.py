"""The plots of a run report: curves of one run (and a comparison run) -> inline SVG that follows
the page's colours, and one PNG.

A drawing function fills one pair of axes and returns the sentence under the plot, with the numbers
in it; None means that the run did not log what the plot needs. Figures are small on purpose: their
text has to stay legible on a phone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ebwm_scale.reporting.curves import Curve, number, of_refinement_step, series, thin_by_stride

if TYPE_CHECKING:
    from ebwm_scale.reporting.run_data import Run
from ebwm_scale.reporting.numbers import show, show_change

MAX_CURVES = 6  # refinement steps drawn in one plot; the first and the last always are
RECENT = 0.1  # "at the end" means the last tenth of the logged training steps

# role -> (on a light page, on a dark page). The SVG refers to the roles as CSS variables; the PNG
# has the light colours. Order is carried by lightness and kind by dash pattern, so that no reader
# depends on telling hues apart.
PALETTE: dict[str, tuple[str, str]] = {
    "ink": ("#1c2128", "#e7eaef"),
    "muted": ("#59636f", "#a3adba"),
    "grid": ("#e0e4e9", "#303843"),
    "unigram": ("#4d5562", "#b9c2ce"),
    "initial": ("#9b3f87", "#e79fd6"),
    "baseline": ("#c24e08", "#ffa264"),
    "curve0": ("#559fd5", "#3f7fb5"),
    "curve1": ("#3c87c1", "#5795c9"),
    "curve2": ("#296fab", "#72abd9"),
    "curve3": ("#1b5993", "#90c1e8"),
    "curve4": ("#0e4379", "#b0d6f4"),
    "curve5": ("#072e5f", "#d3eaff"),
}
LIGHT = {role: colours[0] for role, colours in PALETTE.items()}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.edgecolor": LIGHT["muted"],
    "axes.labelcolor": LIGHT["muted"],
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.7,
    "axes.linewidth": 0.7,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "legend.columnspacing": 1.4,
    "legend.borderaxespad": 0.0,
    "lines.solid_capstyle": "round",
    "lines.linewidth": 1.5,
}
NARROW, WIDE, TALL = (3.9, 2.6), (8.2, 4.1), (3.9, 3.9)  # inches
Draw = Callable[[Axes, "Run", "Run | None"], "str | None"]


@dataclass(frozen=True)
class Plot:
    title: str
    caption: str
    svg: str | None  # None: nothing to draw, the caption says why
    narrow_svg: str | None = None  # a second shape of the same plot, for phones


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
        ("gradient-norm", "Gradient norm", draw_gradient_norm),
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
    steps, notes, shown = [row["step"] for row in run.validation], [], []
    count = max(len(row["loss_per_step"]) for row in run.validation)
    for index in _chosen(count):
        x, y = thin_by_stride(*of_refinement_step(run.validation, index))
        if not np.isfinite(y).any():
            continue
        label = f"after step {index + 1}" if run.refines else run.label
        axes.plot(x, y, label=label, **_curve_style(index, count), **_markers(x))
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
            **_markers(x, "s"),
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
    notes += _limit(axes, shown, references)
    x, y = thin_by_stride(*series(run.validation, "initial_loss"))
    finite = y[np.isfinite(y)]
    if len(finite):
        low, high = axes.get_ylim()
        if finite.max() < high + 2 * (
            high - low
        ):  # a far start would press everything else into one line
            axes.plot(
                x,
                y,
                color=LIGHT["initial"],
                linestyle=(0, (4, 1.5, 1, 1.5)),
                linewidth=1.2,
                label="initial random state",
            )
            axes.set_ylim(low, max(high, finite.max() + 0.04 * (high - low)))
        else:
            notes.append(f"The initial random state is off the scale, at {show(finite[-1])}.")
    _label_axes(axes, run.loss_unit)
    _legend(axes)
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
                show(y[position]),
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
    for index in _chosen(len(curves)):
        curve = curves[index]
        if not curve.num_finite:
            continue
        x = curve.x
        if index == len(curves) - 1 and run.training.thinned:
            axes.fill_between(
                x, curve.low, curve.high, color=LIGHT["curve5"], alpha=0.15, linewidth=0
            )
        label = f"after step {index + 1}" if run.refines else run.label
        style = _curve_style(index, len(curves))
        axes.plot(x, curve.mean, label=label, **style, **_markers(x, few=8))
        shown.append(curve.mean)
    if not shown:
        return None
    notes += _limit(
        axes,
        shown,
        [np.array([run.reference_loss])] if run.reference_loss == run.reference_loss else [],
    )
    if run.reference_loss == run.reference_loss:
        axes.axhline(
            run.reference_loss,
            color=LIGHT["unigram"],
            linestyle=(0, (1, 1.4)),
            label=run.reference_name,
        )
    _label_axes(axes, run.loss_unit)
    _legend(axes)
    broken = run.training.num_broken
    notes += (
        [f"{broken:,} logged steps have a loss that is not finite and are left out."]
        if broken
        else []
    )
    return " ".join(
        [f"Loss on the training batches, {run.training.num_rows:,} logged steps.", *notes]
    )


def draw_energy(axes: Axes, run: Run, baseline: Run | None) -> str | None:
    curves = run.training.of_list("energy_per_step")
    at_end = []
    for index in _chosen(len(curves)):
        curve = curves[index]
        if not curve.num_finite:
            continue
        x, style = curve.x, _curve_style(index, len(curves))
        label = f"before step {index + 1}"
        axes.plot(x, curve.mean, label=label, **style, **_markers(x, few=8))
        end = curve.mean_at_end(RECENT)
        at_end += [end] if end == end else []
    if not axes.get_lines():
        return None
    _limit(axes, [np.concatenate([line.get_ydata() for line in axes.get_lines()])], [], both=True)
    _label_axes(axes, "mean energy")
    _legend(axes)
    if len(at_end) < 2:
        return (
            "Mean energy of the states before each update; lower means a better fit to the context."
        )
    if run.setting("refinement", "landscapes") == "per_step" and run.setting(
        "model", "conditioning"
    ) not in (None, "default"):
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
    learned = {True: "learned", False: "fixed"}.get(
        run.setting("refinement", "learnable"), "logged"
    )
    return (
        f"How far one refinement step moves down the energy gradient ({learned}): from "
        f"{show(curve.first)} to {show(curve.last)}."
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
        _legend(axes)
        text += f" Clipped in {curve.share_above(clipping):.0%} of the logged steps."
    few_decades = np.ptp(np.log10(axes.get_ylim())) < 2.5
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few_decades else (1,)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return text + (f" {broken:,} values are missing or not finite." if broken else "")


def draw_learning_rate(axes: Axes, run: Run, baseline: Run | None) -> str | None:
    curve = _curve(run, "learning_rate")
    if curve is None:
        return None
    _single(axes, run, curve, "learning rate")
    axes.set_ylim(bottom=0)
    return f"Peak {curve.highest:.3g}, at the last logged step {curve.last:.3g}."


def draw_throughput(axes: Axes, run: Run, baseline: Run | None) -> str | None:
    found = [unit for unit in ("tokens", "frames") if _curve(run, f"{unit}_per_s") is not None]
    if not found:
        return None
    unit = found[0]
    curve = _curve(run, f"{unit}_per_s")
    _single(axes, run, curve, f"{unit} per second")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    text = f"Median {show(curve.median)} {unit} per second"
    seconds = run.training.median("step_time_s")
    return text + (f", {show(seconds)} seconds per step." if seconds == seconds else ".")


def _chosen(count: int) -> list[int]:
    """Refinement steps to draw, of `count`: the first, the last, and some between."""
    if count == 0:
        return []
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, MAX_CURVES))})


def _curve_style(index: int, count: int) -> dict[str, Any]:
    """Of the curve of one refinement step of `count`: darker with the step, the last one drawn
    thick.
    """
    shade = 5 if count == 1 else round(5 * index / (count - 1))
    is_last = index == count - 1
    return {
        "color": LIGHT[f"curve{shade}"],
        "linewidth": 2.0 if is_last else 1.3,
        "zorder": 3 if is_last else 2.5,
    }


def _plot(
    name: str, title: str, draw: Draw, run: Run, baseline: Run | None, size: tuple[float, float]
) -> Plot:
    with matplotlib.rc_context(STYLE):
        figure, caption = _draw(draw, run, baseline, size)
        if caption is None:
            return Plot(title, _why_empty(name, run), None)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg")
    return Plot(title, caption, inline_svg(buffer.getvalue(), name, f"{title}. {caption}"))


def _draw(
    draw: Draw, run: Run, baseline: Run | None, size: tuple[float, float]
) -> tuple[Figure, str | None]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, draw(figure.add_subplot(), run, baseline)


def _why_empty(name: str, run: Run) -> str:
    if not run.refines and name in ("profile", "energy", "step-size"):
        return f"{run.label} predicts in one go: there is nothing to refine."
    what = (
        "validation row"
        if name.startswith(("headline", "profile"))
        else "finite value for this plot"
    )
    return f"metrics.jsonl has no {what} yet."


def inline_svg(svg: str, name: str, alt: str) -> str:
    """An SVG document as part of an HTML page: ids of its own, the page's colours and font, no
    reference to anything outside.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.S)
    view_box = re.search(r'viewBox="[^"]*"', svg).group()
    escaped = escape(alt, quote=True)
    svg = re.sub(
        r"<svg[^>]*>", lambda _: f'<svg {view_box} role="img" aria-label="{escaped}">', svg, count=1
    )
    body_at = svg.index(">") + 1
    head, body = svg[:body_at], svg[body_at:]
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", body)
    body = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', body)
    body = re.sub(r"(font: [^;\"]*?[\d.]+px) [^;\"]+", r"\1 system-ui, sans-serif", body)
    for role, colour in LIGHT.items():
        body = body.replace(colour, f"var(--{role})")
    return head + re.sub(r"\n\s*", "\n", body)


def _markers(x: np.ndarray, marker: str = "o", few: int = 40) -> dict[str, Any]:
    """Points are marked while they are few: one row alone is no line."""
    return {"marker": marker, "markersize": 3.2} if len(x) <= few else {}


def _curve(run: Run, name: str) -> Curve | None:
    """The training's curve of a number; None if it has no finite value."""
    curve = run.training.curves.get(name)
    return curve if curve is not None and curve.num_finite else None


def _single(axes: Axes, run: Run, curve: Curve, label: str) -> None:
    x = curve.x
    if run.training.thinned:
        axes.fill_between(x, curve.low, curve.high, color=LIGHT["curve3"], alpha=0.18, linewidth=0)
    axes.plot(x, curve.mean, color=LIGHT["curve3"], **_markers(x, few=8))
    _label_axes(axes, label)


def _label_axes(axes: Axes, label: str) -> None:
    axes.set_xlabel("training step")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _legend(axes: Axes) -> None:
    figure = axes.get_figure()
    wide = figure.get_figwidth() > 6
    figure.legend(loc="outside upper left", ncols=4 if wide else 2, fontsize=8.5 if wide else 8)


def _limit(
    axes: Axes, shown: list[np.ndarray], references: list[np.ndarray], *, both: bool = False
) -> list[str]:
    """Keep a few huge values (a first loss of 1e4 is normal with a large step size) from flattening
    everything else; say so.
    """
    values = np.concatenate(shown) if shown else np.array([])
    values = values[np.isfinite(values)]
    fixed = np.concatenate(references) if references else np.array([])
    fixed = fixed[np.isfinite(fixed)]
    if not len(values):
        return []
    low = min(np.quantile(values, 0.02) if both else values.min(), *fixed, np.inf)
    high = max(np.quantile(values, 0.94), *fixed, -np.inf)
    spread = (high - low) or abs(high) or 1.0
    top, bottom = max(values.max(), high), min(values.min(), low)
    cut_top, cut_bottom = top > high + 1.5 * spread, both and bottom < low - 1.5 * spread
    axes.set_ylim(
        (low - 0.3 * spread) if cut_bottom else bottom - 0.05 * spread,
        (high + 0.3 * spread) if cut_top else top + 0.05 * spread,
    )
    return [f"Values up to {show(top)} are cut off at the top."] if cut_top else []
