"""Decoded frames -> pictures as a player shows them: turned, mirrored, with square pixels.

A display matrix sends the pixel in column p, row q to column a p + c q, row b p + d q (downwards):

    a, d  not 0    a column stays one:     mirrored left to right if a < 0, upside down if d < 0
    b, c  not 0    it becomes a row:       transposed, then
                                           mirrored left to right if c < 0, upside down if b < 0
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from ebwm_scale.data.prepare.fields import upper_field

MAX_PIXELS = 2**26  # of a picture, before and after its pixels are made square: twice 8K
_LONGEST_SIDE = 2**15
_TOLERANCE = 0.0175  # tan(1 degree): a matrix nearer to a quarter turn than this is one


@dataclass(frozen=True)
class Orientation:
    """transposed, then mirrored: the eight ways in which a picture can lie."""

    transposed: bool = False
    left_right: bool = False
    upside_down: bool = False

    def apply(self, picture: np.ndarray) -> np.ndarray:
        """A picture (height, width, 3) as it is shown; a view."""
        if self.transposed:
            picture = picture.swapaxes(0, 1)
        if self.left_right:
            picture = picture[:, ::-1]
        if self.upside_down:
            picture = picture[::-1]
        return picture


_QUARTER_TURNS = (  # counter-clockwise
    Orientation(),
    Orientation(transposed=True, upside_down=True),
    Orientation(left_right=True, upside_down=True),
    Orientation(transposed=True, left_right=True),
)


def orientation_of(matrix: bytes | None) -> Orientation:
    """The orientation that a display matrix (nine 32-bit integers, as FFmpeg gives it) asks for.

    A matrix of zeros turns nothing, as in players. Raises ValueError for other than quarter turns.
    """
    if matrix is None or len(matrix) < 36:
        return Orientation()
    a, b, _, c, d, *_ = struct.unpack("=9i", matrix[:36])
    straight, crossed = max(abs(a), abs(d)), max(abs(b), abs(c))
    if straight == crossed == 0:
        return Orientation()
    if crossed <= _TOLERANCE * straight:
        return Orientation(False, a < 0, d < 0)
    if straight <= _TOLERANCE * crossed:
        return Orientation(True, c < 0, b < 0)
    raise ValueError("its display matrix turns it by something else than quarter turns")


@dataclass(frozen=True)
class Shape:
    """How a stored frame becomes a picture.

    width, height: as stored; pixel_aspect: width of a pixel over its height.
    """

    width: int
    height: int
    pixel_aspect: Fraction
    orientation: Orientation

    def scaled(self) -> tuple[int, int]:
        """(width, height) with square pixels, before turning; the shorter side is lengthened."""
        if self.pixel_aspect >= 1:
            return round(self.width * self.pixel_aspect), self.height
        return self.width, round(self.height / self.pixel_aspect)

    def check(self) -> None:
        """ValueError for a picture that is too large to be held in memory."""
        for width, height in ((self.width, self.height), self.scaled()):
            if width * height > MAX_PIXELS or max(width, height) > _LONGEST_SIDE:
                raise ValueError(
                    f"its pictures are {width} x {height}: at most {MAX_PIXELS:,} pixels and "
                    f"{_LONGEST_SIDE:,} a side are read"
                )

    def picture(self, frame) -> np.ndarray:
        """A decoded frame as uint8 (height, width, 3), as it is shown."""
        width, height = self.scaled()
        if frame.interlaced_frame:
            frame = upper_field(frame)
        pixels = frame.reformat(width=width, height=height, format="rgb24").to_ndarray()
        return np.ascontiguousarray(self.orientation.apply(pixels))


def pixel_aspect_of(ratio: Fraction | None) -> Fraction:
    """A sample aspect ratio as it is used: 1 where the file has none."""
    return ratio if ratio is not None and ratio > 0 else Fraction(1)


def shape_of(frame, ratio: Fraction | None) -> Shape:
    """The shape of a decoded frame; ratio: its sample aspect ratio. Raises ValueError."""
    shape = Shape(frame.width, frame.height, pixel_aspect_of(ratio), _orientation_of(frame))
    shape.check()
    return shape


def _orientation_of(frame) -> Orientation:
    from av.sidedata.sidedata import Type

    try:
        side_data = list(frame.side_data)
    except ValueError:
        # The frame carries data of a kind that PyAV does not know; then it gives only the angle.
        return _QUARTER_TURNS[round(frame.rotation / 90) % 4]
    matrices = [bytes(data) for data in side_data if data.type is Type.DISPLAYMATRIX]
    return orientation_of(matrices[-1] if matrices else None)
