"""Minari datasets, as folders: T + 1 observations and T actions, rewards and ends of each episode.

Frames are an observation of bytes that is a picture, as a whole or under a key of a dictionary.
Read with the package minari, which knows its formats; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.plain_text import shorten
from ebwm_scale.data.prepare.worlds.columns import RawEpisode
from ebwm_scale.data.prepare.worlds.images import LEAST_SIDE, looks_like_image
from ebwm_scale.data.prepare.worlds.source import FRAMES, Wanted, folder_digest, needed
from ebwm_scale.data.prepare.worlds.spaces import ActionSpace

_USUAL = {
    "action": ("action",),
    "proprio": ("observation", "observation/observation", "observation/state"),
    "reward": ("reward",),
    "terminated": ("terminated",),
}
_ARRAYS = {"reward": "rewards", "terminated": "terminations"}


class MinariSource:
    """See data/prepare/worlds/source.py: Source.

    Keys: action, reward, terminated; observation, or observation/KEY/... of a dictionary.
    """

    kind = "minari"
    fps: float | None = None

    def __init__(self, folder: Path, wanted: Wanted):
        minari: Any = needed("minari", "minari[hdf5]", "reading Minari datasets")
        data = folder / "data" if (folder / "data" / "metadata.json").is_file() else folder
        self.folder = folder
        self.name = folder.resolve().name
        try:
            self.dataset: Any = minari.MinariDataset(data)
            indices = [int(i) for i in self.dataset.episode_indices]
            first = next(iter(self.dataset.iterate_episodes(indices[:1])), None)
        except Exception as error:  # noqa: BLE001 (minari, h5py and gymnasium raise what they like)
            raise DataError(f"{folder}: not a Minari dataset: {shorten(error, 200)}") from None
        if first is None:
            raise DataError(f"{folder}: holds no episodes")
        self.actions = ActionSpace(self.dataset.action_space, f"{folder}: its actions")
        observations = flattened(first.observations, "observation")
        there = [*observations, *_USUAL["action"], *_ARRAYS]
        images = [
            key
            for key, rows in observations.items()
            if looks_like_image(rows.shape[1:], rows.dtype)
        ]
        if not images and FRAMES not in wanted.keys:
            raise DataError(
                f"{folder}: no observation is a picture of at least {LEAST_SIDE} pixels a side (it "
                f"has {', '.join(sorted(there))}); name one with --camera, take a dataset with "
                "pictures, or record the environment"
            )
        if len(images) > 1 and FRAMES not in wanted.keys:
            raise DataError(
                f"{folder}: has several pictures, {', '.join(images)}: name one with --camera"
            )
        self.keys: dict[str, str] = {}
        for name in wanted.names:
            usual = images if name == FRAMES else _USUAL.get(name, (f"observation/{name}",))
            key = wanted.key(name, there, usual, str(folder))
            assert key is not None, "minari has all outcomes"
            self.keys[name] = key
        self._indices = {_episode_name(i): i for i in indices}
        self.groups = [[name] for name in self._indices]
        self.digest = folder_digest(data, print)

    def read(self, group: list[str], moved: Callable[[], None]) -> Iterator[RawEpisode]:
        for name in group:
            where = f"{self.folder}: {name}"
            try:
                (episode,) = self.dataset.iterate_episodes([self._indices[name]])
                arrays = flattened(episode.observations, "observation")
            except Exception as error:  # noqa: BLE001 (as above)
                raise DataError(f"{where}: cannot be read: {shorten(error, 200)}") from None
            moved()
            for key, attribute in _ARRAYS.items():
                arrays[key] = np.asarray(getattr(episode, attribute))
            arrays["action"], num_values = self.actions.ids(episode.actions, where)
            missing = [key for key in self.keys.values() if key not in arrays]
            if missing:
                raise DataError(f"{where}: has no {missing[0]}, which the first episode has")
            columns = {n: arrays[key] for n, key in self.keys.items() if n != FRAMES}
            known = {n: num_values for n, k in self.keys.items() if k == "action" and num_values}
            yield RawEpisode(name, arrays[self.keys[FRAMES]], columns, known)


def flattened(observations: Any, prefix: str) -> dict[str, np.ndarray]:
    """Arrays of nested dictionaries and tuples by their paths, a/b/c; others are left out."""
    if isinstance(observations, dict):
        parts = observations.items()
    elif isinstance(observations, tuple):
        parts = ((str(i), part) for i, part in enumerate(observations))
    else:
        array = np.asarray(observations)
        return {prefix: array} if array.dtype.kind in "biuf" else {}
    arrays: dict[str, np.ndarray] = {}
    for key, part in parts:
        arrays |= flattened(part, f"{prefix}/{key}")
    return arrays


def _episode_name(index: int) -> str:
    return f"episode_{index:06d}"
