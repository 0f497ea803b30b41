"""Videos that are no stream of a decoder: folders of pictures, and animated WebP.

    walk/     1.png  2.png  10.png      in natural order, `rate` pictures a second
    a.webp    pictures with times of their own (FFmpeg decodes none, Pillow does)

A picture that cannot be decoded is left out and counted, and none that follows continues the ones
before it; so it is where the size changes.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.plain_text import shorten
from ebwm_scale.data.format.content import _pillow
from ebwm_scale.data.prepare.findings import Findings
from ebwm_scale.data.prepare.timeline import Timeline
from ebwm_scale.data.prepare.upright import MAX_PIXELS
from ebwm_scale.data.prepare.video_places import Place

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
# Only these: the plug-in for EPS would start another program.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM")
_ANIMATION = 0x02  # in the flags of a WebP's first chunk
_SHORTEST_S = 0.011  # what is shown for less is shown for a tenth of a second, as in browsers
_INSTEAD_S = 0.1


@dataclass(frozen=True)
class Still:
    """What is on screen from begin_s to end_s; see decoding.Picture."""

    piece: int
    begin_s: float
    end_s: float
    image: np.ndarray

    def pixels(self) -> np.ndarray:
        """uint8 (height, width, 3)."""
        return self.image


def natural_order(name: str) -> tuple:
    """A key for sorting: 2.png before 10.png."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], name


def is_animated_webp(place: Place) -> bool:
    """Whether a .webp holds more than one picture; False where it cannot be read."""
    if PurePosixPath(place.member or place.path.name).suffix.lower() != ".webp":
        return False
    try:
        with place.open() as file:
            head = file.read(21)
    except OSError:
        return False
    is_webp = head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X"
    return len(head) == 21 and is_webp and bool(head[20] & _ANIMATION)


def pictures_of_images(
    images: Sequence[Place], rate: float, findings: Findings, moved: Callable[[], None]
) -> Iterator[Still]:
    """The pictures of a folder, in the order given, each shown for 1 / rate seconds."""
    piece = 0
    last: np.ndarray | None = None  # of this piece
    is_begun = False
    for number, place in enumerate(images):
        moved()
        try:
            image = _decoded(place)
        except OSError:
            findings.damaged_images += 1
            findings.damage(number / rate)
            last = None
            continue
        if last is not None and image.shape != last.shape:
            findings.changes += 1
        if is_begun and (last is None or image.shape != last.shape):
            piece += 1
        last = image
        is_begun = True
        yield Still(piece, number / rate, (number + 1) / rate, image)
    if not is_begun:
        raise DataError(f"{images[0].path}: none of {len(images)} pictures can be decoded")


def pictures_of_webp(path: Path, findings: Findings, moved: Callable[[], None]) -> Iterator[Still]:
    """The pictures of an animated WebP, each for as long as it says; of a damaged one those before
    the damage.
    """
    waiting: tuple[int, float, np.ndarray, float] | None = None
    timeline: Timeline | None = None
    piece = 0
    stamp_s = 0.0
    try:
        film, is_whole = _open_webp(path.read_bytes(), moved)
        _check_size(film)
        for number in range(getattr(film, "n_frames", 1)):
            moved()
            film.seek(number)
            film.load()
            lasts_s = float(film.info.get("duration") or 0) / 1000
            if lasts_s < _SHORTEST_S:
                lasts_s = _INSTEAD_S
            if timeline is None:
                timeline = Timeline(lasts_s, findings)
            time_s, continues = timeline.place(stamp_s)
            if waiting is not None:
                yield _until(waiting, time_s)
            piece += not continues
            waiting = piece, time_s, _upright(film), lasts_s
            stamp_s += lasts_s
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        if waiting is None:
            raise DataError(f"{path}: cannot be decoded: {shorten(str(error))}") from None
        is_whole = False
    if not is_whole:
        findings.unreadable += 1
        findings.damage(stamp_s)
    if waiting is not None and timeline is not None:
        yield _until(waiting, waiting[1] + min(waiting[3], timeline.longest_s))


def _open_webp(content: bytes, moved: Callable[[], None]) -> tuple[Any, bool]:
    """(Pillow's image of a WebP, whether it is the whole file).

    Its decoder refuses a file in which any picture is damaged, so the longest beginning that it
    takes is looked for: chunks of a picture each, of which every one more can only be worse.
    """
    pillow = _pillow()

    def opened(part: bytes):
        moved()
        return pillow.open(io.BytesIO(part), formats=("WEBP",))

    try:
        return opened(content), True
    except OSError as error:
        first_error = error
    ends = _chunk_ends(content)
    low, high = 0, len(ends)  # the first `low` chunks can be opened, `high` + 1 of them cannot
    film = None
    while low < high:
        middle = (low + high + 1) // 2
        body = content[8 : ends[middle - 1]]
        try:
            film = opened(b"RIFF" + struct.pack("<I", len(body)) + body)
            low = middle
        except OSError:
            high = middle - 1
    if film is None:
        raise first_error
    return film, False


def _chunk_ends(content: bytes) -> list[int]:
    """Where each whole chunk of a RIFF file ends."""
    ends = []
    at = 12  # RIFF, size, WEBP
    while at + 8 <= len(content):
        size = struct.unpack_from("<I", content, at + 4)[0]
        at += 8 + size + size % 2
        if at > len(content):
            break
        ends.append(at)
    return ends


def _until(shown: tuple[int, float, np.ndarray, float], end_s: float) -> Still:
    piece, begin_s, image, _ = shown
    return Still(piece, begin_s, end_s, image)


def _decoded(place: Place) -> np.ndarray:
    """An image as it is shown, uint8 (height, width, 3); OSError says why there is none."""
    pillow = _pillow()
    try:
        with place.open() as file, pillow.open(file, formats=_FORMATS) as image:
            _check_size(image)
            return _upright(image)
    except (ValueError, SyntaxError, EOFError, pillow.DecompressionBombError) as error:
        raise OSError(f"cannot be decoded: {shorten(str(error))}") from None


def _check_size(image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise OSError(f"is {width} x {height}: at most {MAX_PIXELS:,} pixels are read")


def _upright(image) -> np.ndarray:
    """uint8 (height, width, 3): turned as the camera says, over black where it is transparent."""
    from PIL import ImageOps

    pillow = _pillow()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which convert would cut off at 255
        grey = np.clip(np.asarray(image, dtype=np.int64) >> 8, 0, 255).astype(np.uint8)
        return grey[..., None].repeat(3, 2)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        black = pillow.new("RGBA", image.size, (0, 0, 0, 255))
        image = pillow.alpha_composite(black, image)
    return np.array(image.convert("RGB"))
