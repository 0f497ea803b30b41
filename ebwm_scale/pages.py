"""Pieces of self-contained HTML pages in the style of the run report: a page, a plot on a card, a table, a number with its interval."""

from __future__ import annotations

import io
from html import escape
from typing import Callable

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .report_page import CSS, PAGE_COLOURS
from .report_plots import NARROW, PALETTE, STYLE, inline_svg


def page(title: str, parts: list[str]) -> str:
    """Parts of HTML as one self-contained page in the report's style."""
    colours = {**PALETTE, **PAGE_COLOURS}
    light, dark = (
        ";".join(f"--{role}:{pair[i]}" for role, pair in colours.items()) for i in (0, 1)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>:root{{color-scheme:light dark;{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}{CSS}</style></head>\n"
        f"<body><main>\n{chr(10).join(parts)}\n</main></body></html>\n"
    )


def card(title: str, draw: Callable[[Axes], str]) -> str:
    """A plot with its title; draw fills the axes and returns the sentence under it."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=NARROW, layout="constrained")
        caption = draw(figure.add_subplot())
        stream = io.StringIO()
        figure.savefig(stream, format="svg")
    name = "".join(c for c in title if c.isalpha())
    return f'<figure class="card"><h3>{escape(title)}</h3>{inline_svg(stream.getvalue(), name, title)}<figcaption>{escape(caption)}</figcaption></figure>'


def table(heads: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    return f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)}</tbody></table></div>'


def with_interval(value: dict[str, float]) -> str:
    """mean [low, high]."""
    return f"{value['mean']:.4g} [{value['low']:.4g}, {value['high']:.4g}]"
