"""Values of YAML turned into what the schema's types take, before they are checked."""

from __future__ import annotations

import math
from typing import Any

from ebwm_scale.config.strict_yaml import MAX_DEPTH
from ebwm_scale.core.plain_text import shown


def as_tuples(value: Any) -> Any:
    """Lists, and lists in lists, as tuples: YAML knows only lists."""
    if isinstance(value, list | tuple):
        return tuple(as_tuples(part) for part in value)
    return value


def on_or_off(value: Any) -> Any:
    """YAML 1.1 reads the words on and off as booleans; take them for the words."""
    if value is True:
        return "on"
    if value is False:
        return "off"
    return value


def refuse_unplain(value: Any) -> Any:
    """A mapping that can be written as JSON and read back the same, or ValueError."""
    problem = _not_plain(value, MAX_DEPTH)
    if problem is not None:
        raise ValueError(f"a mapping of plain values, {problem}")
    return value


def _not_plain(value: Any, depth: int) -> str | None:
    """What keeps a value from being written as JSON and read back the same, or None."""
    if depth == 0:
        return f"at most {MAX_DEPTH} levels deep"
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                return f"with texts as keys, not {shown(key)}"
        parts = list(value.values())
    elif isinstance(value, list | tuple):
        parts = list(value)
    elif isinstance(value, float) and not math.isfinite(value):
        return f"with finite numbers, not {value}"
    elif value is None or isinstance(value, str | bool | int | float):
        return None
    else:
        return f"not {shown(value)}"
    for part in parts:
        problem = _not_plain(part, depth - 1)
        if problem is not None:
            return problem
    return None
