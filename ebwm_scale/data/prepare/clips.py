"""Videos -> frames at a chosen interval -> clips, one file per video.

    video     |....|....|....|....||....|....|....|....|  pictures in pieces (decoding.py)
    frames    a    b    c    d     e    f    g    h       of each piece at t, t + interval, ...: the
                                                          one on screen then, resized and cropped
    clips     [a    b    c    d]                          context_length + 1 frames of one piece,
                                   [e    f    g    h]     a new clip every `stride` seconds

A part file holds a video's frames once, however many clips share them: a tar of 000000.jpg ... and
clips.json, which also says what was left out. It is written under another name and renamed, so a
killed preparation goes on with the videos that are not done yet.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import math
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ebwm_scale.core.disk import replacement
from ebwm_scale.core.errors import DataError
from ebwm_scale.data.format.content import _SUFFIX, _pillow, encode_image
from ebwm_scale.data.format.tar import walk
from ebwm_scale.data.prepare.decoding import not_watched
from ebwm_scale.data.prepare.findings import Findings
from ebwm_scale.data.prepare.video_sources import (
    IMAGE_RATE,
    OnScreen,
    Video,
    pictures_of_file,
)

_PART_FORMAT = 3  # counts changes of what a part file of the same video and settings holds
_EPSILON_S = 1e-3  # a frame whose time stamp is rounded to just after t still counts as shown at t


@dataclass(frozen=True)
class ClipConfig:
    """How clips are cut.

    stored: jpeg or webp; quality: of it; crops: windows taken along the longer side; zooms: 1 for
    windows as large as the frame allows, 2 for half of that, with twice as many windows along each
    side, and so on. stream: number of the video stream in each file, None for the one that players
    show. image_rate: images a second, of folders of images.
    """

    context_length: int
    interval_s: float
    stride_s: float
    height: int
    width: int
    crops: int
    zooms: tuple[int, ...]
    stored: str
    quality: int
    stream: int | None = None
    image_rate: float = IMAGE_RATE

    @property
    def span_s(self) -> float:
        """From a clip's first frame to its last."""
        return self.context_length * self.interval_s

    @property
    def identity(self) -> str:
        values = {**dataclasses.asdict(self), "format": _PART_FORMAT}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Clip:
    """frames: numbers of the part's frames, first to last. zoom, crop: which window."""

    start_s: float
    zoom: int
    crop: int
    frames: tuple[int, ...]


def make_part(
    video: Video, part: Path, config: ClipConfig, moved: Callable[[], None] = not_watched
) -> None:
    """Decode a video and write its part file; moved: called at each step.

    Raises DataError if nothing of it can be decoded, or no piece is as long as a clip.
    """
    findings = Findings()
    with (
        replacement(part) as temporary,
        tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        with video.shown(
            part.parent, findings, moved, stream=config.stream, image_rate=config.image_rate
        ) as shown:
            clips = _write_frames(video, shown, config, tar, findings, moved)
        about = {
            "clips": [dataclasses.asdict(clip) for clip in clips],
            "findings": dataclasses.asdict(findings),
        }
        _add(tar, "clips.json", json.dumps(about).encode())


def read_clips(part: Path) -> list[Clip]:
    """The clips of a part file."""
    return [
        Clip(c["start_s"], c["zoom"], c["crop"], tuple(c["frames"])) for c in _about(part)["clips"]
    ]


def read_findings(part: Path) -> Findings:
    """What was left out or put right when a part file was made."""
    return Findings(**_about(part)["findings"])


def _about(part: Path) -> dict[str, Any]:
    with tarfile.open(part, "r:") as tar:
        file = tar.extractfile("clips.json")
        if file is None:
            raise DataError(f"{part}: clips.json is no file: damaged; delete it")
        return json.load(file)


def read_frames(part: Path) -> list[bytes]:
    """The encoded frames of a part file; DataError if it is damaged."""
    with part.open("rb") as file:
        return [member.content for member in walk(file, str(part)) if member.key != "clips"]


@dataclass(frozen=True)
class Shown:
    """What is on screen at a piece's start + offsets[offset] + k * interval.

    pixels: (height, width, 3) uint8.
    """

    piece: int
    piece_start_s: float
    offset: int
    k: int
    pixels: np.ndarray


def shown_at(
    shown: Iterable[OnScreen], interval_s: float, offsets_s: Sequence[float]
) -> Iterator[Shown]:
    """What is on screen in each piece of a video at offset + k * interval after its start.

    shown: of decoding.pictures. Only pictures that are asked for are converted to pixels.
    """
    for piece, group in itertools.groupby(shown, key=lambda picture: picture.piece):
        start_s: float | None = None
        waiting = [0] * len(offsets_s)  # the next k of each offset
        for picture in group:
            start_s = picture.begin_s if start_s is None else start_s
            until_s = picture.end_s - start_s - _EPSILON_S
            due = []
            for i, offset_s in enumerate(offsets_s):
                end = max(waiting[i], math.ceil((until_s - offset_s) / interval_s))
                due += [(offset_s + k * interval_s, i, k) for k in range(waiting[i], end)]
                waiting[i] = end
            if due:
                pixels = picture.pixels()
            for _, i, k in sorted(due):
                yield Shown(piece, start_s, i, k, pixels)


def frames_from(
    path: Path,
    start_s: float,
    interval_s: float,
    count: int,
    height: int,
    width: int,
    findings: Findings,
    moved: Callable[[], None] = not_watched,
) -> np.ndarray:
    """Up to `count` frames (n, height, width, 3) uint8 of one piece, an interval apart.

    start_s: of the first. Each is the middle of the picture, as the first window of a clip is.
    findings: filled in, as far as the video was read. Raises DataError.
    """
    frames: list[np.ndarray] = []
    piece: int | None = None
    for picture in pictures_of_file(path, findings, moved):
        if frames and picture.piece != piece:
            break
        piece = picture.piece
        pixels: np.ndarray | None = None
        while len(frames) < count and start_s < picture.end_s - _EPSILON_S:
            if start_s < picture.begin_s - _EPSILON_S and not frames:
                start_s = picture.begin_s  # between two pieces, or before the first picture
            if pixels is None:
                pixels = resize_and_crop(picture.pixels(), height, width, 1)[0][1]
            frames.append(pixels)
            start_s += interval_s
        if len(frames) == count:
            break
    return np.stack(frames) if frames else np.zeros((0, height, width, 3), np.uint8)


def resize_and_crop(
    frame: np.ndarray, height: int, width: int, crops: int, zooms: Sequence[int] = (1,)
) -> list[tuple[int, np.ndarray]]:
    """(zoom, window) for all windows of a frame, scaled to height x width: for each zoom z, z of
    them along the side that fits and crops * z along the other, evenly spaced.
    """
    image = _pillow().fromarray(frame)
    rows, columns = frame.shape[:2]
    results = []
    for zoom in zooms:
        scale = min(rows / height, columns / width) / zoom
        window = height * scale, width * scale
        along = (crops * zoom, zoom) if rows / height > columns / width else (zoom, crops * zoom)
        for top in _places(rows - window[0], along[0]):
            for left in _places(columns - window[1], along[1]):
                box = (left, top, left + window[1], top + window[0])
                results.append(
                    (
                        zoom,
                        np.asarray(
                            image.resize((width, height), _pillow().Resampling.BILINEAR, box=box)
                        ),
                    )
                )
    return results


def _places(room: float, count: int) -> list[float]:
    """Where `count` windows begin in the room that is left over; one stands in the middle, and
    where there is no room there is one.
    """
    if count == 1 or room < 1:
        return [max(room, 0.0) / 2]
    return [room * i / (count - 1) for i in range(count)]


def _write_frames(
    video: Video,
    shown: Iterable[OnScreen],
    config: ClipConfig,
    tar: tarfile.TarFile,
    findings: Findings,
    moved: Callable[[], None],
) -> list[Clip]:
    """Writes every frame that a clip may need, once, and says which clip needs which."""
    # Clips start every stride; those whose starts differ by whole intervals share frames. So there
    # are few different phases.
    phases = sorted(
        {
            round(math.fmod(k * config.stride_s, config.interval_s), 6)
            for k in range(_phases(config))
        }
    )
    clips: list[Clip] = []
    count = 0
    length_s = longest_s = 0.0  # of all pieces, of the longest

    def watched() -> Iterator[OnScreen]:
        nonlocal length_s, longest_s
        start_s, piece = 0.0, None
        for picture in shown:
            if picture.piece != piece:
                start_s, piece = picture.begin_s, picture.piece
            length_s += picture.end_s - picture.begin_s
            longest_s = max(longest_s, picture.end_s - start_s)
            yield picture

    chosen = shown_at(watched(), config.interval_s, phases)
    for _, group in itertools.groupby(chosen, key=lambda one: one.piece):
        numbers: list[dict[int, int]] = [{} for _ in phases]  # k -> number of the first window
        for one in group:
            numbers[one.offset][one.k] = count
            windows = resize_and_crop(
                one.pixels, config.height, config.width, config.crops, config.zooms
            )
            for _, image in windows:
                moved()
                content = encode_image(image, config.stored, config.quality)
                _add(tar, f"{count:08d}.{_SUFFIX[config.stored]}", content)
                count += 1
        zooms = [zoom for zoom, _ in windows]  # the same for all pictures of a piece
        clips += _clips_of_piece(config, phases, numbers, zooms, one.piece_start_s)
    if not clips:
        raise DataError(_too_short(video.path, config, length_s, longest_s, findings))
    return clips


def _clips_of_piece(
    config: ClipConfig,
    phases: Sequence[float],
    numbers: Sequence[dict[int, int]],
    zooms: Sequence[int],
    piece_start_s: float,
) -> list[Clip]:
    """The clips that begin every stride in a piece, as long as it has their frames."""
    clips: list[Clip] = []
    index = 0
    while True:
        start_s = index * config.stride_s
        first = math.floor(start_s / config.interval_s + 1e-6)
        remainder = round(start_s - first * config.interval_s, 6)
        distances = [abs(phase_s - remainder) for phase_s in phases]
        in_file = numbers[distances.index(min(distances))]
        wanted = range(first, first + config.context_length + 1)
        if any(k not in in_file for k in wanted):
            return clips
        for crop, zoom in enumerate(zooms):
            frames = tuple(in_file[k] + crop for k in wanted)
            clips.append(Clip(round(piece_start_s + start_s, 6), zoom, crop, frames))
        index += 1


def _too_short(
    path: Path, config: ClipConfig, length_s: float, longest_s: float, findings: Findings
) -> str:
    long = f"{length_s:.2f} s"
    if length_s - longest_s > _EPSILON_S:
        long = f"{longest_s:.2f} s without a break ({length_s:.2f} s in all)"
    need = f"a clip of {config.context_length} + 1 frames, {config.interval_s:g} s apart"
    about = [
        f"{path}: {long} long: shorter than {need} (the last at {config.span_s:g} s)",
        *findings.phrases(),
    ]
    return "; ".join(about)


def _phases(config: ClipConfig) -> int:
    """After how many strides the starts fall on the same times again."""
    for count in range(1, 1000):
        if abs(math.remainder(count * config.stride_s, config.interval_s)) < 1e-6:
            return count
    raise DataError(
        f"stride {config.stride_s} s and interval {config.interval_s} s have no common multiple "
        "below 1000 strides; use a simple fraction"
    )


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
