"""Imagined futures for people: files of frames, and a line of energies and errors for each."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ebwm_scale.data.format.content import VideoContent
from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.evaluation.rollouts import Rollout
from ebwm_scale.reporting.frames import write_rollout

BOTH = (".png", ".mp4")


def shown_rollout(rollout: Rollout, observe: Observation, output: Path) -> list[str]:
    """Write the futures beside what was, and say what is known of them.

    output: .png, .gif or .mp4; without an ending, a .png and a .mp4. Raises UserError.
    """
    lines = []
    for number, future in enumerate(rollout.futures):
        said = []
        if future.energies is not None:
            said.append(f"energies {_listed(future.energies[0].tolist(), 3)}")
        if rollout.errors is not None:
            said.append(f"errors {_listed(rollout.errors[number].tolist(), 4)}")
        lines.append(f"future {number + 1}: {'; '.join(said)}")
    shown = _frames(rollout, observe)
    if shown is None or rollout.window.frames is None:
        return [*lines, "nothing is shown: the encoder cannot go back to frames"]
    assert isinstance(observe.content, VideoContent)
    paths = [output] if output.suffix else [output.with_suffix(suffix) for suffix in BOTH]
    for path in paths:
        write_rollout(
            path,
            rollout.window.frames,
            shown,
            rollout.num_context,
            interval_s=observe.content.interval_s,
        )
    return [*lines, ", ".join(str(path) for path in paths)]


def _listed(values: list[float], digits: int) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def _frames(rollout: Rollout, observe: Observation) -> list[np.ndarray] | None:
    """Frames uint8 (k, height, width, 3) of each future; None where the encoder has no way back."""
    assert observe.space is not None, "an episode is of video"
    shown = []
    for future in rollout.futures:
        frames = observe.space.frames(future.states.flatten(1, 2))
        if frames is None:
            return None
        shown.append(frames[0].cpu().numpy())
    return shown
