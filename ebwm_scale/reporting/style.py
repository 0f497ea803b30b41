"""Colours, sizes and matplotlib settings that all plots share."""

from __future__ import annotations

from typing import Any

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
# matplotlib types its keys as a Literal of all of them
STYLE: dict[Any, Any] = {
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
# inches
NARROW = (3.9, 2.6)
WIDE = (8.2, 4.1)
TALL = (3.9, 3.9)
