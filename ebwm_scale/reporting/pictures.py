"""Frames inside a page, as data: URIs, and how two of them differ.

Small frames are PNGs, exact to the pixel, which the page enlarges without smoothing; large ones are
JPEGs. Differences have the colours of cividis, which rise in lightness and read the same to
colour-blind eyes.
"""

from __future__ import annotations

import base64
from functools import lru_cache

import numpy as np

from ebwm_scale.data.format.content import encode_image

MOST_EXACT = 64 * 64  # pixels of a frame that is a PNG
QUALITY = 90  # of a JPEG
MAP = "cividis"


def picture(frame: np.ndarray) -> str:
    """A data: URI of a frame uint8 (height, width, 3)."""
    height, width = frame.shape[:2]
    kind = "png" if height * width <= MOST_EXACT else "jpeg"
    content = encode_image(np.ascontiguousarray(frame), kind, QUALITY)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def difference(frame: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """|frame - truth|, mean over the channels, as colours uint8 (height, width, 3): from 0 (dark
    blue) to 255 (yellow).
    """
    size = np.abs(frame.astype(np.int16) - truth.astype(np.int16)).mean(-1)
    return _colours()[size.round().astype(np.uint8)]


def scale_of_differences() -> list[tuple[int, str]]:
    """Some differences with their colours, for a legend."""
    colours = _colours()
    return [(value, "#{:02x}{:02x}{:02x}".format(*colours[value])) for value in (0, 64, 128, 255)]


@lru_cache(maxsize=1)
def _colours() -> np.ndarray:
    """uint8 (256, 3)."""
    import matplotlib

    return (matplotlib.colormaps[MAP](np.arange(256))[:, :3] * 255).round().astype(np.uint8)
