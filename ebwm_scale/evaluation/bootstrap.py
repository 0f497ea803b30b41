"""Intervals of what is measured on samples: percentile bootstrap, shares, rank correlation,
deciles.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

BOOTSTRAP, BINS = 1000, 10


def resamples(count: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(0)).integers(0, count, (BOOTSTRAP, count))


def bootstrap_ci(per_sample: Tensor) -> dict[str, float]:
    """{"mean", "low", "high"}: 95 % percentile bootstrap over samples."""
    values = per_sample.double().numpy()
    means = values[resamples(len(values))].mean(1)
    return {
        "mean": float(values.mean()),
        "low": float(np.quantile(means, 0.025)),
        "high": float(np.quantile(means, 0.975)),
    }


def share_ci(hits: Tensor) -> dict[str, float]:
    """{"mean", "low", "high"} of a share, of 0 or 1 per sample: Wilson's 95 % interval.

    A bootstrap of nothing but zeros would say that there can be no others.
    """
    count, z = len(hits), 1.959963984540054
    share = float(hits.double().mean())
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    half = z / (1 + z * z / count) * spread
    low = 0.0 if share == 0 else max(0.0, middle - half)  # not a rounding error beside it
    high = 1.0 if share == 1 else min(1.0, middle + half)
    return {"mean": share, "low": low, "high": high}


def correlation_ci(a: Tensor, b: Tensor) -> dict[str, float]:
    """Spearman's rank correlation over all positions, (samples, S); bootstrap over samples, on
    ranks taken once.
    """
    ranked = [ranks(u.double().flatten().numpy()).reshape(u.shape) for u in (a, b)]

    def correlation(x: np.ndarray, y: np.ndarray) -> float:
        x, y = x.ravel() - x.mean(), y.ravel() - y.mean()
        scale = math.sqrt((x @ x) * (y @ y))
        return float(x @ y / scale) if scale > 0 else 0.0

    draws = [correlation(ranked[0][i], ranked[1][i]) for i in resamples(len(ranked[0]))[:200]]
    return {
        "mean": correlation(*ranked),
        "low": float(np.quantile(draws, 0.025)),
        "high": float(np.quantile(draws, 0.975)),
    }


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, equal values sharing the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + ends - 1) / 2)[inverse]


def deciles(by: Tensor, what: Tensor) -> list[dict[str, float]]:
    """Positions sorted by one quantity, cut into tenths: the mean of both in each."""
    order = by.flatten().argsort(stable=True)
    return [
        {
            "by": float(by.flatten()[part].double().mean()),
            "mean": float(what.flatten()[part].double().mean()),
        }
        for part in order.chunk(BINS)
    ]
