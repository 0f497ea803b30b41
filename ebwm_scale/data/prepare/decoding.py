"""A video file -> the pictures that a player shows, in order, on one clock.

    file --demux--> packets --decode--> frames --Timeline, Soundness, Shape--> pictures in pieces

A piece is shown without a break. A new one begins after a join, a gap, damage, or a change of size
or orientation, and no clip crosses the border. A decoder has no threads of its own: an error
belongs to the packet just given, and nothing is waited for when decoding is left early. Several
videos are decoded at a time instead (data/prepare/workers.py).

This does not choose pictures and does not resize them for a model: that is data/prepare/clips.py.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.plain_text import shorten
from ebwm_scale.data.prepare.findings import Findings
from ebwm_scale.data.prepare.soundness import Judged, Soundness
from ebwm_scale.data.prepare.timeline import Timeline
from ebwm_scale.data.prepare.upright import MAX_PIXELS, Orientation, Shape, shape_of

# What FFmpeg may take a file for. Play lists (HLS, DASH, concat) are none of it: they open other
# files and addresses.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegvideo,mpegts,asf,flv,ogg,gif,"
    "h264,hevc,ivf,obu,mxf,dv,rm,nut,wav,mp3,aac,flac"
)
_HIDDEN_PICTURES = ("vp8", "vp9", "libvpx", "libvpx-vp9", "av1", "libdav1d")  # code some of them
_MAX_FAILED_READS = 3  # in a row
_DEFAULT_RATE = 25.0  # pictures a second, where a file declares none


def not_watched() -> None:
    """What to call at each step of a decoding that nobody watches over."""


@dataclass(frozen=True)
class Picture:
    """What is on screen from begin_s to end_s: seconds since the first picture, gaps closed."""

    piece: int  # counts from 0
    begin_s: float
    end_s: float
    shape: Shape
    frame: Any  # av.VideoFrame

    def pixels(self) -> np.ndarray:
        """uint8 (height, width, 3), upright; converted anew at each call."""
        return self.shape.picture(self.frame)


def pictures(
    path: Path,
    findings: Findings | None = None,
    moved: Callable[[], None] = not_watched,
    *,
    number: int | None = None,
) -> Iterator[Picture]:
    """The sound pictures of a video; findings: filled in on the way; moved: called at each packet.

    number: which of its video streams, from 0, covers not counted; default: the one that a player
    shows. Raises DataError if the file is no video, or no sound picture comes out of it.
    """
    av = import_av()
    findings = Findings() if findings is None else findings
    try:
        with _open(av, path) as container:
            stream = _stream(path, container, number, findings)
            yield from _pictures(av, path, container, stream, findings, moved)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be decoded: {_words(error)}") from None


def import_av():
    """The package av, with FFmpeg's messages off and no callback for them.

    A callback (av.logging.set_level) takes the interpreter's lock in FFmpeg's threads, while the
    thread that waits for them to end may hold it: decoding would stand still for ever.
    """
    try:
        import av
    except ImportError:
        raise DataError(
            "decoding videos needs the package av (PyAV); install it with: "
            'python -m pip install "ebwm_scale[video]"'
        ) from None
    av.logging.set_level(None)
    return av


def _open(av, path: Path):
    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty (0 bytes)")
    try:
        # "file:" because a name like a:b.mp4 would be taken for an address
        return av.open(
            f"file:{path}", options={"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
        )
    except av.ArgumentError:
        raise DataError(
            f"{path}: is of a kind that is not opened; use mp4, mov, mkv, webm, avi, mpeg, ts, "
            "wmv, flv, ogv or gif"
        ) from None


def _stream(path: Path, container, number: int | None, findings: Findings):
    """The video stream of that number, else the one that a player shows: never a cover picture or
    a preview.
    """
    from av.stream import Disposition

    not_the_video = Disposition.attached_pic | Disposition.timed_thumbnails
    covers = [s for s in container.streams.video if s.disposition & not_the_video]
    videos = [s for s in container.streams.video if s not in covers]
    known = [s for s in videos if s.codec_context is not None]
    if not videos:
        raise DataError(f"{path}: has no video stream{', only a cover picture' if covers else ''}")
    if not known:
        raise DataError(f"{path}: its video is in a format that PyAV does not decode")
    findings.other_streams = len(videos) - 1
    if number is not None:
        if number >= len(videos):
            has = "a single video stream" if len(videos) == 1 else f"{len(videos)} video streams"
            raise DataError(f"{path}: has {has}: none of number {number}, counted from 0")
        if videos[number] not in known:
            raise DataError(f"{path}: video stream {number} is in a format that is not decoded")
        return videos[number]
    moving = [s for s in known if s.frames != 1] or known  # 0: not told
    best = container.streams.best("video")
    if best in moving:
        return best
    return max(moving, key=lambda s: (bool(s.disposition & Disposition.default), s.frames))


def _pictures(
    av, path: Path, container, stream, findings: Findings, moved: Callable[[], None]
) -> Iterator[Picture]:
    context = stream.codec_context
    Shape(context.width, context.height, Fraction(1), Orientation()).check()
    # a decoder without threads says at once what fails, and survives a fork
    context.thread_count = 1
    context.options = {"max_pixels": str(MAX_PIXELS)}
    rate = float(stream.average_rate or stream.guessed_rate or 0) or _DEFAULT_RATE
    timeline = Timeline(1 / rate, findings)
    soundness = Soundness(
        rate, timeline, findings, lambda: _key_packets(av, path, stream.index, moved)
    )
    aspects = _Aspects(stream)
    piece, broken = 0, False
    waiting: Picture | None = None  # the last sound one, until it is known how long it is shown
    shape: Shape | None = None  # of the last sound one
    for judged in _judged(av, container, stream, soundness, aspects, moved):
        frame = judged.frame
        lasts_s = timeline.step_s
        time_s, continues = timeline.place(_stamp_s(frame, stream), sound=judged.sound)
        if waiting is not None:
            end_s = min(time_s, waiting.begin_s + lasts_s) if judged.hole else time_s
            yield replace(waiting, end_s=end_s)
            waiting = None
        broken = broken or judged.hole or not judged.sound or not continues
        if not judged.sound:
            continue
        last_shape, shape = shape, shape_of(frame, aspects.of(judged.number))
        if last_shape is not None and shape != last_shape:
            findings.changes += 1
            broken = True
        if broken and last_shape is not None:
            piece += 1
        findings.interlaced += bool(frame.interlaced_frame)
        broken = False
        waiting = Picture(piece, time_s, time_s, shape, frame)
    if waiting is not None:
        yield replace(waiting, end_s=waiting.begin_s + timeline.step_s)
    if context.name in _HIDDEN_PICTURES:
        findings.without_picture = 0
    findings.missing_packets = _beyond_the_end(container, stream)
    if shape is None:
        error = soundness.first_error
        why = f"cannot be decoded: {error}" if error else "holds no sound picture"
        raise DataError("; ".join([f"{path}: {why}", *findings.phrases()]))


class _Aspects:
    """The sample aspect ratio of each frame: what the container declares, until the coded one
    changes.
    """

    def __init__(self, stream):
        self._context = stream.codec_context
        self._numbers = [0]  # of the packets with which it changed
        self._coded = [self._context.sample_aspect_ratio]
        self._declared = stream.sample_aspect_ratio

    def packet_decoded(self, number: int) -> None:
        ratio = self._context.sample_aspect_ratio
        if ratio != self._coded[-1]:
            self._numbers.append(number)
            self._coded.append(ratio)

    def of(self, number: int | None) -> Fraction | None:
        """number: of the frame's packet; None: not known, so it is taken for the last one."""
        index = len(self._coded) if number is None else bisect_right(self._numbers, number)
        coded = self._coded[index - 1]
        return self._declared if coded == self._coded[0] else coded


def _judged(
    av, container, stream, soundness: Soundness, aspects: _Aspects, moved: Callable[[], None]
) -> Iterator[Judged]:
    """Decoded frames in the order in which they are shown, and whether they are sound."""
    for frame in _frames(av, container, stream, soundness, aspects, moved):
        yield from soundness.judge(frame)
    yield from soundness.rest()


def _frames(
    av, container, stream, soundness: Soundness, aspects: _Aspects, moved: Callable[[], None]
) -> Iterator:
    """Decoded frames in the order in which they are shown; soundness hears of what fails."""
    for packet in _packets(av, container, stream, soundness):
        moved()
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            soundness.packet_failed(_words(error))
            continue
        aspects.packet_decoded(soundness.num_packets)
        yield from frames
    try:
        yield from stream.codec_context.decode(None)  # what the decoder still holds back
    except av.EOFError:
        pass  # nothing
    except av.FFmpegError as error:
        soundness.packet_failed(_words(error))


def _packets(av, container, stream, soundness: Soundness) -> Iterator:
    """The packets of a stream; where the file cannot be read, reading goes on behind."""
    failed_reads = 0
    while failed_reads < _MAX_FAILED_READS:
        try:
            for packet in container.demux(stream):
                # PyAV ends with an empty one, and one on the way would end decoding.
                if packet.size:
                    failed_reads = 0
                    soundness.packet_read(packet)
                    yield packet
            return
        except av.FFmpegError as error:
            failed_reads += 1
            soundness.read_failed(_words(error))


def _beyond_the_end(container, stream) -> int:
    """How many packets an mp4 or mov file declares behind its end: it was cut."""
    if not container.format.name.startswith("mov"):
        return 0  # other indexes hold places to seek to, not every packet
    return sum(entry.pos + entry.size > container.size for entry in stream.index_entries)


def _key_packets(av, path: Path, stream_index: int, moved: Callable[[], None]) -> list[int]:
    """The numbers (from 1) of the packets that hold key frames, as far as a file can be read."""
    numbers = []
    count = 0
    with _open(av, path) as container:
        try:
            for packet in container.demux(container.streams[stream_index]):
                moved()
                if packet.size:
                    count += 1
                    if packet.is_keyframe:
                        numbers.append(count)
        except av.FFmpegError:
            pass  # the reading that decodes says so
    return numbers


def _stamp_s(frame, stream) -> float | None:
    """When a frame is to be shown, in seconds; None if the file does not say."""
    stamp = frame.dts if frame.pts is None else frame.pts
    return None if stamp is None else float(stamp * stream.time_base)


def _words(error: Exception) -> str:
    return shorten(getattr(error, "strerror", None) or error)
