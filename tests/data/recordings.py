"""Small videos for tests, written with PyAV: known pictures, and what cameras and damage do."""

from fractions import Fraction

import numpy as np

RATE = 20


def pattern(height=48, width=80):
    """An asymmetric picture: no turn or mirroring of it looks like another."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[:, :, 1] = np.linspace(0, 120, width)[None]
    picture[: height // 2, : width // 2] = (220, 30, 20)
    picture[: height // 4, width // 2 :] = (20, 40, 230)
    picture[-height // 4 :, : width // 4] = (240, 240, 240)
    return picture


def frame_of(brightness, height=32, width=48):
    """The pattern with a block of one brightness in the middle, which tells frames apart."""
    picture = pattern(height, width)
    picture[height // 4 : -height // 4, width // 4 : -width // 4] = min(brightness, 255)
    return picture


def brightness_of(picture):
    height, width = picture.shape[:2]
    inner = picture[height * 3 // 8 : height * 5 // 8, width * 3 // 8 : width * 5 // 8]
    return float(inner.mean())


def write(path, frames, *, codec="mpeg4", pix_fmt="yuv420p", stamps=None, setup=None, key_every=10,
          container_options=None, codec_options=None, aspect=None):  # fmt: skip
    """frames (height, width, 3) or av.VideoFrame, at RATE or `stamps` (ms); setup(stream): before
    the first.
    """
    import av

    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=RATE, options=codec_options or {})
        first = _video_frame(frames[0])
        stream.height, stream.width = first.height, first.width
        stream.pix_fmt = pix_fmt
        if codec in ("mpeg4", "mpeg2video", "libx264"):
            stream.bit_rate = 4_000_000
            stream.gop_size = key_every
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if stamps is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if setup is not None:
            setup(stream)
        for number, picture in enumerate(frames):
            frame = _video_frame(picture)
            frame.pts = number if stamps is None else stamps[number]
            frame.time_base = Fraction(1, RATE) if stamps is None else Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _video_frame(picture):
    import av

    if isinstance(picture, av.VideoFrame):
        return picture
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")


def woven(first, second):
    """An interlaced frame (yuv420p) of two moments: each field has chroma of its own."""
    import av

    fields = [
        _video_frame(moment[parity::2]).reformat(format="yuv420p").to_ndarray()
        for parity, moment in enumerate((first, second))
    ]
    height, width = first.shape[:2]
    planes = []
    begin = 0
    for rows, columns in (
        (height // 2, width),
        (height // 4, width // 2),
        (height // 4, width // 2),
    ):
        size = rows * columns
        parts = [field.reshape(-1)[begin : begin + size].reshape(rows, columns) for field in fields]
        planes.append(np.stack(parts, 1).reshape(-1))
        begin += size
    joined = np.concatenate(planes).reshape(height * 3 // 2, width)
    return av.VideoFrame.from_ndarray(joined, format="yuv420p")


def numbered(count, first=0, step=4, **size):
    """Frames whose middle is `step` brighter each time."""
    return [frame_of(first + step * number, **size) for number in range(count)]


def remux(source, target, change, **options):
    """A copy, each packet changed: change(number, packet) -> packet, or None to leave it out."""
    import av

    with av.open(str(source)) as read, av.open(str(target), "w", options=options) as written:
        stream = read.streams.video[0]
        copy = written.add_stream_from_template(stream)
        number = 0
        for packet in read.demux(stream):
            if packet.size:
                packet = change(number, packet)
                number += 1
                if packet is not None:
                    packet.stream = copy
                    written.mux(packet)
    return target


def damaged(number_of_damaged, how):
    """A change for `remux` that damages packets; how: zeros, noise, cut."""
    import av

    def change(number, packet):
        if number not in number_of_damaged:
            return packet
        content = bytearray(bytes(packet))
        middle = len(content) // 3
        if how == "zeros":
            content[middle:] = bytes(len(content) - middle)
        elif how == "noise":
            content[middle:] = np.random.default_rng(number).bytes(len(content) - middle)
        else:
            content = content[: max(8, middle)]
        result = av.Packet(bytes(content))
        result.pts, result.dts, result.duration = packet.pts, packet.dts, packet.duration
        result.time_base, result.is_keyframe = packet.time_base, packet.is_keyframe
        return result

    return change
