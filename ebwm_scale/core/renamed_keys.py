"""Keys of result files that have another name now: files of before are read under today's names.

metrics.jsonl, samples.json, evaluation.json and the studies under results/ are kept as they were
written. Whoever reads one asks for today's names only:

    row = with_new_names(row)
    row.get("persistence_loss")
"""

from __future__ import annotations

from typing import Any

# old key -> new key, wherever it stands in a file
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
