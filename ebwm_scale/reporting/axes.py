"""What the plots of a report share: which refinement steps are drawn, axes, legend and range."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ebwm_scale.reporting.numbers import show
from ebwm_scale.reporting.style import LIGHT

MAX_CURVES = 6  # refinement steps drawn in one plot; the first and the last always are


def chosen_steps(count: int) -> list[int]:
    """Refinement steps to draw, of `count`: the first, the last, and some between."""
    if count == 0:
        return []
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, MAX_CURVES))})


def curve_style(index: int, count: int) -> dict[str, Any]:
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


def markers(x: np.ndarray, marker: str = "o", few: int = 40) -> dict[str, Any]:
    """Points are marked while they are few: one row alone is no line."""
    return {"marker": marker, "markersize": 3.2} if len(x) <= few else {}


def label_axes(axes: Axes, label: str) -> None:
    axes.set_xlabel("training step")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def log_scale(axes: Axes) -> None:
    """Of what is above 0; with more marks where it spans few decades."""
    axes.set_yscale("log", nonpositive="mask")
    few_decades = np.ptp(np.log10(axes.get_ylim())) < 2.5
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few_decades else (1,)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def legend(axes: Axes) -> None:
    figure = axes.figure.get_figure(root=True)
    wide = figure.get_figwidth() > 6
    figure.legend(loc="outside upper left", ncols=4 if wide else 2, fontsize=8.5 if wide else 8)


def limit_range(
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
    usual_low = np.quantile(values, 0.02) if both else values.min()
    low = float(min(usual_low, *fixed, np.inf))
    high = float(max(np.quantile(values, 0.94), *fixed, -np.inf))
    spread = (high - low) or abs(high) or 1.0
    top = max(float(values.max()), high)
    bottom = min(float(values.min()), low)
    cut_top, cut_bottom = top > high + 1.5 * spread, both and bottom < low - 1.5 * spread
    axes.set_ylim(
        (low - 0.3 * spread) if cut_bottom else bottom - 0.05 * spread,
        (high + 0.3 * spread) if cut_top else top + 0.05 * spread,
    )
    return [f"Values up to {show(top)} are cut off at the top."] if cut_top else []
