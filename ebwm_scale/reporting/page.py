"""Self-contained HTML pages in one style: an escaping template, its colours, and plots as inline
SVG.

    data -> plain values (report_page.py, evaluation_page.py, scaling_page.py beside this file)
         -> render(template, ...)

Templates are in templates/. Whatever they show is escaped; a value that a template asks for and
that is not given is an error. Only drawings are put in as they are: matplotlib made them, and it
escapes its texts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jinja2
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ebwm_scale.reporting.plots import Plot
from ebwm_scale.reporting.style import NARROW, PALETTE, STYLE
from ebwm_scale.reporting.svg import figure_as_svg

# The pages' own colours, (light, dark) as in PALETTE. Good and bad are blue-green and vermilion,
# and always carry a sign and a word.
PAGE_COLOURS = {
    "page": ("#f6f7f9", "#12161c"),
    "card": ("#ffffff", "#1b2129"),
    "mark": ("#dbeeff", "#123a5e"),
    "good": ("#00705a", "#3fcfa9"),
    "bad": ("#b3400a", "#ff9a66"),
}


def render(template: str, *, title: str, **values: Any) -> str:
    """A page as HTML text. Raises jinja2.UndefinedError for a value that is not given."""
    colours = [(role, *pair) for role, pair in (PALETTE | PAGE_COLOURS).items()]
    return environment().get_template(template).render(title=title, colours=colours, **values)


@lru_cache(maxsize=1)
def environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("ebwm_scale.reporting", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def drawing(plot: Plot) -> dict[str, Any]:
    """A plot for the macro `figure`."""
    return {
        "title": plot.title,
        "caption": plot.caption,
        "svg": plot.svg,
        "narrow_svg": plot.narrow_svg,
    }


def card(title: str, draw: Callable[[Axes], str]) -> dict[str, Any]:
    """A plot with its title; draw fills the axes and returns the sentence under it."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=NARROW, layout="constrained")
        caption = draw(figure.add_subplot())
        name = "".join(c for c in title if c.isascii() and c.isalpha())
        svg = figure_as_svg(figure, name, title)
    return drawing(Plot(title, caption, svg))


def with_interval(value: dict[str, float]) -> str:
    """mean [low, high]."""
    return f"{value['mean']:.4g} [{value['low']:.4g}, {value['high']:.4g}]"
