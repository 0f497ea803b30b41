"""What a page shows of values that others wrote: plain, of bounded size (`bounded`), and of
characters that a page can hold (`page_text`).

Samples, summaries, configurations and results are read from files that anybody may have written.
`bounded` copies such a value with limits on depth, items, text and the whole, so that neither a
list of a million items nor a YAML alias that stands for a billion can fill the memory or the page.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

MAX_DEPTH = 12
MAX_ITEMS = 2_000  # of a list or mapping
MAX_NODES = 200_000  # of a whole value
MAX_TEXT = 10_000  # characters
MAX_IMAGE = 600_000  # characters of a data: URI
MAX_CHARACTERS = 50_000_000  # of a whole value
CUT = "…"
_HALF_SURROGATES = re.compile("[\ud800-\udfff]")  # no text: neither files nor fonts take them
_LARGEST = 10**18  # beyond this a whole number is no count of anything here


def bounded(
    value: Any,
    *,
    items: int = MAX_ITEMS,
    nodes: int = MAX_NODES,
    characters: int = MAX_CHARACTERS,
) -> Any:
    """A copy of nested lists, mappings and plain values that is small enough for a page.

    Items beyond the limits are left out, deeper levels and longer texts cut; keys are text.
    """
    return _Copy(items, nodes, characters).of(value, MAX_DEPTH)


class _Copy:
    """One copy, with what is left of the limits on the whole."""

    def __init__(self, items: int, nodes: int, characters: int):
        self.items = items
        self.nodes = nodes
        self.characters = characters

    def of(self, value: Any, depth: int) -> Any:
        self.nodes -= 1
        if isinstance(value, (dict, list, tuple)) and (depth == 0 or self.nodes <= 0):
            return CUT
        if isinstance(value, dict):
            result = {}
            for number, (key, item) in enumerate(value.items()):
                if number == self.items or self.nodes <= 0:
                    break
                result[self.text(key)[:200]] = self.of(item, depth - 1)
            return result
        if isinstance(value, (list, tuple)):
            result = []
            for item in value[: self.items]:
                if self.nodes <= 0:
                    break
                result.append(self.of(item, depth - 1))
            return result
        if value is None or isinstance(value, (bool, float)):
            return value
        if isinstance(value, int):
            return value if abs(value) <= _LARGEST else "a number of more than 18 digits"
        return self.text(value)

    def text(self, value: Any) -> str:
        if isinstance(value, (dict, list, tuple, set, frozenset)):
            return type(value).__name__
        text = value if isinstance(value, str) else str(value)[:MAX_TEXT]
        limit = MAX_IMAGE if text.startswith("data:image/") else MAX_TEXT
        if self.characters < min(len(text), limit):
            return CUT
        self.characters -= min(len(text), limit)
        cut = text if len(text) <= limit else text[:limit] + CUT
        return _HALF_SURROGATES.sub("�", cut)


def page_text(text: str, limit: int = MAX_TEXT) -> str:
    """The text cut to a length, with a sign in place of what no page can hold: controls, half
    surrogates.
    """
    cut = text if len(text) <= limit else text[:limit] + CUT
    if cut.isprintable():
        return cut
    return "".join("�" if _is_unprintable(character) else character for character in cut)


def _is_unprintable(character: str) -> bool:
    return character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cs")


def mappings(value: Any, most: int = MAX_ITEMS) -> list[dict]:
    """The mappings of a list, up to a number of them; none of anything else."""
    if not isinstance(value, list):
        return []
    return [item for item in value if isinstance(item, dict)][:most]
