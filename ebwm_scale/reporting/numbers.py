"""Numbers as runs write them, read with care, and as a reader is shown them."""

from __future__ import annotations

import math
from collections.abc import Mapping


def show(value: float) -> str:
    """A number for people: about four significant digits, thousands separated, a true minus, an
    exponent only where needed.
    """
    size = abs(value)
    if value != value:
        return "not a number"
    if size and not 1e-4 <= size < 1e7:
        text = f"{size:.2e}"
    elif size < 1:
        text = f"{size:.4g}"
    else:
        text = f"{size:,.{max(0, 3 - int(math.log10(size)))}f}"
    return "−" + text if value < 0 else text


def show_change(value: float) -> str:
    """A difference for people, always with its sign."""
    return show(value) if value < 0 else "+" + show(value)


def by_sign(interval: Mapping[str, float], above: str, below: str, neither: str) -> str:
    """The text for an interval {"low": .., "high": ..} that lies above 0, below it, or holds it."""
    if interval["low"] > 0:
        return above
    if interval["high"] < 0:
        return below
    return neither
