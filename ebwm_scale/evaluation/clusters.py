"""Intervals of what is measured on several windows of each episode: a bootstrap over episodes.

Windows of an episode resemble each other, so whole episodes are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ebwm_scale.evaluation.bootstrap import bootstrap_ci, resamples


def mean_ci(values: Tensor, episodes: Sequence[str]) -> dict[str, float]:
    """{"mean", "low", "high"} of values (n,): the mean over episodes of each episode's mean."""
    places = _places(episodes)
    sums = np.bincount(places, values.double().cpu().numpy())
    return bootstrap_ci(torch.from_numpy(sums / np.bincount(places)))


def auroc_ci(real: Tensor, wrong: Tensor, episodes: Sequence[str]) -> dict[str, float]:
    """Of all pairs of a real and a wrong value, (n,) each, those in which the real one is lower.

    Equal ones count half. A pair is drawn as often as both of its episodes are.
    """
    places = _places(episodes)
    wins, pairs = _pairs(real, wrong, places)
    draws = [_share(wins[np.ix_(rows, rows)], pairs[np.ix_(rows, rows)]) for rows in _draws(places)]
    return {
        "mean": _share(wins, pairs),
        "low": float(np.quantile(draws, 0.025)),
        "high": float(np.quantile(draws, 0.975)),
    }


def auroc_draws(
    reals: Sequence[Tensor], wrongs: Sequence[Tensor], episodes: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """(AUROC of each seed, bootstrap draws of their mean): draws of seeds, and of episodes.

    reals, wrongs: values (n,) of each seed, of the same n windows. Draws of as many seeds and
    episodes are the same ones, so that differences of two judges' draws are paired.
    """
    places = _places(episodes)
    tables = [_pairs(real, wrong, places) for real, wrong in zip(reals, wrongs, strict=True)]
    pairs = tables[0][1]
    wins = np.stack([own for own, _ in tables])
    random = np.random.Generator(np.random.Philox(1))
    draws = []
    for rows in _draws(places):
        seeds = random.integers(0, len(wins), len(wins))
        cells = np.ix_(rows, rows)
        draws.append(_share(wins[seeds].mean(0)[cells], pairs[cells]))
    return np.array([_share(own, pairs) for own in wins]), np.array(draws)


def _pairs(real: Tensor, wrong: Tensor, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(won, all) pairs of a real and a wrong value by their episodes, (episodes, episodes)."""
    a, b = real.double().cpu().numpy()[:, None], wrong.double().cpu().numpy()[None]
    lower = (a < b) + 0.5 * (a == b)
    members = np.eye(places.max() + 1)[places]  # (n, episodes)
    counts = members.sum(0)
    return members.T @ lower @ members, counts[:, None] * counts[None]


def _share(wins: np.ndarray, pairs: np.ndarray) -> float:
    return float(wins.sum() / pairs.sum())


def _draws(places: np.ndarray) -> np.ndarray:
    return resamples(int(places.max()) + 1)


def _places(episodes: Sequence[str]) -> np.ndarray:
    """The number of each window's episode."""
    _, places = np.unique(np.array(episodes, dtype=object).astype(str), return_inverse=True)
    return places
