"""Held-out clips and episodes as an explorer asks for them: one by its number, a part of it, and a
single frame.

A dataset of worlds keeps its held-out episodes whole; of any other dataset of video the clips of
the split are shown, whose frames are fewer.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ebwm_scale.data.format.content import VideoContent
from ebwm_scale.data.format.episodes import Episode, episodes_of, read_episode
from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.inference.imagination import ACTION, Window
from ebwm_scale.inference.windows import window_of, window_of_clip

KEPT = 4  # episodes or clips in memory


class FrameSource(Protocol):
    """What is shown, by number from 0 on. unit: what one of them is called."""

    unit: str

    def __len__(self) -> int: ...

    def num_frames(self, number: int) -> int:
        """Of one of them."""
        ...

    def window(self, number: int, first: int, num_frames: int) -> Window:
        """A part of one, from its frame `first` on."""
        ...

    def frame_states(self, number: int, frame: int) -> Tensor:
        """The states (P, dimension) of one frame."""
        ...

    def actions(self, number: int) -> np.ndarray | None:
        """(T, width) of one of them, as stored; None without."""
        ...


class Episodes:
    """The held-out episodes of a dataset of worlds."""

    unit = "episode"

    def __init__(self, observe: Observation, split: Any):
        self.observe = observe
        self.manifest = split.manifest
        self.infos = episodes_of(split.manifest)
        self._read = lru_cache(maxsize=KEPT)(self._read_one)

    def __len__(self) -> int:
        return len(self.infos)

    def num_frames(self, number: int) -> int:
        return self.infos[number].num_steps + 1

    def window(self, number: int, first: int, num_frames: int) -> Window:
        return window_of(self._read(number), self.observe, first, num_frames)

    def frame_states(self, number: int, frame: int) -> Tensor:
        assert self.observe.space is not None, "an episode is of video"
        frames = np.array(self._read(number).frames[frame : frame + 1])
        return self.observe.space.states(torch.from_numpy(frames)[None])[0]

    def actions(self, number: int) -> np.ndarray | None:
        return self._read(number).conditions.get(ACTION)

    def _read_one(self, number: int) -> Episode:
        return read_episode(self.manifest, self.infos[number])


class Clips:
    """The clips of a split of video, each from its first frame on."""

    unit = "clip"

    def __init__(self, observe: Observation, split: Any):
        self.observe = observe
        self.split = split
        self._num_frames = split.manifest.block_length // observe.group_size
        self._whole = lru_cache(maxsize=KEPT)(self._whole_one)

    def __len__(self) -> int:
        return len(self.split)

    def num_frames(self, number: int) -> int:
        return self._num_frames

    def window(self, number: int, first: int, num_frames: int) -> Window:
        whole = self._whole(number)
        last = first + num_frames
        conditions = {name: values[first : last - 1] for name, values in whole.conditions.items()}
        frames = None if whole.frames is None else whole.frames[first:last]
        start = whole.start + first
        return Window(whole.episode, start, whole.states[first:last], conditions, frames)

    def frame_states(self, number: int, frame: int) -> Tensor:
        return self._whole(number).states[frame]

    def actions(self, number: int) -> np.ndarray | None:
        return stored_actions(self.observe, self._whole(number).conditions)

    def _whole_one(self, number: int) -> Window:
        return window_of_clip(self.split, self.observe, number, self._num_frames)


def frame_source(observe: Observation, split: Any) -> FrameSource:
    """Episodes where a dataset keeps them, otherwise clips."""
    episodes = Episodes(observe, split)
    return episodes if len(episodes) else Clips(observe, split)


def pixels_of(observe: Observation, states: Tensor) -> np.ndarray | None:
    """Frames uint8 (n, height, width, 3) of states (n, P, dimension); None where the encoder cannot
    go back.
    """
    assert observe.space is not None, "a model of frames"
    shown = observe.space.frames(states.to(observe.device).flatten(0, 1)[None])
    return None if shown is None else shown[0].cpu().numpy()


def frames_seen(observe: Observation, window: Window) -> np.ndarray | None:
    """The frames of a window: those of the dataset where it keeps them."""
    return pixels_of(observe, window.states) if window.frames is None else window.frames


def stored_actions(observe: Observation, conditions: Mapping[str, Tensor]) -> np.ndarray | None:
    """Actions (T, width) in the units of the dataset, ids of discrete ones; None without."""
    if ACTION not in conditions:
        return None
    restored = observe.restored(conditions)[ACTION]
    return restored.cpu().numpy()


def interval_of(observe: Observation) -> float:
    """Seconds between two frames."""
    assert isinstance(observe.content, VideoContent), "a model of frames"
    return observe.content.interval_s
