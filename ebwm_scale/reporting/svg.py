"""A drawing of matplotlib as part of an HTML page."""

from __future__ import annotations

import io
import re

from markupsafe import Markup
from matplotlib.figure import Figure

from ebwm_scale.reporting.style import LIGHT

# format() escapes what is put in.
OPENING = Markup('<svg viewBox="{view_box}" role="img" aria-label="{alt}">')


def figure_as_svg(figure: Figure, name: str, alt: str) -> Markup:
    """An <svg> element: ids that start with `name`, the page's colours and font, no reference to
    anything outside. matplotlib escapes the texts in it. alt: said in place of the picture.
    """
    stream = io.StringIO()
    figure.savefig(stream, format="svg")
    document = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", stream.getvalue(), flags=re.S)
    opening = re.search(r'<svg[^>]*viewBox="([^"]*)"[^>]*>', document)
    if opening is None:
        raise ValueError("matplotlib wrote an SVG without a viewBox")
    body = document[opening.end() :]
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", body)
    body = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', body)
    body = re.sub(r"(font: [^;\"]*?[\d.]+px) [^;\"]+", r"\1 system-ui, sans-serif", body)
    for role, colour in LIGHT.items():
        body = body.replace(colour, f"var(--{role})")
    return OPENING.format(view_box=opening.group(1), alt=alt) + Markup(re.sub(r"\n\s*", "\n", body))
