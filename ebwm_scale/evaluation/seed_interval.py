"""Intervals over a few seeds: Student's t of a mean, for differences that are paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % quantile, by number of seeds


def seed_interval(values: Sequence[float]) -> dict[str, float]:
    """{"mean", "low", "high"} of one value per seed: 95 %.

    Raises KeyError for a number of seeds that STUDENT_T has no quantile for.
    """
    mean = statistics.fmean(values)
    half = STUDENT_T[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}
