"""Frames that move, inside a page: APNGs as data: URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np

from ebwm_scale.reporting.frames import bordered, enlarged

LONGEST = 200  # moments of a film
LAST_MS = 1500  # how long its last moment stays
GAP = 4  # white columns between pictures


def film(columns: Sequence[np.ndarray], *, imagined: Sequence[int] = (), interval_s: float) -> str:
    """Pictures side by side, moving: a data: URI of an APNG.

    columns: uint8 (T, height, width, 3) each, T the same. imagined: those that have the border of
    imagined frames. interval_s: between two moments. Of a longer film every n-th moment is shown.
    """
    from PIL import Image

    count = len(columns[0])
    stride = -(-count // LONGEST)
    moments = []
    for time in range(0, count, stride):
        pictures = []
        for number, frames in enumerate(columns):
            picture = enlarged(frames[time])
            pictures += [bordered(picture) if number in imagined else picture, _gap(picture)]
        moments.append(Image.fromarray(np.concatenate(pictures[:-1], 1)))
    interval_ms = max(40, round(1000 * interval_s * stride))
    durations = [interval_ms] * (len(moments) - 1) + [LAST_MS]
    file = io.BytesIO()
    first, *rest = moments
    first.save(
        file,
        format="PNG",
        save_all=True,
        append_images=rest,
        duration=durations,
        loop=0,
        optimize=True,
    )
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _gap(picture: np.ndarray) -> np.ndarray:
    return np.full((len(picture), GAP, 3), 255, np.uint8)
