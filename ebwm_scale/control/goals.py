"""Goals as they are named on a command line.

FILE.npy, FILE.png    a frame, of the size that the run sees
episode:E:STEP        a frame of a held-out episode, by name or number
FILE.py:NAME          NAME(env, observation, info) gives the frame once an episode has begun
reward                as much reward as a readout of the imagined frames expects
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ebwm_scale.core.errors import UserError
from ebwm_scale.core.plain_text import shorten
from ebwm_scale.data.format.content import VideoContent
from ebwm_scale.data.format.episodes import find_episode, read_episode
from ebwm_scale.data.format.manifest import Manifest
from ebwm_scale.data.prepare.worlds.policies import function_of_file

REWARD = "reward"
USAGE = "--goal takes reward, a .npy or .png, episode:E:STEP, or FILE.py:NAME"
_FROM_EPISODE = "episode:"
FrameOfEpisode = Callable[[Any, Any, Any], np.ndarray]


def read_goal(text: str, manifest: Manifest) -> np.ndarray | FrameOfEpisode | None:
    """The frame uint8 (height, width, 3) that a text names, or a function that gives one; None for
    reward.

    Raises UserError for what cannot be read, and for a frame of another size.
    """
    if text == REWARD:
        return None
    if text.startswith(_FROM_EPISODE):
        return checked(_of_episode(text, manifest), f"--goal {text}", manifest)
    path, separator, name = text.rpartition(":")
    if separator and path.endswith(".py"):
        return _of_function(function_of_file(Path(path), name, USAGE), text, manifest)
    return checked(_of_file(text), f"--goal {text}", manifest)


def checked(frame: Any, what: str, manifest: Manifest) -> np.ndarray:
    """A goal's frame; UserError for what is no frame of the run's size."""
    content = manifest.content
    assert isinstance(content, VideoContent), "a world is of frames"
    size = (content.height, content.width, 3)
    values = np.asarray(frame)
    if values.dtype != np.uint8 or values.shape != size:
        raise UserError(
            f"{what}: is {values.dtype} {values.shape}; frames of this run are uint8 {size}: give "
            "one of that size"
        )
    return values


def _of_episode(text: str, manifest: Manifest) -> np.ndarray:
    name, separator, step = text.removeprefix(_FROM_EPISODE).rpartition(":")
    if not separator or not step.isdecimal():
        raise UserError(f"--goal {text}: {USAGE}; for example episode:0:20")
    episode = read_episode(manifest, find_episode(manifest, name))
    if int(step) >= len(episode.frames):
        raise UserError(
            f"--goal {text}: episode {episode.name} has frames 0 to {len(episode.frames) - 1}"
        )
    return episode.frames[int(step)]


def _of_file(text: str) -> np.ndarray:
    path = Path(text)
    if path.suffix.lower() not in (".npy", ".png"):
        raise UserError(f"--goal {text}: {USAGE}")
    if not path.is_file():
        raise UserError(f"--goal {text}: no such file; {USAGE}")
    try:
        if path.suffix.lower() == ".npy":
            return np.load(path, allow_pickle=False)
        from PIL import Image

        return np.asarray(Image.open(path).convert("RGB"))
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise UserError(f"--goal {text}: cannot be read: {shorten(error, 200)}") from None


def _of_function(function: Callable, text: str, manifest: Manifest) -> FrameOfEpisode:
    def goal(env: Any, observation: Any, info: Any) -> np.ndarray:
        try:
            frame = function(env, observation, info)
        except Exception as error:  # noqa: BLE001 (a user's function raises what it likes)
            what = f"{type(error).__name__}: {shorten(error, 200)}"
            raise UserError(f"--goal {text}: fails: {what}") from None
        return checked(frame, f"--goal {text}", manifest)

    return goal
