"""The continuations of a text run as plain values for the report: prompt, continuation, and the
candidates of its first positions.
"""

from __future__ import annotations

import math
from typing import Any

from ebwm_scale.reporting.curves import number
from ebwm_scale.reporting.numbers import show
from ebwm_scale.reporting.plain import mappings, page_text

MAX_CONTINUATIONS = 24
MAX_POSITIONS = 16
MAX_CANDIDATES = 10
MAX_TEXT = 6_000
# How whitespace looks in a token, where a space in front is part of it; other blanks by their code.
BLANKS = {" ": "␣", "\n": "⏎", "\t": "⇥"}


def continuations_of(samples: dict | None) -> dict[str, Any]:
    """samples["continuations"] for templates/continuations.html.j2."""
    samples = samples or {}
    listed, step = mappings(samples.get("continuations")), samples.get("step")
    return {
        "step": f"{step:,}" if isinstance(step, int) else "",
        "shown": [_continuation(item) for item in listed[:MAX_CONTINUATIONS]],
        "more": _more(listed, MAX_CONTINUATIONS),
    }


def _continuation(item: dict) -> dict[str, Any]:
    positions = mappings(item.get("positions"))
    plural = "" if len(positions) == 1 else "s"
    return {
        "prompt": _text(item.get("prompt")),
        "continuation": _text(item.get("continuation")),
        "reference": _text(item.get("reference")),
        "positions": [_position(position) for position in positions[:MAX_POSITIONS]],
        "positions_title": f"Candidates for the next token, {len(positions):,} position{plural}",
        "more": _more(positions, MAX_POSITIONS),
    }


def _position(position: dict) -> dict[str, Any]:
    """A position without a true token is one at which the continuation has left the text."""
    truth, candidates = position.get("truth"), mappings(position.get("candidates"), MAX_CANDIDATES)
    truth_energy = number(position.get("truth_energy"))
    energies = [number(candidate.get("energy")) for candidate in candidates]
    rows = []
    for candidate, energy in zip(candidates, energies):
        token = candidate.get("token")
        is_truth = truth is not None and token == truth
        rows.append(_row(token, number(candidate.get("probability")), energy, is_truth=is_truth))
    if truth is not None and candidates and not any(row["is_truth"] for row in rows):
        rows.append(_row(truth, math.nan, truth_energy, is_truth=True))
    return {
        "context": _text(position.get("context"))[-160:],
        "truth": None if truth is None else visible(truth),
        "with_energy": any(energy == energy for energy in [*energies, truth_energy]),
        "rows": rows,
    }


def _row(token: Any, probability: float, energy: float, *, is_truth: bool) -> dict[str, Any]:
    known = probability == probability
    width = min(max(probability, 0.0), 1.0) * 100 if known else 0.0
    return {
        "token": visible(token),
        "probability": f"{probability:.1%}" if known else "not listed",
        "width": f"{width:.1f}",
        "energy": show(energy) if energy == energy else "–",
        "is_truth": is_truth,
    }


def visible(token: Any) -> str:
    """A token with its blanks made visible: ␣ ⏎ ⇥, other characters without ink by their code."""
    text = "" if token is None else str(token)[:80]
    if text == "":
        return "(no text)"
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    if character in BLANKS:
        return BLANKS[character]
    if character.isprintable():
        return character
    return f"<U+{ord(character):04X}>"


def _text(value: Any) -> str:
    return "" if value is None else page_text(str(value), MAX_TEXT)


def _more(listed: list, shown: int) -> str:
    """How many are left out, as text; empty if none is.

    A list that was cut has at least that many.
    """
    return f"{len(listed) - shown:,}" if len(listed) > shown else ""
