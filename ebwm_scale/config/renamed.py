"""Keys that have another name now: the old one is read, and said to be old once."""

from __future__ import annotations

import logging
from typing import Any

from ebwm_scale.core.plain_text import cut

logger = logging.getLogger(__name__)

# (section, old key) -> new key
RENAMED = {
    ("refinement", "checkpoint"): "recompute",
}
_said: set[tuple[str, str]] = set()


def read_old_names(values: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """The same values under today's names; a key under both names is a problem."""
    if not isinstance(values, dict):
        return values
    values = dict(values)
    for (section, old), new in RENAMED.items():
        keys = values.get(section)
        if not isinstance(keys, dict) or old not in keys:
            continue
        if new in keys:
            problems.append(
                f"{section}.{old} and {section}.{new} are both given: "
                f"{old} is the old name of {new} (here {cut(keys[old])}); leave it out"
            )
            continue
        values[section] = {new if key == old else key: value for key, value in keys.items()}
        if (section, old) not in _said:
            _said.add((section, old))
            logger.warning("%s.%s is the old name of %s.%s", section, old, section, new)
    return values
