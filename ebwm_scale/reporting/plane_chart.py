"""Energy on a plane with a path in it: numbers for the macro `plane` of explore_parts.html.j2.

Bands between contours have the colours curve0 to curve5 of style.PALETTE, one hue from weak to
strong: the stronger, the lower the energy, on light and dark pages. The path is told from them by
another colour with an outline, and its moments by their numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import contourpy
import numpy as np

from ebwm_scale.reporting.numbers import show

SIDE = 240  # of the drawing's own units
LEFT, TOP = 52, 8
BANDS = 6
FINE = 43  # points a side that contours are drawn from
NEAR = 1.0  # units between two corners of a contour


def plane_chart(
    title: str,
    xs: Sequence[float],
    ys: Sequence[float],
    energies: Sequence[Sequence[float]],
    path: Sequence[tuple[float, float]],
    *,
    x_label: str,
    y_label: str,
) -> dict[str, Any] | None:
    """energies: a row for each of ys, a number for each of xs, evenly spaced. None where one is not
    finite, or all are the same.
    """
    values = np.asarray(energies, np.float64)
    if not np.isfinite(values).all() or not values.max() > values.min():
        return None

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - xs[0]) / (xs[-1] - xs[0])
        up = (y - ys[0]) / (ys[-1] - ys[0])
        return round(LEFT + across * SIDE, 1), round(TOP + (1 - up) * SIDE, 1)

    levels = np.linspace(values.min(), values.max(), BANDS + 1)
    fine = _between(values)
    ticks = np.linspace(0, SIDE, FINE)
    drawing = contourpy.contour_generator(
        LEFT + ticks, TOP + SIDE - ticks, fine, fill_type=contourpy.FillType.OuterOffset
    )
    bands = []
    for number in range(BANDS):
        low, high = levels[number], levels[number + 1]
        top = high if number < BANDS - 1 else high + abs(high) + 1  # with its highest point
        bottom = low if number else low - abs(low) - 1
        bands.append(
            {
                "path": _outlines(drawing.filled(bottom, top)),
                "colour": f"curve{BANDS - 1 - number}",
                "label": f"{show(float(low))} to {show(float(high))}",
            }
        )
    places = [place(*each) for each in path]
    return {
        "title": title,
        "width": LEFT + SIDE + 8,
        "height": TOP + SIDE + 40,
        "left": LEFT,
        "top": TOP,
        "side": SIDE,
        "bands": bands,
        "line": " ".join(f"{x},{y}" for x, y in places),
        "moments": [{"x": x, "y": y, "number": n} for n, (x, y) in enumerate(places)],
        "x_ticks": [(place(x, ys[0])[0], show(x)) for x in (xs[0], 0.0, xs[-1])],
        "y_ticks": [(place(xs[0], y)[1], show(y)) for y in (ys[0], 0.0, ys[-1])],
        "x_label": x_label,
        "y_label": y_label,
        "alt": f"{title}: energies from {show(float(values.min()))} to "
        f"{show(float(values.max()))}; the path has {len(path)} moments",
    }


def _between(values: np.ndarray) -> np.ndarray:
    """A grid of FINE points a side, by straight lines between those there are."""
    old = np.linspace(0, 1, len(values))
    new = np.linspace(0, 1, FINE)
    wide = np.stack([np.interp(new, old, row) for row in values])
    return np.stack([np.interp(new, old, column) for column in wide.T], 1)


def _outlines(filled: Any) -> str:
    """SVG paths of contourpy's outlines."""
    parts = []
    for points, offsets in zip(*filled):
        for begin, end in pairwise(offsets):
            ring = points[begin:end]
            if not np.isfinite(ring).all():
                continue
            corners = "L".join(f"{x:.1f} {y:.1f}" for x, y in _thinned(ring))
            parts.append(f"M{corners}Z")
    return "".join(parts)


def _thinned(ring: np.ndarray) -> list[tuple[float, float]]:
    """Without corners that are nearer than NEAR to the one before."""
    kept = [tuple(ring[0])]
    for point in ring[1:]:
        if math.dist(kept[-1], point) >= NEAR:
            kept.append(tuple(point))
    return kept
