"""Frames of any image type -> uint8 (n, height, width, 3) of the dataset's size.

The whole picture is kept, stretched to the size: what is at its edge may matter for what an action
does there.
"""

from __future__ import annotations

import numpy as np

from ebwm_scale.core.errors import DataError
from ebwm_scale.data.format.content import MAX_IMAGE_PIXELS, _pillow

_COLOURS = (1, 3, 4)  # grey, red green blue, and with a transparency, which is left out
# Smaller arrays of bytes are codes of cells (MiniGrid's 7 x 7 x 3, NetHack's 21 x 79 letters).
LEAST_SIDE = 24


def looks_like_image(shape: tuple[int, ...], dtype: np.dtype) -> bool:
    """Whether an array of an observation is a picture: (h, w), (h, w, c) or (c, h, w) of bytes, of
    at least LEAST_SIDE pixels a side.
    """
    if dtype != np.uint8 or len(shape) not in (2, 3):
        return False
    sides = shape
    if len(shape) == 3:
        if shape[2] in _COLOURS:
            sides = shape[:2]
        elif shape[0] in _COLOURS:
            sides = shape[1:]
        else:
            return False
    return min(sides) >= LEAST_SIDE


def sized(frames: np.ndarray, height: int, width: int, where: str) -> np.ndarray:
    """Frames (n, h, w), (n, h, w, c) or (n, c, h, w) as uint8 (n, height, width, 3).

    They are bytes, or fractions from 0 to 1. where: for messages. Raises DataError for what is no
    picture.
    """
    pictures = with_colours(frames, where)
    if pictures.shape[1:3] == (height, width):
        return pictures
    image = _pillow()
    size, how = (width, height), image.Resampling.BILINEAR
    return np.stack([np.asarray(image.fromarray(p).resize(size, how)) for p in pictures])


def with_colours(frames: np.ndarray, where: str) -> np.ndarray:
    """Frames of their own size as uint8 (n, h, w, 3), contiguous."""
    what = f"{where}: frames are {frames.dtype} {frames.shape}"
    if frames.ndim == 3:
        frames = frames[..., None]
    if frames.ndim != 4 or 0 in frames.shape:
        raise DataError(f"{what}: expected (n, height, width, colours)")
    if frames.shape[3] not in _COLOURS and frames.shape[1] in _COLOURS:
        frames = frames.transpose(0, 2, 3, 1)
    if frames.shape[3] not in _COLOURS:
        raise DataError(f"{what}: expected 1, 3 or 4 colours")
    if frames.shape[1] * frames.shape[2] > MAX_IMAGE_PIXELS:
        raise DataError(f"{what}: more than {MAX_IMAGE_PIXELS:,} pixels each")
    if frames.dtype.kind == "f":
        if not (np.isfinite(frames).all() and frames.min() >= 0 and frames.max() <= 1):
            raise DataError(f"{what}: fractions of a picture are from 0 to 1")
        frames = np.rint(frames * 255).astype(np.uint8)
    if frames.dtype != np.uint8:
        raise DataError(f"{what}: expected bytes, or fractions from 0 to 1")
    if frames.shape[3] == 1:
        frames = np.repeat(frames, 3, axis=3)
    return np.ascontiguousarray(frames[..., :3])
