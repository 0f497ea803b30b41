"""Frames as files for people: a contact sheet, a gif, an mp4.

Predicted frames have a coloured border.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ebwm_scale.core.errors import UserError

BORDER = 3
COLOUR = (214, 120, 0)
MIN_SIDE = 96
SUFFIXES = (".png", ".gif", ".mp4")


def write_continuation(
    path: Path, context: np.ndarray, predicted: np.ndarray, *, interval_s: float
) -> None:
    """context (n, height, width, 3) and predicted (m, height, width, 3) uint8 as .png (both in
    rows), .gif or .mp4. Raises UserError.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: unknown kind of file; use {', '.join(SUFFIXES)}")
    frames = [enlarged(frame) for frame in context] + [
        bordered(enlarged(frame)) for frame in predicted
    ]
    try:
        {".png": _sheet, ".gif": _gif, ".mp4": _mp4}[path.suffix.lower()](path, frames, interval_s)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def write_rollout(
    path: Path,
    truth: np.ndarray,
    futures: Sequence[np.ndarray],
    num_context: int,
    *,
    interval_s: float,
) -> None:
    """What was (F, height, width, 3) above imagined futures (F - num_context, ...) of it, uint8.

    .png: a row each, time to the right; .gif and .mp4: one above the other, moving. Imagined frames
    have the border. Raises UserError.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: unknown kind of file; use {', '.join(SUFFIXES)}")
    rows = [[enlarged(frame) for frame in truth]]
    for future in futures:
        seen = rows[0][:num_context]
        rows.append([*seen, *(bordered(enlarged(frame)) for frame in future)])
    try:
        if path.suffix.lower() == ".png":
            _grid(path, rows)
            return
        moments = [np.concatenate(moment) for moment in zip(*rows)]
        {".gif": _gif, ".mp4": _mp4}[path.suffix.lower()](path, moments, interval_s)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def _grid(path: Path, rows: Sequence[Sequence[np.ndarray]]) -> None:
    from PIL import Image

    height, width = rows[0][0].shape[:2]
    columns = len(rows[0])
    sheet = np.full((len(rows) * (height + 4), columns * (width + 4), 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, frame in enumerate(row):
            top, left = i * (height + 4) + 2, j * (width + 4) + 2
            sheet[top : top + height, left : left + width] = frame
    Image.fromarray(sheet).save(path)


def enlarged(frame: np.ndarray) -> np.ndarray:
    factor = max(1, -(-MIN_SIDE // min(frame.shape[:2])))
    return frame.repeat(factor, 0).repeat(factor, 1)


def bordered(frame: np.ndarray) -> np.ndarray:
    frame = frame.copy()
    for side in (np.s_[:BORDER], np.s_[-BORDER:], np.s_[:, :BORDER], np.s_[:, -BORDER:]):
        frame[side] = COLOUR
    return frame


def _sheet(path: Path, frames: list[np.ndarray], interval_s: float) -> None:
    from PIL import Image

    columns = min(8, len(frames))
    rows = -(-len(frames) // columns)
    height, width = frames[0].shape[:2]
    sheet = np.full((rows * (height + 4), columns * (width + 4), 3), 255, np.uint8)
    for i, frame in enumerate(frames):
        top, left = i // columns * (height + 4) + 2, i % columns * (width + 4) + 2
        sheet[top : top + height, left : left + width] = frame
    Image.fromarray(sheet).save(path)


def _gif(path: Path, frames: list[np.ndarray], interval_s: float) -> None:
    from PIL import Image

    first, *rest = [Image.fromarray(frame) for frame in frames]
    first.save(
        path, save_all=True, append_images=rest, duration=max(20, round(1000 * interval_s)), loop=0
    )


def _mp4(path: Path, frames: list[np.ndarray], interval_s: float) -> None:
    from fractions import Fraction

    from ebwm_scale.data.prepare.decoding import import_av

    av = import_av()
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "mpeg4", rate=Fraction(1 / interval_s).limit_denominator(1000)
        )
        height, width = (side - side % 2 for side in frames[0].shape[:2])
        stream.width = width
        stream.height = height
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 8_000_000
        for frame in frames:
            for packet in stream.encode(
                av.VideoFrame.from_ndarray(
                    np.ascontiguousarray(frame[:height, :width]), format="rgb24"
                )
            ):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
