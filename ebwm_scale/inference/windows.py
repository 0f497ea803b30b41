"""Windows of held-out episodes: what imagination is measured on.

A dataset of worlds keeps its held-out episodes whole; of any other dataset of video the clips of
the split are taken, whose frames are fewer.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ebwm_scale.core.errors import DataError
from ebwm_scale.data.format.content import VideoContent
from ebwm_scale.data.format.episodes import Episode, episodes_of, read_episode
from ebwm_scale.data.format.manifest import Manifest
from ebwm_scale.data.loading.batches import stacked, to_tensor, to_tensors
from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.inference.imagination import Window


def windows_of(split, observe: Observation, *, num_frames: int, max_windows: int) -> list[Window]:
    """At most max_windows windows of num_frames frames each, of as many episodes as there are.

    split: of a video dataset. An episode that is shorter is left out. Raises DataError where none
    is long enough.
    """
    infos = [info for info in episodes_of(split.manifest) if info.num_steps >= num_frames - 1]
    if not infos:
        return _windows_of_clips(split, observe, num_frames, max_windows)
    windows = []
    for number, info in enumerate(infos[:max_windows]):
        count = max_windows // len(infos) + (number < max_windows % len(infos))
        episode = read_episode(split.manifest, info)
        latest = info.num_steps + 1 - num_frames
        starts = np.linspace(0, latest, max(1, count)).round().astype(int)
        for start in np.unique(starts).tolist():
            windows += [window_of(episode, observe, start, num_frames)]
    return windows


def longest_window(split, observe: Observation) -> int:
    """The most frames that a window of the split can have."""
    infos = episodes_of(split.manifest)
    if infos:
        return max(info.num_steps for info in infos) + 1
    return split.manifest.block_length // observe.group_size


def window_of(episode: Episode, observe: Observation, start: int, num_frames: int) -> Window:
    """A part of an episode as a model sees it."""
    assert observe.space is not None, "an episode is of video"
    frames = episode.frames[start : start + num_frames]
    stored = {
        name: values[None, start : start + num_frames - 1]
        for name, values in episode.conditions.items()
    }
    states = observe.space.states(torch.from_numpy(np.array(frames))[None])
    return Window(
        episode.name,
        start,
        states[0].unflatten(0, (num_frames, -1)),
        _conditions_of(observe, to_tensors(stored)),
        frames,
    )


def _windows_of_clips(
    split, observe: Observation, num_frames: int, max_windows: int
) -> list[Window]:
    manifest = split.manifest
    if num_frames > manifest.block_length // observe.group_size:
        raise DataError(_too_short(manifest, num_frames))
    ids = np.linspace(0, len(split) - 1, min(max_windows, len(split))).round().astype(int)
    return [window_of_clip(split, observe, int(each), num_frames) for each in np.unique(ids)]


def window_of_clip(split, observe: Observation, sample_id: int, num_frames: int) -> Window:
    """The first frames of a clip of the split as a model sees them."""
    content = split.manifest.content
    sample = content.first(split.read_sample(sample_id), num_frames * observe.group_size)
    sequences, stored = stacked([sample])
    assert observe.space is not None and isinstance(content, VideoContent)
    states = observe.space.states(to_tensor(sequences))[0]
    about = split.about(sample_id)
    return Window(
        str(about.get("episode", about.get("video", sample_id))),
        int(about.get("start_step", 0)),
        states.unflatten(0, (num_frames, -1)),
        _conditions_of(observe, to_tensors(stored)),
        sequences[0] if sequences.dtype == np.uint8 else None,
    )


def _too_short(manifest: Manifest, num_frames: int) -> str:
    return (
        f"{manifest.path}: no held-out episode and no clip has {num_frames} frames; "
        "imagine fewer steps"
    )


def _conditions_of(observe: Observation, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    conditions = observe.conditions(stored)
    return {name: values[0] for name, values in conditions.items()}
