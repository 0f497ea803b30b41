"""What a player shows is what is read: upright, from the right stream, at the right time."""

import struct
from fractions import Fraction

import numpy as np
import pytest

pytest.importorskip("av", reason="the package av is not installed")

import itertools

from recordings import RATE, brightness_of, frame_of, numbered, pattern, remux, woven, write

from ebwm_scale.core.errors import DataError
from ebwm_scale.data.prepare.clips import shown_at
from ebwm_scale.data.prepare.decoding import pictures
from ebwm_scale.data.prepare.findings import Findings
from ebwm_scale.data.prepare.timeline import LONGEST_STILL_S
from ebwm_scale.data.prepare.upright import orientation_of


def played(path):
    """(pictures, findings)"""
    findings = Findings()
    return list(pictures(path, findings)), findings


def likeness(picture, expected):
    assert picture.shape == expected.shape
    return np.corrcoef(picture.ravel().astype(float), expected.ravel().astype(float))[0, 1]


def stored_for(shown, quarters, left_right, upside_down):
    """The picture that looks like `shown` once it is turned counter-clockwise, then mirrored."""
    if upside_down:
        shown = shown[::-1]
    if left_right:
        shown = shown[:, ::-1]
    return np.rot90(shown, -quarters)


TURNS = [(q, h, v) for q in range(4) for h, v in ((0, 0), (1, 0), (0, 1), (1, 1))]


@pytest.mark.parametrize("quarters, left_right, upside_down", TURNS)
@pytest.mark.parametrize("aspect", [None, Fraction(2, 1), Fraction(1, 2)])
def test_a_turned_mirrored_or_stretched_video_is_read_upright(
    tmp_path, quarters, left_right, upside_down, aspect
):
    shown = pattern()
    stored = stored_for(shown, quarters, left_right, upside_down)
    if aspect is not None:  # pixels that are twice as wide as high, or the other way round
        stored = stored[:, ::2] if aspect > 1 else stored[::2]

    def turn(stream):
        stream.set_display_rotation(90 * quarters, hflip=left_right, vflip=upside_down)

    path = write(tmp_path / "v.mp4", [stored] * 5, setup=turn, aspect=aspect)
    read, findings = played(path)
    assert len(read) == 5 and findings.phrases() == []
    for picture in read:
        assert likeness(picture.pixels(), shown) > 0.97


def test_a_display_matrix_written_into_the_file_by_a_phone_is_obeyed(tmp_path):
    shown = pattern()
    path = write(tmp_path / "v.mp4", [np.rot90(shown)] * 5)
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 4 + 4 + 4 + 4 + 4 + 4 + 8 + 8
    assert struct.unpack(">9i", content[at : at + 36])[::4] == (65536, 65536, 1 << 30)
    clockwise = (0, 65536, 0, -65536, 0, 0, 48 << 16, 0, 1 << 30)
    content[at : at + 36] = struct.pack(">9i", *clockwise)
    path.write_bytes(content)
    read, _ = played(path)
    assert likeness(read[0].pixels(), shown) > 0.97


@pytest.mark.parametrize("a, b, c, d", [(0, 0, 0, 0), (5, 0, 0, 5), (65536, 300, -300, 65536)])
def test_a_matrix_that_turns_nothing_or_less_than_a_degree_turns_nothing(a, b, c, d):
    orientation = orientation_of(struct.pack("=9i", a, b, 0, c, d, 0, 0, 0, 1 << 30))
    picture = pattern()
    assert np.array_equal(orientation.apply(picture), picture)


def test_a_turn_by_a_crooked_angle_is_refused_in_one_line(tmp_path):
    path = write(
        tmp_path / "v.mp4", [pattern()] * 5, setup=lambda stream: stream.set_display_rotation(37)
    )
    with pytest.raises(DataError, match="something else than quarter turns"):
        played(path)


@pytest.mark.parametrize("codec, suffix", [("libx264", "mp4"), ("mpeg4", "mkv"), ("mpeg4", "mov")])
@pytest.mark.parametrize("aspect", [Fraction(16, 11), Fraction(12, 11), Fraction(8, 9)])
def test_circles_stay_circles(tmp_path, codec, suffix, aspect):
    height, width = 96, 120
    rows, columns = np.mgrid[:height, :width]
    across = (columns - width / 2) * float(aspect)
    inside = across**2 + (rows - height / 2) ** 2 < 40**2
    stored = np.where(inside[..., None], 230, 20).astype(np.uint8).repeat(3, 2)
    path = write(tmp_path / f"v.{suffix}", [stored] * 3, codec=codec, aspect=aspect)
    picture = played(path)[0][0].pixels().mean(2) > 125
    diameters = [np.ptp(np.flatnonzero(picture.any(axis))) for axis in (0, 1)]
    assert diameters[0] == pytest.approx(diameters[1], rel=0.05)
    assert min(picture.shape) >= 96  # stretched, not squeezed: nothing is lost


@pytest.mark.parametrize("aspect", [Fraction(200, 1), Fraction(1, 200)])
def test_an_absurd_aspect_is_refused_before_anything_large_is_allocated(tmp_path, aspect):
    path = write(tmp_path / "v.mkv", [np.zeros((200, 200, 3), np.uint8)] * 2, aspect=aspect)
    with pytest.raises(DataError, match="at most 67,108,864 pixels and 32,768 a side"):
        played(path)


@pytest.mark.parametrize(
    "codec, pix_fmt, suffix, height, width",
    [
        ("ffv1", "gray", "mkv", 48, 80),
        ("ffv1", "gray10le", "mkv", 48, 80),
        ("ffv1", "yuv420p10le", "mkv", 48, 80),
        ("ffv1", "yuv444p16le", "mkv", 48, 80),
        ("ffv1", "yuv420p", "mkv", 37, 61),
        ("ffv1", "bgr0", "avi", 37, 61),
        ("mjpeg", "yuvj420p", "mov", 37, 61),
        ("gif", "rgb8", "gif", 37, 61),
        ("libx265", "yuv420p", "mp4", 48, 80),
        ("libvpx-vp9", "yuv420p", "webm", 37, 61),
        ("flv", "yuv420p", "flv", 48, 80),
        ("wmv2", "yuv420p", "wmv", 48, 80),
        ("mpeg2video", "yuv420p", "mpg", 48, 80),
    ],
)
def test_grey_deep_and_odd_sized_videos_are_read(tmp_path, codec, pix_fmt, suffix, height, width):
    shown = pattern(height, width)
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    path = write(
        tmp_path / f"v.{suffix}", [shown] * 6, codec=codec, pix_fmt=pix_fmt, codec_options=options
    )
    read, findings = played(path)
    if pix_fmt.startswith("gray"):
        shown = (shown @ [0.299, 0.587, 0.114])[..., None].repeat(3, 2)
    assert len(read) == 6 and findings.phrases() == []
    assert likeness(read[-1].pixels(), shown) > 0.95


def with_two_streams(path, *, cover_first, disposition, covers=1, videos=1):
    """Videos of numbered frames, and a smaller still picture with a disposition."""
    import av

    with av.open(str(path), "w") as container:

        def add_covers():
            for _ in range(covers):
                stream = container.add_stream("mjpeg", rate=RATE)
                stream.height, stream.width, stream.pix_fmt = 16, 16, "yuvj420p"
                stream.disposition = disposition
                stills.append(stream)

        stills, moving = [], []
        if cover_first:
            add_covers()
        for _ in range(videos):
            stream = container.add_stream("mpeg4", rate=RATE)
            stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
            moving.append(stream)
        if not cover_first:
            add_covers()
        container.start_encoding()
        for stream in stills:
            grey = np.full((16, 16, 3), 90, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
            container.mux(stream.encode())
        for picture in numbered(20):
            for stream in moving:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        for stream in moving:
            container.mux(stream.encode())
    return path


@pytest.mark.parametrize("cover_first", [True, False])
@pytest.mark.parametrize("covers", [1, 2])
def test_cover_pictures_are_never_taken_for_the_video(tmp_path, cover_first, covers):
    from av.stream import Disposition

    path = with_two_streams(
        tmp_path / "v.mp4",
        cover_first=cover_first,
        covers=covers,
        disposition=Disposition.attached_pic,
    )
    read, findings = played(path)
    assert len(read) == 20 and read[0].pixels().shape == (32, 48, 3) and findings.phrases() == []


def test_a_still_that_is_not_marked_as_a_cover_is_not_taken_for_the_video_either(tmp_path):
    from av.stream import Disposition

    path = with_two_streams(tmp_path / "v.mp4", cover_first=True, disposition=Disposition.default)
    read, findings = played(path)
    assert len(read) == 20 and read[0].pixels().shape == (32, 48, 3)
    assert findings.phrases() == ["1 other video stream not used"]


def test_of_several_videos_one_is_read_and_the_others_are_said(tmp_path):
    path = with_two_streams(tmp_path / "v.mkv", cover_first=True, disposition=0, covers=0, videos=3)
    read, findings = played(path)
    assert len(read) == 20 and findings.phrases() == ["2 other video streams not used"]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_any_of_several_videos_can_be_chosen(tmp_path, number):
    import av

    path = tmp_path / "v.mkv"
    with av.open(str(path), "w") as container:
        streams = []
        for _ in range(3):
            stream = container.add_stream("mpeg4", rate=RATE)
            stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
            streams.append(stream)
        container.start_encoding()
        for k, stream in enumerate(streams):
            for picture in numbered(5, first=60 * k, step=0):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    findings = Findings()
    read = list(pictures(path, findings, number=number))
    assert len(read) == 5 and findings.other_streams == 2
    assert brightness_of(read[0].pixels()) == pytest.approx(60 * number, abs=6)
    with pytest.raises(DataError, match="has 3 video streams: none of number 3, counted from 0"):
        list(pictures(path, number=3))


@pytest.mark.parametrize(
    "codec, pix_fmt, suffix, options",
    [
        ("mpeg2video", "yuv420p", "ts", {"flags": "+ilme+ildct", "field_order": "tt"}),
        ("libx264", "yuv420p", "mp4", {"x264-params": "tff=1"}),
        ("libx264", "yuv420p10le", "mkv", {"x264-params": "bff=1"}),
    ],
)
def test_of_an_interlaced_video_each_picture_shows_one_moment(
    tmp_path, codec, pix_fmt, suffix, options
):
    """Fields of two moments in each frame: what is read is the pattern, not a comb of both."""
    shown = pattern(96, 160)
    later = np.roll(shown, 40, 1)
    frames = [woven(shown, later) for _ in range(5)]
    comb = frames[0].to_ndarray(format="rgb24")
    path = write(
        tmp_path / f"v.{suffix}", frames, codec=codec, pix_fmt=pix_fmt, codec_options=options
    )
    read, findings = played(path)
    assert findings.phrases() == ["5 interlaced pictures of which one field is taken"]
    for picture in read:
        assert likeness(picture.pixels(), shown) > 0.97
    assert likeness(comb, shown) < 0.92


def test_everything_at_once_comes_out_as_a_player_shows_it(tmp_path):
    """Turned, mirrored, stretched, interlaced, 10 bits, at odd times that begin late."""
    shown = pattern(96, 160)
    stored = stored_for(shown, 1, True, False)[:, ::2]
    later = np.roll(stored, 20, 1)
    stamps = [7000, 7050, 7300, 7330, 8400, 8450]
    path = write(
        tmp_path / "v.mp4",
        [woven(np.ascontiguousarray(stored), np.ascontiguousarray(later))] * 6,
        codec="libx264",
        pix_fmt="yuv420p10le",
        codec_options={"x264-params": "tff=1"},
        aspect=Fraction(2, 1),
        stamps=stamps,
        setup=lambda stream: stream.set_display_rotation(90, hflip=True),
    )
    read, findings = played(path)
    assert findings.phrases() == ["6 interlaced pictures of which one field is taken"]
    assert [one.begin_s for one in read] == pytest.approx([s / 1000 - 7 for s in stamps])
    for picture in read:
        assert likeness(picture.pixels(), shown) > 0.97


def audio_only(path, cover=False):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        if cover:
            from av.stream import Disposition

            still = container.add_stream("mjpeg", rate=RATE)
            still.height, still.width, still.pix_fmt = 16, 16, "yuvj420p"
            still.disposition = Disposition.attached_pic
            grey = np.full((16, 16, 3), 90, np.uint8)
            container.start_encoding()
            container.mux(still.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
            container.mux(still.encode())
        for _ in range(10):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate = 16000
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda path: path.write_bytes(b""), r"is empty \(0 bytes\)"),
        (lambda path: path.write_bytes(b"text, not a video\n" * 99), "cannot be decoded: Invalid"),
        (audio_only, "has no video stream$"),
        (lambda path: audio_only(path, cover=True), "has no video stream, only a cover picture"),
    ],
)
def test_a_file_without_a_video_is_one_line_that_says_what_it_is(tmp_path, make, expected):
    path = tmp_path / "v.mp4"
    make(path)
    with pytest.raises(DataError, match=expected) as error:
        played(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(
    "name, content",
    [
        ("v.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.ts\n#EXT-X-ENDLIST\n"),
        ("v.mp4", "ffconcat version 1.0\nfile secret.ts\n"),
    ],
)
def test_a_play_list_opens_no_other_file(tmp_path, name, content):
    import av

    write(tmp_path / "secret.ts", numbered(20), codec="mpeg2video")
    (tmp_path / name).write_text(content)
    with av.open(str(tmp_path / name)) as container:
        assert container.streams.video  # FFmpeg by itself would
    with pytest.raises(DataError, match="is of a kind that is not opened"):
        played(tmp_path / name)


def test_a_name_that_looks_like_an_address_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "v.mp4", numbered(5)).rename(tmp_path / "http:v.mp4")
    from pathlib import Path

    assert len(played(Path("http:v.mp4"))[0]) == 5


def values(read):
    return [round((brightness_of(picture.pixels())) / 4) for picture in read]


@pytest.mark.parametrize(
    "codec, suffix", [("mpeg2video", "ts"), ("libx264", "ts"), ("mpeg2video", "mpg")]
)
def test_joined_files_are_read_to_their_end_in_pieces(tmp_path, codec, suffix):
    parts = [
        write(tmp_path / f"{i}.{suffix}", numbered(40, first=20 * i, step=5), codec=codec)
        for i in range(3)
    ]
    path = tmp_path / f"joined.{suffix}"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    read, findings = played(path)
    lengths = [sum(picture.piece == piece for picture in read) for piece in range(3)]
    assert findings.joins == 2 and all(38 <= length <= 40 for length in lengths)
    assert read[-1].end_s == pytest.approx(6.0, abs=0.3)
    assert all(a.end_s <= b.begin_s + 1e-6 for a, b in itertools.pairwise(read))
    for i in range(3):
        last = [picture for picture in read if picture.piece == i][-1]
        assert brightness_of(last.pixels()) == pytest.approx(20 * i + 5 * 39, abs=8)


def test_a_join_of_other_size_begins_a_piece_with_a_shape_of_its_own(tmp_path):
    a = write(tmp_path / "a.ts", numbered(40), codec="mpeg2video")
    b = write(tmp_path / "b.ts", numbered(40, height=48, width=64), codec="mpeg2video")
    (tmp_path / "c.ts").write_bytes(a.read_bytes() + b.read_bytes())
    read, findings = played(tmp_path / "c.ts")
    shapes = {picture.piece: picture.pixels().shape for picture in read}
    assert list(shapes.values()) == [(32, 48, 3), (48, 64, 3)]
    assert findings.changes == 1


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_a_gap_is_closed_and_not_filled_with_stills(tmp_path, suffix):
    frames = numbered(40, step=5)
    stamps = [50 * k + 60_000 * (k >= 20) for k in range(40)]
    path = write(tmp_path / f"v.{suffix}", frames, stamps=stamps)
    read, findings = played(path)
    assert len(read) == 40 and findings.gaps == 1 and findings.gap_s == pytest.approx(60, abs=0.2)
    assert [picture.piece for picture in read] == [0] * 20 + [1] * 20
    assert read[-1].end_s == pytest.approx(2.0, abs=0.2)
    assert max(picture.end_s - picture.begin_s for picture in read) < 0.2


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_of_a_variable_rate_the_picture_on_screen_is_taken_and_stills_stay(tmp_path, suffix):
    steps = [50, 50, 400, 30, 3000, 50, 70, 1000, 50, 50]
    stamps = np.cumsum([0, *steps[:-1]]).tolist()
    path = write(tmp_path / f"v.{suffix}", numbered(10, step=20), stamps=stamps)
    read, findings = played(path)
    assert findings.phrases() == [] and {picture.piece for picture in read} == {0}
    for one in shown_at(iter(read), 0.1, [0.0]):
        number = np.searchsorted(stamps, 100 * one.k + 1, side="right") - 1
        assert brightness_of(one.pixels) == pytest.approx(20 * number, abs=6), one.k


def test_a_slide_show_is_not_taken_apart(tmp_path):
    stamps = [1000 * k * int(LONGEST_STILL_S + 3) for k in range(6)]
    read, findings = played(write(tmp_path / "v.mp4", numbered(6), stamps=stamps))
    assert len(read) == 6 and findings.phrases() == [] and {p.piece for p in read} == {0}


@pytest.mark.parametrize("first", [-500, -100, 7_000, 3_600_000])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_time_counts_from_the_first_picture(tmp_path, first, suffix):
    if first < 0 and suffix == "mkv":
        first = -first
    stamps = [first + 50 * k for k in range(30)]
    read, findings = played(write(tmp_path / f"v.{suffix}", numbered(30), stamps=stamps))
    assert read[0].begin_s == 0 and findings.phrases() == []
    assert values(read)[-1] == 29 and read[-1].end_s == pytest.approx(50e-3 * len(read), abs=0.01)


def test_what_an_edit_list_cuts_off_is_not_shown(tmp_path):
    path = write(tmp_path / "v.mp4", numbered(60), container_options={"use_editlist": "1"})
    content = bytearray(path.read_bytes())
    at = content.index(b"elst") + 12
    duration, media_time = struct.unpack(">ii", content[at : at + 8])
    scale = struct.unpack(">I", content[content.index(b"mdhd") + 16 :][:4])[0]
    content[at : at + 8] = struct.pack(">ii", duration * 2 // 3, media_time + scale)
    path.write_bytes(content)
    read, findings = played(path)
    assert read[0].begin_s == 0 and values(read)[0] == 20 and findings.phrases() == []


def test_pictures_without_timestamps_are_spaced_evenly_and_said(tmp_path):
    path = write(tmp_path / "v.h264", numbered(30), codec="libx264")
    read, findings = played(path)
    steps = np.diff([picture.begin_s for picture in read])
    assert len(read) == 30 and steps == pytest.approx([steps[0]] * 29)
    assert findings.phrases() == ["30 pictures without a timestamp spaced evenly"]


@pytest.mark.parametrize(
    "stamps, expected",
    [
        ([0, 100, 50, 150, 200, 250], 1),  # two changed places
        ([0, 50, 50, 150, 200, 250], 1),  # one twice
        ([0, 0, 0, 0, 0, 0], 5),  # no time at all
    ],
)
def test_a_little_disorder_costs_no_picture_and_no_piece(stamps, expected):
    from ebwm_scale.data.prepare.timeline import Timeline

    findings = Findings()
    timeline = Timeline(0.05, findings)
    placed = [timeline.place(stamp / 1000) for stamp in stamps]
    times = [time_s for time_s, _ in placed]
    assert all(continues for _, continues in placed) and findings.out_of_order == expected
    assert all(a < b for a, b in itertools.pairwise(times))
    if stamps[-1]:
        assert times[-1] == pytest.approx(stamps[-1] / 1000)  # no drift


def test_timestamps_that_stand_still_do_not_pile_up():
    from ebwm_scale.data.prepare.timeline import Timeline

    timeline = Timeline(0.05, Findings())
    times = [timeline.place(0.0)[0] for _ in range(200)]
    assert times[-1] == pytest.approx(200 * 0.05, rel=0.05)


@pytest.mark.parametrize("jump", [1e9, -1e9])
def test_absurd_timestamps_do_not_ask_for_a_billion_frames(tmp_path, jump):
    from ebwm_scale.data.prepare.timeline import Timeline

    timeline = Timeline(abs(jump), Findings())  # the mean step is absurd as well
    times = [timeline.place(stamp)[0] for stamp in (0.0, 0.05, jump, 2 * jump, 2 * jump + 0.05)]
    assert max(np.diff(times)) <= 60


def test_a_pixel_aspect_that_changes_on_the_way_begins_a_piece(tmp_path):
    shown = pattern(48, 80)
    parts = [
        write(tmp_path / "a.ts", [shown] * 20, codec="libx264"),
        write(tmp_path / "b.ts", [shown[:, ::2]] * 20, codec="libx264", aspect=Fraction(2, 1)),
        write(tmp_path / "c.ts", [shown[::2]] * 20, codec="libx264", aspect=Fraction(1, 2)),
    ]
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    read, findings = played(path)
    assert findings.changes == 2 and {picture.piece for picture in read} == {0, 1, 2}
    for picture in read:
        assert abs(picture.pixels().shape[1] / picture.pixels().shape[0] - 80 / 48) < 0.02
        assert picture.pixels().shape != (48, 80, 3) or likeness(picture.pixels(), shown) > 0.95


def test_pictures_left_out_by_a_remux_are_a_still_as_in_a_player(tmp_path):
    whole = write(tmp_path / "w.mkv", numbered(40), codec="mjpeg", pix_fmt="yuvj420p")
    path = remux(whole, tmp_path / "v.mkv", lambda n, packet: None if 10 <= n < 15 else packet)
    read, findings = played(path)
    still = next(picture for picture in read if values([picture]) == [9])
    assert len(read) == 35 and findings.phrases() == []
    assert still.end_s - still.begin_s == pytest.approx(0.3, abs=0.01)
    assert brightness_of(frame_of(36)) == 36
