"""Videos -> frames at a chosen interval -> clips, one file per video.

    video     |....|....|....|....|....|....|....|....|      decoded with PyAV, every frame
    frames    a    b    c    d    e    f    g    h    i      at t, t + interval, ...: the one on screen at that time, resized and cropped
    clips     [a    b    c    d    e]                        context_length + 1 frames, a new clip every `stride` seconds
                             [d    e    f    g    h] ...

A part file holds a video's frames once, however many clips share them: a tar of 000000.jpg ... and clips.json. It is written under another
name and renamed, so a killed preparation goes on with the videos that are not done yet.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import DataError
from .content import _SUFFIX, _pillow, encode_image
from .documents import Report
from .manifest import file_sha256
from .tar import walk

VIDEO_SUFFIXES = (
    ".mp4",
    ".m4v",
    ".mov",
    ".mkv",
    ".webm",
    ".avi",
    ".mpg",
    ".mpeg",
    ".ts",
    ".wmv",
    ".flv",
    ".ogv",
    ".gif",
)
_EPSILON_S = 1e-3  # a frame whose time stamp is rounded to just after t still counts as shown at t


@dataclass(frozen=True)
class Video:
    """A file, known by the hash of its content."""

    name: str
    path: Path
    digest: str


@dataclass(frozen=True)
class ClipRules:
    """How clips are cut. stored: jpeg or webp; quality: of it; crops: windows taken along the longer side; zooms: 1 for windows as large as
    the frame allows, 2 for half of that, with twice as many windows along each side, and so on."""

    context_length: int
    interval_s: float
    stride_s: float
    height: int
    width: int
    crops: int
    zooms: tuple[int, ...]
    stored: str
    quality: int

    @property
    def span_s(self) -> float:
        """From a clip's first frame to its last."""
        return self.context_length * self.interval_s

    @property
    def identity(self) -> str:
        return hashlib.sha256(
            json.dumps(dataclasses.asdict(self), sort_keys=True).encode()
        ).hexdigest()[:16]


@dataclass(frozen=True)
class Clip:
    """frames: numbers of the part's frames, first to last. zoom, crop: which window."""

    start_s: float
    zoom: int
    crop: int
    frames: tuple[int, ...]


def find_videos(inputs: Sequence[str | Path], *, report: Report = print) -> list[Video]:
    """All videos in the given files and folders (recursive), one of each content, sorted by it. Raises DataError when there is none."""
    found: dict[str, Video] = {}
    for source in map(Path, inputs):
        if not source.exists():
            raise DataError(
                f"{source}: no such file or folder; give video files, or folders with them"
            )
        paths = (
            [source]
            if source.is_file()
            else [
                p
                for p in sorted(source.rglob("*"))
                if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file()
            ]
        )
        for path in paths:
            try:
                digest = file_sha256(path)
            except OSError as error:
                report(f"warning: {path}: skipped: {error.strerror}")
                continue
            name = path.name if source.is_file() else path.relative_to(source).as_posix()
            if digest in found:
                report(f"{path}: the same bytes as {found[digest].path}, taken once")
            found.setdefault(digest, Video(name, path, digest))
    if not found:
        raise DataError(
            f"{', '.join(map(str, inputs)) or 'no input'}: no video found; looked for {', '.join('*' + s for s in VIDEO_SUFFIXES)}"
        )
    return sorted(found.values(), key=lambda video: video.digest)


def make_part(video: Video, part: Path, rules: ClipRules) -> None:
    """Decode a video and write its part file. Raises DataError if it cannot be decoded to its end, or is shorter than a clip."""
    partial = part.with_name(f".{part.name}.{os.getpid()}")
    try:
        with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
            clips = _write_frames(video, rules, tar)
            _add(
                tar, "clips.json", json.dumps([dataclasses.asdict(clip) for clip in clips]).encode()
            )
        os.replace(partial, part)
    finally:
        partial.unlink(missing_ok=True)


def read_clips(part: Path) -> list[Clip]:
    """The clips of a part file."""
    with tarfile.open(part, "r:") as tar:
        return [
            Clip(c["start_s"], c["zoom"], c["crop"], tuple(c["frames"]))
            for c in json.load(tar.extractfile("clips.json"))
        ]


def read_frames(part: Path) -> list[bytes]:
    """The encoded frames of a part file; DataError if it is damaged."""
    with part.open("rb") as file:
        return [member.content for member in walk(file, str(part)) if member.key != "clips"]


def shown_at(
    path: Path, interval_s: float, offsets_s: Sequence[float]
) -> Iterator[tuple[int, int, "np.ndarray"]]:
    """(offset number, k, frame) for each time offset + k * interval within a video: the frame (height, width, 3) uint8 on screen then.

    Times count from the first frame. Raises DataError if the video cannot be opened or decoded.
    """
    av = _av()
    waiting = [0] * len(offsets_s)  # the next k of each offset
    last_time, last, step = None, None, None

    def due(until: float) -> Iterator[tuple[int, int]]:
        """Which (offset, k) lie before `until`, in the order of time."""
        times = [
            (offsets_s[i] + k * interval_s, i, k)
            for i in range(len(offsets_s))
            for k in range(
                waiting[i],
                max(waiting[i], math.ceil((until - _EPSILON_S - offsets_s[i]) / interval_s)),
            )
        ]
        for _, i, k in sorted(times):
            waiting[i] = k + 1
            yield i, k

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path}: has no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            rate = float(stream.average_rate or stream.guessed_rate or 25)
            first = None
            for number, frame in enumerate(container.decode(stream)):
                time = frame.time if frame.time is not None else number / rate
                first = time if first is None else first
                time -= first
                if last is not None:
                    for i, k in due(time):
                        yield i, k, last
                    step = time - last_time
                last_time, last = time, frame.to_ndarray(format="rgb24")
    except (av.FFmpegError, OSError, ValueError) as error:
        at = "" if last_time is None else f" after {last_time:.1f} s"
        raise DataError(f"{path}: cannot be decoded{at}: {' '.join(str(error).split())}") from None
    if last is None:
        raise DataError(f"{path}: holds no frame")
    for i, k in due(last_time + (step or 1 / rate)):
        yield i, k, last


def resize_and_crop(
    frame: np.ndarray, height: int, width: int, crops: int, zooms: Sequence[int] = (1,)
) -> list[tuple[int, np.ndarray]]:
    """(zoom, window) for all windows of a frame, scaled to height x width: for each zoom z, z of them along the side that fits and crops * z along the other,
    evenly spaced."""
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
    """Where `count` windows begin in the room that is left over; one stands in the middle, and where there is no room there is one."""
    if count == 1 or room < 1:
        return [max(room, 0.0) / 2]
    return [room * i / (count - 1) for i in range(count)]


def _write_frames(video: Video, rules: ClipRules, tar: tarfile.TarFile) -> list[Clip]:
    """Writes every frame that a clip needs, once, and says which clip needs which."""
    # Clips start every stride; those whose starts differ by whole intervals share frames. So there are few different phases.
    phases = sorted(
        {round(math.fmod(k * rules.stride_s, rules.interval_s), 6) for k in range(_phases(rules))}
    )
    numbers: list[dict[int, int]] = [
        {} for _ in phases
    ]  # of each phase: k -> number of the first window's frame
    count, windows = 0, []
    for phase, k, frame in shown_at(video.path, rules.interval_s, phases):
        numbers[phase][k] = count
        images = resize_and_crop(frame, rules.height, rules.width, rules.crops, rules.zooms)
        zooms = [zoom for zoom, _ in images]
        if windows not in ([], zooms):
            raise DataError(f"{video.path}: its frames change in size")
        windows = zooms
        for _, image in images:
            _add(
                tar,
                f"{count:08d}.{_SUFFIX[rules.stored]}",
                encode_image(image, rules.stored, rules.quality),
            )
            count += 1
    clips, start = [], 0
    while True:
        start_s = start * rules.stride_s
        first = math.floor(start_s / rules.interval_s + 1e-6)
        remainder = round(start_s - first * rules.interval_s, 6)
        phase = min(range(len(phases)), key=lambda i: abs(phases[i] - remainder))
        wanted = range(first, first + rules.context_length + 1)
        if any(k not in numbers[phase] for k in wanted):
            break
        clips += [
            Clip(start_s, zoom, crop, tuple(numbers[phase][k] + crop for k in wanted))
            for crop, zoom in enumerate(windows)
        ]
        start += 1
    if not clips:
        raise DataError(
            f"{video.path}: shorter than a clip of {rules.context_length} + 1 frames, {rules.interval_s} s apart ({rules.span_s:g} s)"
        )
    return clips


def _phases(rules: ClipRules) -> int:
    """After how many strides the starts fall on the same times again."""
    for count in range(1, 1000):
        if abs(math.remainder(count * rules.stride_s, rules.interval_s)) < 1e-6:
            return count
    raise DataError(
        f"stride {rules.stride_s} s and interval {rules.interval_s} s have no common multiple below 1000 strides; use a simple fraction"
    )


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _av():
    try:
        import av
    except ImportError:
        raise DataError(
            'decoding videos needs the package av (PyAV); install it with: python -m pip install "ebwm_scale[video]"'
        ) from None
    av.logging.set_level(av.logging.PANIC)  # what cannot be decoded is reported by us
    return av
