"""Docstrings stand in the built reference as they are written: they hold pictures and formulas.

An extension of griffe, which reads the sources for mkdocstrings (mkdocs.yml). Markdown would run
their lines together, and take `<gamma, g>` for a tag and `[a b]` for a link.
"""

from __future__ import annotations

from typing import Any

import griffe


class AsWritten(griffe.Extension):
    """Puts every docstring of more than one line, or with marks of Markdown, between fences."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        docstring = obj.docstring
        if docstring is None:
            return
        text = docstring.value.strip("\n")
        if "\n" in text or any(mark in text for mark in "<[*_"):
            docstring.value = f"~~~text\n{text}\n~~~"
