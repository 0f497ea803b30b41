"""The plots of what logging.norms_every_steps measured: norms of gradients, weights and updates, a
curve for each layer.

A layer whose gradients vanish, or whose updates are large beside its weights, is seen here before
it is seen in the loss.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes

from ebwm_scale.reporting.axes import (
    chosen_steps,
    curve_style,
    label_axes,
    legend,
    log_scale,
    markers,
)
from ebwm_scale.reporting.curves import LAYER, Curve
from ebwm_scale.reporting.numbers import show

if TYPE_CHECKING:
    from ebwm_scale.reporting.run_data import Run

TITLES = {
    "gradient": "Gradient norms by layer",
    "weight": "Weight norms by layer",
    "update": "Update norms by layer",
}
CAPTIONS = {
    "gradient": "Of the mean loss, before clipping.",
    "weight": "Before the step.",
    "update": "What the optimizer adds, with the decay.",
}

Draw = Callable[[Axes, "Run", "Run | None"], "str | None"]


def norm_plots(run: Run) -> list[tuple[str, str, Draw]]:
    """(name, title, what draws it) for the plots of a report; nothing where norms were not
    measured.
    """
    return [
        (f"norms-{kind}", title, functools.partial(draw_norms, kind=kind))
        for kind, title in TITLES.items()
        if _of_layers(run, kind)
    ]


def draw_norms(axes: Axes, run: Run, baseline: Run | None, *, kind: str) -> str | None:
    """kind: gradient, weight or update."""
    layers = _of_layers(run, kind)
    if not layers:
        return None
    for place in chosen_steps(len(layers)):
        number, curve = layers[place]
        x, style = curve.x, curve_style(place, len(layers))
        axes.plot(x, curve.mean, label=f"layer {number}", **style, **markers(x, few=8))
    log_scale(axes)
    label_axes(axes, f"{kind} norm, log scale")
    legend(axes)
    ends = {number: curve.last for number, curve in layers if curve.last == curve.last}
    low, high = min(ends, key=lambda n: ends[n]), max(ends, key=lambda n: ends[n])
    text = (
        f"{CAPTIONS[kind]} At the last measured step {show(ends[low])} in layer {low}, which is "
        f"the smallest of {len(layers):,}, and {show(ends[high])} in layer {high}, the largest."
    )
    others = [
        f"{part.replace('_', ' ')} {show(curve.last)}"
        for (part, of_kind), curve in run.training.norms.items()
        if of_kind == kind and not LAYER.fullmatch(part) and curve.num_finite
    ]
    return text + (f" By kind of parameter: {', '.join(others)}." if others else "")


def _of_layers(run: Run, kind: str) -> list[tuple[int, Curve]]:
    """(number, curve) of each layer with a norm above 0, in the order of the layers."""
    found = []
    for (part, of_kind), curve in run.training.norms.items():
        layer = LAYER.fullmatch(part)
        if layer and of_kind == kind and curve.num_finite and np.nanmax(curve.mean) > 0:
            found.append((int(layer[1]), curve))
    return sorted(found, key=lambda item: item[0])
