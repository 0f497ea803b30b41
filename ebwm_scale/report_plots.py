"""The plots of a run report: curves of one run (and a comparison run) -> inline SVG that follows the page's colours, and one PNG.

A drawing function fills one pair of axes and returns the sentence under the plot, with the numbers in it; None means
that the run did not log what the plot needs. Figures are small on purpose: their text has to stay legible on a phone.
"""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable, Iterator

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

if TYPE_CHECKING:
    from .report_run import Run

MAX_POINTS = 300  # per curve: what a screen can show; bounds the page's size
MAX_CURVES = 6  # refinement steps drawn in one plot; the first and the last always are
RECENT = 0.1  # "at the end" means the last tenth of the logged training steps

# role -> (on a light page, on a dark page). The SVG refers to the roles as CSS variables; the PNG has the light colours.
# Order is carried by lightness and kind by dash pattern, so that no reader depends on telling hues apart.
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


def number(value: Any) -> float:
    """`value` as a float; NaN for what is no finite number (absent, null, text, infinite, absurdly large)."""
    if type(value) is not float:  # the common case first: a long run has millions of values
        try:
            value = float(value)
        except (TypeError, ValueError, OverflowError):
            return math.nan
    return (
        value if -1e30 < value < 1e30 else math.nan
    )  # larger ones overflow in averages and axis limits


def values_of(row: dict, key: str) -> list[float]:
    """A logged list as floats; a single number counts as a list of one, absent and null as none."""
    value = row.get(key)
    return (
        [number(item) for item in value]
        if isinstance(value, list)
        else []
        if value is None
        else [number(value)]
    )


def final_loss(row: dict) -> float:
    """The loss after the last refinement step."""
    return (
        number(row["loss"]) if row.get("loss") is not None else (losses_of(row) or [math.nan])[-1]
    )


def losses_of(row: dict) -> list[float]:
    """The loss after each refinement step; a single one where the row has no list."""
    return values_of(row, "loss_per_step") or values_of(row, "loss")


def median(rows: list[dict], key: str) -> float:
    """Median of the finite values; NaN without any."""
    found = [v for v in (number(row.get(key)) for row in rows) if v == v]
    return float(np.median(found)) if found else math.nan


def show(value: float) -> str:
    """A number for people: about four significant digits, thousands separated, a true minus, an exponent only where needed."""
    size = abs(value)
    if value != value:
        return "not a number"
    if size and not 1e-4 <= size < 1e7:
        text = f"{size:.2e}"
    elif size < 1:
        text = f"{size:.4g}"
    else:
        text = f"{size:,.{max(0, 3 - int(math.log10(size)))}f}"
    return "−" + text if value < 0 else text


def show_change(value: float) -> str:
    """A difference for people, always with its sign."""
    return show(value) if value < 0 else "+" + show(value)


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


# -------------------------------------------------------------------------------------------------------------- the drawings


def draw_validation(axes: Axes, run: Run, baseline: Run | None) -> str | None:
    if not run.validation:
        return None
    steps, notes, shown = [row["step"] for row in run.validation], [], []
    for curve in _curves(run.validation, losses_of):
        x, y = _thin_by_stride(curve.x, curve.y)
        label = "after step" if run.refines else run.label
        axes.plot(
            x,
            y,
            label=f"{label} {curve.index + 1}" if run.refines else label,
            **_curve_style(curve),
            **_markers(x),
        )
        shown.append(y)
    references = []
    if baseline and baseline.validation:
        x, y = _thin_by_stride(*_series(baseline.validation, final_loss))
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
    x, y = _thin_by_stride(*_series(run.validation, lambda row: number(row.get("initial_loss"))))
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
    first, last = final_loss(run.validation[0]), final_loss(run.validation[-1])
    return " ".join(
        [
            f"Loss on held-out data in {run.loss_unit}; lower is better. "
            f"It was {show(first)} at step {steps[0]:,} and is {show(last)} at step {steps[-1]:,}.",
            *notes,
        ]
    )


def draw_profile(axes: Axes, run: Run, baseline: Run | None) -> str | None:
    if not run.validation or not run.refines:
        return None
    row = run.validation[-1]
    losses = losses_of(row)
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
    for curve in _curves(run.training, losses_of):
        x, mean, low, high = thin(curve.x, curve.y)
        if curve.last and len(curve.x) > MAX_POINTS:
            axes.fill_between(x, low, high, color=LIGHT["curve5"], alpha=0.15, linewidth=0)
        axes.plot(
            x,
            mean,
            label=f"after step {curve.index + 1}" if run.refines else run.label,
            **_curve_style(curve),
            **_markers(x, few=8),
        )
        shown.append(mean)
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
    broken = sum(any(v != v for v in losses_of(row)) for row in run.training)
    notes += (
        [f"{broken:,} logged steps have a loss that is not finite and are left out."]
        if broken
        else []
    )
    return " ".join([f"Loss on the training batches, {len(run.training):,} logged steps.", *notes])


def draw_energy(axes: Axes, run: Run, baseline: Run | None) -> str | None:
    curves = list(_curves(run.training, lambda row: values_of(row, "energy_per_step")))
    for curve in curves:
        x, mean, *_ = thin(curve.x, curve.y)
        axes.plot(
            x,
            mean,
            label=f"before step {curve.index + 1}",
            **_curve_style(curve),
            **_markers(x, few=8),
        )
    if not curves:
        return None
    _limit(axes, [np.concatenate([line.get_ydata() for line in axes.get_lines()])], [], both=True)
    _label_axes(axes, "mean energy")
    _legend(axes)
    at_end = [float(end.mean()) for curve in curves if len(end := _finite_end(curve.y))]
    if len(at_end) < 2:
        return (
            "Mean energy of the states before each update; lower means a better fit to the context."
        )
    if run.setting("refinement", "landscapes") == "per_step" and run.setting(
        "model", "conditioning"
    ) not in (None, "default"):
        return (
            f"Mean energy of the states before each update; at the end {show(at_end[0])} before the first and "
            f"{show(at_end[-1])} before the last. Each step has a landscape of its own here, so their levels do not compare."
        )
    verb = "falls" if at_end[-1] < at_end[0] else "does not fall"
    return (
        f"Mean energy of the states before each update. At the end of training it {verb} along the refinement: "
        f"{show(at_end[0])} before the first step, {show(at_end[-1])} before the last."
    )


def draw_step_size(axes: Axes, run: Run, baseline: Run | None) -> str | None:
    x, y = _series(run.training, lambda row: number(row.get("step_size")))
    if not np.isfinite(y).any():
        return None
    _single(axes, x, y, "step size α")
    finite = y[np.isfinite(y)]
    learned = {True: "learned", False: "fixed"}.get(
        run.setting("refinement", "learnable"), "logged"
    )
    return f"How far one refinement step moves down the energy gradient ({learned}): from {show(finite[0])} to {show(finite[-1])}."


def draw_gradient_norm(axes: Axes, run: Run, baseline: Run | None) -> str | None:
    x, y = _series(run.training, lambda row: number(row.get("grad_norm")))
    broken = int((~np.isfinite(y)).sum())
    y[~(y > 0)] = np.nan
    if not np.isfinite(y).any():
        return None
    axes.set_yscale("log")
    _single(axes, x, y, "gradient norm, log scale")
    clipping = number(run.setting("optimizer", "gradient_clipping"))
    text = f"Before clipping; median {show(float(np.nanmedian(y)))}, largest {show(float(np.nanmax(y)))}."
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
        text += f" Clipped in {np.mean(y[np.isfinite(y)] > clipping):.0%} of the logged steps."
    few_decades = np.ptp(np.log10(axes.get_ylim())) < 2.5
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few_decades else (1,)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return text + (f" {broken:,} values are missing or not finite." if broken else "")


def draw_learning_rate(axes: Axes, run: Run, baseline: Run | None) -> str | None:
    x, y = _series(run.training, lambda row: number(row.get("learning_rate")))
    if not np.isfinite(y).any():
        return None
    _single(axes, x, y, "learning rate")
    axes.set_ylim(bottom=0)
    return f"Peak {np.nanmax(y):.3g}, at the last logged step {y[np.isfinite(y)][-1]:.3g}."


def draw_throughput(axes: Axes, run: Run, baseline: Run | None) -> str | None:
    key = next(
        (
            k
            for k in ("tokens_per_s", "frames_per_s")
            if any(row.get(k) is not None for row in run.training)
        ),
        None,
    )
    if key is None:
        return None
    unit = key.removesuffix("_per_s")
    x, y = _series(run.training, lambda row: number(row.get(key)))
    if not np.isfinite(y).any():
        return None
    _single(axes, x, y, f"{unit} per second")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    text = f"Median {show(float(np.nanmedian(y)))} {unit} per second"
    seconds = median(run.training, "step_time_s")
    return text + (f", {show(seconds)} seconds per step." if seconds == seconds else ".")


# ------------------------------------------------------------------------------------------------------------------- series


@dataclass(frozen=True)
class _Curve:
    index: int  # refinement step, counted from 0
    x: np.ndarray  # training steps that have this refinement step
    y: np.ndarray  # NaN where the logged value is not finite
    shade: int  # 0..5, rising with the refinement step
    last: bool


def _curves(rows: list[dict], values: Callable[[dict], list[float]]) -> Iterator[_Curve]:
    """One curve per refinement step. Rows may have different numbers of steps: a curve has only the rows that reach it."""
    steps, lists = np.array([row["step"] for row in rows], float), [values(row) for row in rows]
    lengths = np.array([len(v) for v in lists])
    count = lengths.max(initial=0)
    chosen = sorted({round(i) for i in np.linspace(0, count - 1, min(count, MAX_CURVES))})
    for index in chosen:
        y = np.array([v[index] for v in lists if len(v) > index])
        if np.isfinite(y).any():
            shade = 5 if count == 1 else round(5 * index / (count - 1))
            yield _Curve(index, steps[lengths > index], y, shade, index == count - 1)


def _series(rows: list[dict], value: Callable[[dict], float]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([row["step"] for row in rows], float), np.array(
        [value(row) for row in rows], float
    )


def _finite_end(y: np.ndarray) -> np.ndarray:
    end = y[-max(1, round(len(y) * RECENT)) :]
    return end[np.isfinite(end)]


def thin(
    x: np.ndarray, y: np.ndarray, limit: int = MAX_POINTS
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(x, mean, lowest, highest) of at most `limit` bins of neighbouring points; bins without a finite value are NaN."""
    if len(x) <= limit:
        return x, y, y, y
    bins = []
    for xs, ys in zip(np.array_split(x, limit), np.array_split(y, limit)):
        ys = ys[np.isfinite(ys)]
        bins.append(
            (xs.mean(), ys.mean(), ys.min(), ys.max())
            if len(ys)
            else (xs.mean(), np.nan, np.nan, np.nan)
        )
    return tuple(np.array(bins).T)


def _thin_by_stride(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every n-th point and the last one: validation points are exact, so they are chosen and not averaged."""
    keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), MAX_POINTS)).round().astype(int))
    return x[keep], y[keep]


# ------------------------------------------------------------------------------------------------------------------ figures


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
    """An SVG document as part of an HTML page: ids of its own, the page's colours and font, no reference to anything outside."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.S)
    view_box = re.search(r'viewBox="[^"]*"', svg).group()
    escaped = alt.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
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


def _curve_style(curve: _Curve) -> dict[str, Any]:
    return {
        "color": LIGHT[f"curve{curve.shade}"],
        "linewidth": 2.0 if curve.last else 1.3,
        "zorder": 3 if curve.last else 2.5,
    }


def _markers(x: np.ndarray, marker: str = "o", few: int = 40) -> dict[str, Any]:
    """Points are marked while they are few: one row alone is no line."""
    return {"marker": marker, "markersize": 3.2} if len(x) <= few else {}


def _single(axes: Axes, x: np.ndarray, y: np.ndarray, label: str) -> None:
    points, mean, low, high = thin(x, y)
    if len(x) > MAX_POINTS:
        axes.fill_between(points, low, high, color=LIGHT["curve3"], alpha=0.18, linewidth=0)
    axes.plot(points, mean, color=LIGHT["curve3"], **_markers(points, few=8))
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
    """Keep a few huge values (a first loss of 1e4 is normal with a large step size) from flattening everything else; say so."""
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
