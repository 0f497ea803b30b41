"""Held-out episodes beside what is imagined of them, as frames: what the page of a world shows.

window    o_1 .. o_c  o_(c+1) .. o_(c+k)      what was seen
future    o_1 .. o_c  x_1     .. x_k          the same beginning, then imagined frames
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebwm_scale.config import resolved
from ebwm_scale.data.format.content import VideoContent
from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.inference.imagination import Window, imagine
from ebwm_scale.inference.thinking import ThinkingConfig
from ebwm_scale.inference.windows import longest_window, windows_of
from ebwm_scale.world_model import WorldModel


@dataclass(frozen=True)
class ShownFuture:
    """Frames uint8 (c + k, height, width, 3): truth, and by name what each model imagines behind
    the first num_context ones. interval_s: between two frames.
    """

    episode: str
    start: int
    num_context: int
    interval_s: float
    truth: np.ndarray
    imagined: dict[str, np.ndarray]


def shown_futures(
    models: dict[str, WorldModel],
    split: Any,
    *,
    count: int,
    num_steps: int,
    seed: int,
) -> list[ShownFuture]:
    """At most `count` windows of held-out episodes, one of each, imagined under their own actions.

    models: by name, all of the same data. num_steps: imagined frames, fewer where episodes end
    before. Empty where the encoder cannot go back to frames.
    """
    first = next(iter(models.values()))
    observe = Observation(split.manifest, next(first.parameters()).device)
    assert observe.space is not None, "a world is of frames"
    assert isinstance(observe.content, VideoContent), "a world is of frames"
    num_context = max(1, (resolved.num_groups(first.config) + 1) // 2)
    num_frames = min(num_context + num_steps, longest_window(split, observe))
    if count < 1 or num_frames <= num_context:
        return []
    windows = windows_of(split, observe, num_frames=num_frames, max_windows=count)
    futures: list[dict[str, np.ndarray]] = [{} for _ in windows]
    for name, model in models.items():
        imagined = imagine(
            model,
            windows,
            num_context=num_context,
            num_steps=num_frames - num_context,
            config=ThinkingConfig(seed=seed),
            sample_ids=torch.arange(len(windows)),
        )
        shown = observe.space.frames(imagined.states.flatten(1, 2))
        if shown is None:
            return []
        for own, window, frames in zip(futures, windows, shown.cpu().numpy()):
            seen = _seen(window, observe, window.states[:num_context])
            own[name] = np.concatenate([seen, frames])
    return [
        ShownFuture(
            window.episode,
            window.start,
            num_context,
            observe.content.interval_s,
            _seen(window, observe, window.states),
            own,
        )
        for window, own in zip(windows, futures)
    ]


def _seen(window: Window, observe: Observation, states: Tensor) -> np.ndarray:
    """The first frames of a window: those of the dataset where it keeps them."""
    if window.frames is not None:
        return window.frames[: len(states)]
    assert observe.space is not None, "a world is of frames"
    frames = observe.space.frames(states.flatten(0, 1)[None])
    assert frames is not None, "the encoder goes back to frames"
    return frames[0].cpu().numpy()
