"""JSON that says one thing: no key twice, no NaN or infinity, UTF-8 only; whatever is wrong with it
is one ValueError.
"""

from __future__ import annotations

import json
import math
from typing import Any, TypeGuard

from ebwm_scale.core.plain_text import shorten, shown


def parse(content: bytes) -> Any:
    """The value of a JSON text.

    Raises ValueError of one line, also for nesting that the parser cannot follow.
    """
    try:
        return json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse,
            parse_float=_finite,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        raise ValueError(shorten(error)) from None


def canonical_json(values: Any) -> bytes:
    """One spelling of a JSON value: sorted keys, no spaces, ASCII."""
    return json.dumps(
        values, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode("ascii")


def other_version(values: Any, key: str, known: int) -> str | None:
    """None where `values` is an object of the known format version.

    Otherwise what is wrong with it, in words: "format_version is 9: this release reads 2".
    """
    version = values.get(key) if isinstance(values, dict) else None
    if is_whole(version) and version == known:
        return None
    return f"{key} is {shown(version)}: this release reads {known}"


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether a value is an integer that fits into 64 bits with sign; True and 1.0 are none."""
    return type(value) is int and -(2**63) <= value < 2**63


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError(f"a key stands twice in the object that begins with {shown(pairs[0][0])}")
    return values


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {shown(text)} is out of range")
    return value
