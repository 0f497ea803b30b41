"""Small line charts for pages that hold many: numbers for the macro `chart` of parts.html.j2.

matplotlib takes a tenth of a second and ten thousand characters for a plot, these a thousandth of
that time. Colour never tells curves apart alone: each has its own dashes, and its name in a legend.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ebwm_scale.reporting.numbers import show

WIDTH, HEIGHT = 320, 170  # of the drawing's own units
LEFT, RIGHT, TOP, BOTTOM = 52, 8, 8, 34
# Of the curves, in their order: (colour of style.PALETTE, dashes).
LOOKS = (
    ("curve4", ""),
    ("baseline", "6 3"),
    ("initial", "2 2"),
    ("curve1", "8 2 2 2"),
    ("unigram", "1 3"),
)


@dataclass(frozen=True)
class Curve:
    """Values over xs; values that are not finite are left out."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]


def line_chart(
    title: str,
    curves: Sequence[Curve],
    *,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> dict[str, Any] | None:
    """At most len(LOOKS) curves, for the macro; None where nothing is finite."""
    curves = curves[: len(LOOKS)]
    points = [_finite(curve) for curve in curves]
    xs = [x for curve in points for x, _ in curve]
    ys = [y for curve in points for _, y in curve]
    if not xs:
        return None
    low_x, high_x = _span(min(xs), max(xs))
    low_y, high_y = y_range or _span(min(ys), max(ys))

    def place_x(x: float) -> float:
        return round(LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT), 1)

    def place_y(y: float) -> float:
        return round(TOP + (high_y - y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM), 1)

    drawn = []
    for curve, own, (colour, dashes) in zip(curves, points, LOOKS):
        line = [(place_x(x), place_y(y)) for x, y in own]
        drawn.append(
            {
                "name": curve.name,
                "colour": colour,
                "dashes": dashes,
                "points": " ".join(f"{x},{y}" for x, y in line),
                "dots": line if len(line) <= 12 else [],
            }
        )
    marks_y = [low_y, (low_y + high_y) / 2, high_y]
    marks_x = [low_x, high_x] if x_ticks is None else x_ticks
    return {
        "title": title,
        "x_label": x_label,
        "y_label": y_label,
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "bottom": HEIGHT - BOTTOM,
        "x_ticks": [(place_x(x), _tick(x)) for x in marks_x if low_x <= x <= high_x],
        "y_ticks": [(place_y(y), _tick(y)) for y in marks_y],
        "curves": drawn,
        "alt": f"{title}: {y_label} over {x_label}; "
        + "; ".join(_told(curve, own) for curve, own in zip(curves, points) if own),
    }


def _tick(value: float) -> str:
    """Whole numbers without digits behind the point."""
    if value == int(value) and abs(value) < 1e6:
        return show(value).partition(".")[0]
    return show(value)


def _told(curve: Curve, points: list[tuple[float, float]]) -> str:
    first, last = points[0][1], points[-1][1]
    return f"{curve.name} from {show(first)} to {show(last)}"


def _finite(curve: Curve) -> list[tuple[float, float]]:
    return [(x, y) for x, y in zip(curve.xs, curve.ys) if math.isfinite(x) and math.isfinite(y)]


def _span(low: float, high: float) -> tuple[float, float]:
    """A range that is not empty."""
    if high > low:
        return low, high
    margin = abs(low) / 2 or 0.5
    return low - margin, high + margin
