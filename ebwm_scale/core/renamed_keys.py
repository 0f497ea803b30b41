"""Keys that have another name now: what was written before is read under today's names.

A configuration's old key is read, and said to be old once (read_old_names). metrics.jsonl,
samples.json, evaluation.json and the studies under results/ are kept as they were written. Whoever
reads one asks for today's names only:

    row = with_new_names(row)
    row.get("persistence_loss")
"""

from __future__ import annotations

import logging
from typing import Any

from ebwm_scale.core.plain_text import cut

logger = logging.getLogger(__name__)

# of a configuration: (section, old key) -> new key
IN_CONFIGURATIONS = {
    ("refinement", "checkpoint"): "recompute",
}
_said: set[tuple[str, str]] = set()

# of result files: old key -> new key, wherever it stands in a file
RENAMED = {
    # metrics.jsonl, samples.json and studies: predictors of video that learn nothing
    "copy_last_loss": "persistence_loss",
    "linear_loss": "linear_extrapolation_loss",
    "continuation_copy_loss": "continuation_persistence_loss",
    # evaluation.json
    "tenths": "deciles",
    "tenths_of_error": "deciles_of_error",
    "foreign": "out_of_distribution",
    "foreign_texts": "out_of_distribution_texts",
    "share_of_pairs_in_which_real_is_lower": "auroc",
    "share_of_pairs_in_which_real_has_lower_energy": "auroc_of_energy",
    "share_of_pairs_in_which_real_has_lower_loss": "auroc_of_loss",
}


def with_new_names(value: Any) -> Any:
    """A copy of nested mappings and lists of a result file with today's keys.

    A key that stands under both names keeps the value of the new one.
    """
    if isinstance(value, list):
        return [with_new_names(item) for item in value]
    if not isinstance(value, dict):
        return value
    renamed = {}
    for key, item in value.items():
        new = RENAMED.get(key, key)
        if new != key and new in value:
            continue
        renamed[new] = with_new_names(item)
    return renamed


def read_old_names(values: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """A configuration's values under today's names; a key under both names is a problem."""
    if not isinstance(values, dict):
        return values
    values = dict(values)
    for (section, old), new in IN_CONFIGURATIONS.items():
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
