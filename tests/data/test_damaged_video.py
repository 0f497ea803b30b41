"""A damaged packet costs the pictures that build on it, and that is said. Decoding always ends."""

import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("av", reason="the package av is not installed")

import itertools

from recordings import RATE, damaged, pattern, remux, write

from ebwm_scale.core.errors import DataError
from ebwm_scale.data.prepare.clips import ClipConfig, make_part, read_clips, read_findings
from ebwm_scale.data.prepare.decoding import pictures
from ebwm_scale.data.prepare.findings import Findings, total
from ebwm_scale.data.prepare.video_sources import Video

KINDS = [
    ("mpeg4", "mp4"),
    ("mpeg4", "avi"),
    ("libx264", "mp4"),
    ("libx264", "mkv"),
    ("libx264", "ts"),
    ("mjpeg", "mov"),
]
NUM_FRAMES, KEY_EVERY = 60, 10


def moving(count=NUM_FRAMES):
    """Frames that differ everywhere, so that every packet has something to damage."""
    noise = np.random.default_rng(0).integers(0, 60, (48, 80, 3), dtype=np.uint8)
    return [np.roll(pattern() // 2 + noise, (k, 2 * k), (0, 1)) for k in range(count)]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def intact(request, tmp_path_factory):
    codec, suffix = request.param
    path = tmp_path_factory.mktemp("intact") / f"v.{suffix}"
    write(
        path,
        moving(),
        codec=codec,
        pix_fmt="yuvj420p" if codec == "mjpeg" else "yuv420p",
        key_every=KEY_EVERY,
        codec_options={"sc_threshold": "0"} if codec == "libx264" else {},
    )
    return path, [picture.pixels() for picture in pictures(path)]


def played(path):
    findings = Findings()
    return list(pictures(path, findings)), findings


@pytest.mark.parametrize("how", ["zeros", "noise", "cut"])
@pytest.mark.parametrize("where", [{5}, {23}, {23, 24, 25}, {11, 41}])
def test_what_is_kept_of_a_damaged_video_is_what_was_recorded(intact, tmp_path, how, where):
    path, recorded = intact
    read, findings = played(remux(path, tmp_path / path.name, damaged(where, how)))
    for picture in read:
        number = round(picture.begin_s * RATE)
        assert np.array_equal(picture.pixels(), recorded[number]), number
    assert findings.phrases() and "damage" in " ".join(findings.phrases())
    assert len(read) >= NUM_FRAMES - 2 * KEY_EVERY * len(where)
    assert read[0].begin_s == 0 and read[-1].end_s == pytest.approx(NUM_FRAMES / RATE, abs=0.11)
    assert {picture.piece for picture in read} >= {0, 1}


def test_clips_lie_before_and_after_the_damage_and_never_across(intact, tmp_path):
    path, _ = intact
    broken = remux(path, tmp_path / path.name, damaged({27}, "noise"))
    config = ClipConfig(4, 0.1, 0.1, 16, 16, 1, (1,), "jpeg", 90)
    make_part(Video("v", broken, "0"), tmp_path / "part.tar", config)
    starts = [clip.start_s for clip in read_clips(tmp_path / "part.tar")]
    read, findings = played(broken)
    hole = [(a.end_s, b.begin_s) for a, b in itertools.pairwise(read) if a.piece != b.piece]
    assert hole and read_findings(tmp_path / "part.tar") == findings
    for end_s, begin_s in hole:
        assert not any(start < begin_s - 1e-6 and start + 0.4 > end_s + 1e-6 for start in starts)
    assert min(starts) == 0 and max(starts) > hole[-1][1]


def test_where_no_key_frame_follows_pictures_are_kept_and_said_to_be_doubtful(tmp_path):
    whole = write(
        tmp_path / "w.mp4",
        moving(120),
        codec="libx264",
        key_every=1000,
        codec_options={"sc_threshold": "0"},
    )
    read, findings = played(remux(whole, tmp_path / "v.mp4", damaged({40}, "noise")))
    assert findings.doubtful_pictures > 40 and findings.left_out_pictures >= 10
    assert read[-1].end_s == pytest.approx(6.0, abs=0.2)
    assert any("may show remains" in phrase for phrase in findings.phrases())


def test_a_file_that_was_cut_says_how_much_is_missing(tmp_path):
    path = write(tmp_path / "v.mp4", moving(), container_options={"movflags": "faststart"})
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    read, findings = played(path)
    assert 20 <= len(read) <= 40 and findings.missing_packets >= NUM_FRAMES - len(read) - 2
    assert any("declared but missing: the file is cut" in phrase for phrase in findings.phrases())


def test_a_video_of_nothing_but_damage_is_one_line_with_the_reason(tmp_path):
    whole = write(tmp_path / "w.avi", moving())
    broken = remux(whole, tmp_path / "v.avi", damaged(set(range(NUM_FRAMES)), "cut"))
    with pytest.raises(DataError, match="damage") as error:
        played(broken)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("codec, suffix", KINDS)
def test_any_damage_ends_in_pictures_or_one_line_within_seconds(tmp_path, codec, suffix):
    path = tmp_path / f"v.{suffix}"
    write(path, moving(30), codec=codec, pix_fmt="yuvj420p" if codec == "mjpeg" else "yuv420p")
    content = path.read_bytes()
    generator = np.random.default_rng(1)
    broken = tmp_path / f"broken.{suffix}"
    start = time.monotonic()
    for trial in range(40):
        damage = bytearray(content)
        for at in generator.integers(0, len(content), 1 + trial % 9):
            length = int(generator.integers(1, 60))
            damage[at : at + length] = generator.bytes(len(damage[at : at + length]))
        if trial % 4 == 3:
            del damage[int(generator.integers(1, len(damage))) :]
        broken.write_bytes(damage)
        try:
            read, findings = played(broken)
        except DataError as error:
            assert "\n" not in str(error) and len(str(error)) < 1500
        else:
            assert all(a.begin_s < a.end_s <= b.begin_s + 1e-6 for a, b in itertools.pairwise(read))
    assert time.monotonic() - start < 60


STOPPED_EARLY = """
import sys
from pathlib import Path
from types import SimpleNamespace
from ebwm_scale.data.prepare.decoding import import_av, pictures
from ebwm_scale.think import context_frames
content = SimpleNamespace(interval_s=0.1, height=16, width=16)
for i in range(60):
    next(iter(pictures(Path(sys.argv[1]))))
for i in range(5):
    assert len(context_frames(Path(sys.argv[1]), content, 0.0, 2)) == 2
assert import_av().logging.get_level() is None
print("done")
"""


def test_decoding_that_is_left_early_does_not_stand_still(tmp_path):
    frames = [np.kron(frame, np.ones((8, 8, 1), np.uint8)) for frame in moving(20)]
    path = write(tmp_path / "v.mp4", frames, codec="libx264")
    done = subprocess.run(
        [sys.executable, "-c", STOPPED_EARLY, path], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "done", done.stderr


def test_counts_add_up_over_videos():
    a = Findings(damaged_packets=1, gaps=1, gap_s=3.5, damage_at_s=1.0)
    b = Findings(damaged_packets=2, without_time=4)
    summed = total([a, b, Findings()])
    assert summed.counts() == {"damaged_packets": 3, "gaps": 1, "gap_s": 3.5, "without_time": 4}
    assert summed.phrases()[0] == "3 damaged packets left out"
