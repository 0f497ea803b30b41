"""Videos that are no file of a decoder's: folders of images, WebP, members of archives; and what
lies beside a video. All of them give the clips of the plain file.
"""

import io
import json
import tarfile
import time
import zipfile

import numpy as np
import pytest

pytest.importorskip("av", reason="the package av is not installed")

from PIL import Image
from recordings import brightness_of, frame_of, numbered, pattern, write

from ebwm_scale.core.errors import DataError
from ebwm_scale.data.format.manifest import load_manifest
from ebwm_scale.data.format.shards import open_split
from ebwm_scale.data.prepare.findings import Findings
from ebwm_scale.data.prepare.stills import natural_order
from ebwm_scale.data.prepare.video import VideoDatasetConfig, make_video_dataset
from ebwm_scale.data.prepare.video_places import Place
from ebwm_scale.data.prepare.video_sources import find_videos


def shown(video, folder, **options):
    """(pictures, findings)"""
    findings = Findings()
    with video.shown(folder, findings, **options) as film:
        return list(film), findings


def found(*inputs, **options):
    said = []
    return {v.name: v for v in find_videos(inputs, report=said.append, **options)}, said


def images(folder, names, *, first=0, size=(32, 48), save=None):
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        picture = frame_of(first + 10 * number, *size)
        Image.fromarray(picture).save(folder / name, **(save or {}))
    return folder


def brightnesses(read):
    return [round(brightness_of(one.pixels()) / 10) for one in read]


def packed_tar(path, contents):
    with tarfile.open(path, "w") as archive:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def packed_zip(path, contents, how=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return path


def test_a_folder_of_images_is_one_video_in_natural_order(tmp_path):
    names = [f"shot {k}.png" for k in range(12)]
    images(tmp_path / "in" / "walk", names)
    videos, said = found(tmp_path / "in")
    assert "folders of images taken as videos: walk" in said
    read, findings = shown(videos["walk"], tmp_path, image_rate=10.0)
    assert brightnesses(read) == list(range(12)) and findings.phrases() == []
    assert [one.begin_s for one in read] == pytest.approx([0.1 * k for k in range(12)])
    assert np.array_equal(read[3].pixels(), frame_of(30))
    assert sorted(["10", "9", "a2", "a10"], key=natural_order) == ["9", "10", "a2", "a10"]


def test_images_are_turned_as_cameras_say_and_keep_what_they_hold(tmp_path):
    upright = pattern(32, 48)
    folder = tmp_path / "in"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    Image.fromarray(np.ascontiguousarray(np.rot90(upright))).save(folder / "0.png", exif=exif)
    grey = (upright.astype(np.uint16) @ np.array([1, 0, 0], np.uint16)) * 257
    Image.fromarray(grey.astype(np.uint16)).save(folder / "1.png")  # 16 bits
    clear = np.dstack([upright, np.full(upright.shape[:2], 255, np.uint8)])
    clear[:, :24, 3] = 0
    Image.fromarray(clear).save(folder / "2.png")
    (video,) = find_videos([folder], report=lambda _: None)
    read, _ = shown(video, tmp_path)
    assert np.array_equal(read[0].pixels(), upright)
    assert np.array_equal(read[1].pixels(), upright[..., :1].repeat(3, 2))
    black = upright * (np.arange(48) >= 24)[None, :, None]
    assert np.array_equal(read[2].pixels(), black)


def test_a_damaged_image_is_left_out_and_said_and_no_clip_crosses_it_or_a_change_of_size(tmp_path):
    folder = images(tmp_path / "in", [f"{k}.png" for k in range(6)])
    content = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(content[: len(content) // 2])
    images(tmp_path / "more", ["6.png", "7.png"], first=60, size=(24, 24))
    for name in ("6.png", "7.png"):
        (tmp_path / "more" / name).rename(folder / name)
    (video,) = find_videos([folder], report=lambda _: None)
    read, findings = shown(video, tmp_path, image_rate=1.0)
    assert brightnesses(read) == [0, 1, 3, 4, 5, 6, 7]
    assert [one.piece for one in read] == [0, 0, 1, 1, 1, 2, 2]
    assert [one.begin_s for one in read] == [0, 1, 3, 4, 5, 6, 7]
    phrases = ["1 image left out as damaged (first at 2.0 s)", "1 change of size or orientation"]
    assert findings.phrases() == phrases


def test_images_beside_videos_are_thumbnails_unless_they_are_asked_for(tmp_path):
    folder = tmp_path / "in"
    images(folder / "frames", ["0.jpg", "1.jpg"])
    write(folder / "v.mp4", numbered(5))
    videos, said = found(folder)
    assert list(videos) == ["v.mp4"] and "no videos, left out: 2 files (2 x .jpg)" in said
    assert any("--images" in line for line in said)
    assert set(found(folder, images=True)[0]) == {"v.mp4", "frames"}


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_animations_keep_the_times_of_their_pictures(tmp_path, suffix):
    pictures = [Image.fromarray(frame_of(40 * k)) for k in range(4)]
    options = {"lossless": True} if suffix == "webp" else {}
    path = tmp_path / f"v.{suffix}"
    times = [100, 300, 50, 200]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=times, **options)
    still = tmp_path / "still.webp"
    pictures[0].save(still)
    videos, said = found(tmp_path)
    assert list(videos) == [f"v.{suffix}"] and "no videos, left out: 1 files (1 x .webp)" in said
    read, findings = shown(videos[f"v.{suffix}"], tmp_path)
    assert [one.begin_s for one in read] == pytest.approx([0, 0.1, 0.4, 0.45])
    assert brightnesses(read) == [0, 4, 8, 12] and findings.phrases() == []


@pytest.mark.parametrize("how", ["cut", "zeros"])
def test_of_a_damaged_webp_the_pictures_before_the_damage_are_kept(tmp_path, how):
    pictures = [Image.fromarray(frame_of(10 * k)) for k in range(8)]
    path = tmp_path / "v.webp"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100, lossless=True)
    content = bytearray(path.read_bytes())
    sixth = [at for at in range(len(content)) if content[at : at + 4] == b"ANMF"][5]
    if how == "cut":
        del content[sixth + 40 :]
    else:
        content[sixth + 32 : sixth + 60] = bytes(28)
    path.write_bytes(content)
    (video,) = find_videos([path], report=lambda _: None)
    read, findings = shown(video, tmp_path)
    assert brightnesses(read) == [0, 1, 2, 3, 4]
    assert findings.phrases() == ["1 place where the file is unreadable"]
    path.write_bytes(content[:40])
    with pytest.raises(DataError, match="v.webp: cannot be decoded"):
        shown(found(path)[0]["v.webp"], tmp_path)


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Two videos and what may lie beside them: name -> content."""
    folder = tmp_path_factory.mktemp("films")
    return {
        "00017.mp4": write(folder / "a.mp4", numbered(40)).read_bytes(),
        "00017.json": b'{"title": "a walk", "fps": 20}',
        "00017.txt": "a walk through a garden \N{BLACK HEART SUIT}\n".encode(),
        "00018.mp4": write(folder / "b.mp4", numbered(40, first=80)).read_bytes(),
        "00018.txt": b"\xff\xfe no UTF-8",
        "00018.jpg": b"a thumbnail",
    }


def of_folder(path, contents):
    path.mkdir()
    for name, content in contents.items():
        (path / name).write_bytes(content)
    return path


KINDS = {
    "folder": of_folder,
    "tar": packed_tar,
    "zip": packed_zip,
    "stored.zip": lambda path, contents: packed_zip(path, contents, zipfile.ZIP_STORED),
}
TINY = {
    "context_length": 3,
    "height": 16,
    "width": 16,
    "encoder_settings": {"patch": 8, "components": 4},
    "validation_fraction": 0.5,
}


@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", KINDS)
def test_videos_in_archives_are_those_of_a_folder_and_keep_their_captions(tmp_path, films, kind):
    path = tmp_path / ("in" if kind == "folder" else f"in.{kind}")
    KINDS[kind](path, films)
    said = []
    config = VideoDatasetConfig(**TINY, stored="jpeg")
    manifest = make_video_dataset([path], tmp_path / "d", config, workers=1, report=said.append)
    samples = {}
    for name in load_manifest(manifest).splits:
        split = open_split(manifest, name, verify="hashes")
        for number in range(len(split)):
            about = split.about(number)
            samples[about["video"].rpartition("/")[2], about["start_s"]] = split.read(number), about
    assert len(samples) == 4
    expected = {"caption": "a walk through a garden \N{BLACK HEART SUIT}"}
    expected["metadata"] = {"title": "a walk", "fps": 20}
    for (video, start_s), (frames, about) in samples.items():
        kept = {key: about[key] for key in ("caption", "metadata") if key in about}
        assert kept == (expected if video == "00017.mp4" else {})
        first = 4 * 20 * start_s + (80 if video == "00018.mp4" else 0)
        assert brightness_of(frames[0]) == pytest.approx(first, abs=8)
    assert any("00018.txt: not kept: is no UTF-8" in line for line in said)
    assert "no videos, left out: 1 files (1 x .jpg)" in said
    assert not list(tmp_path.glob(".d.*"))


def test_captions_are_part_of_what_a_dataset_is_made_of(tmp_path, films):
    folder = of_folder(tmp_path / "in", {"v.mp4": films["00017.mp4"]})
    bare = found(folder)[0]["v.mp4"]
    assert bare.identity == bare.digest  # as in datasets of before
    (folder / "v.txt").write_text("one")
    one = found(folder)[0]["v.mp4"].identity
    (folder / "v.txt").write_text("two")
    assert len({bare.identity, one, found(folder)[0]["v.mp4"].identity}) == 3
    assert found(folder, captions=False)[0]["v.mp4"].identity == bare.identity
    assert found(folder / "v.mp4")[0]["v.mp4"].about() == {"caption": "two"}
    (folder / "v.txt").write_bytes(b"x" * 2**17)
    videos, said = found(folder)
    assert videos["v.mp4"].about() == {} and any("has more than 65,536 bytes" in s for s in said)


def test_of_an_archive_that_is_cut_the_whole_members_are_used_and_the_rest_is_said(tmp_path, films):
    path = packed_tar(tmp_path / "in.tar", films)
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"00018.mp4") + 2000])
    videos, said = found(path)
    assert list(videos) == ["in.tar/00017.mp4"]
    assert any("cut off; the 3 files before it are used" in line for line in said)
    path.write_bytes(content[:300])
    with pytest.raises(DataError, match=r"in\.tar.*cut off"):
        find_videos([path], report=lambda _: None)


def test_a_zip_that_is_hostile_or_damaged_costs_what_is_damaged(tmp_path, films):
    film = films["00017.mp4"]
    names = {"a.mp4": film, "b.mp4": films["00018.mp4"], "../../x.mp4": film + b"\0"}
    path = packed_zip(tmp_path / "in.zip", names | {"zeros.mp4": bytes(10_000_000)})
    content = bytearray(path.read_bytes())
    content[content.index(b"b.mp4") + 2000] ^= 0xFF
    path.write_bytes(content)
    videos, said = found(path)
    assert set(videos) == {"in.zip/a.mp4", "in.zip/../../x.mp4"}
    assert any("zeros.mp4: skipped: claims 10,000,000 bytes" in line for line in said)
    assert any("b.mp4: skipped: cannot be unpacked" in line for line in said)
    inside = tmp_path / "inside" / "deep"
    inside.mkdir(parents=True)
    assert len(shown(videos["in.zip/../../x.mp4"], inside)[0]) == 40
    assert list(tmp_path.rglob("*.mp4")) == []  # nothing was unpacked anywhere else, nor stays
    with pytest.raises(DataError, match="is no zip that can be read"):
        path.write_bytes(b"PK\x03\x04 and nothing else")
        find_videos([path], report=lambda _: None)
    (tmp_path / "in.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match="a packed tar is not read: unpack it"):
        find_videos([tmp_path / "in.tar.gz"], report=lambda _: None)


def test_a_folder_of_images_in_a_zip_is_the_folder(tmp_path):
    folder = images(tmp_path / "walk", [f"{k}.png" for k in range(3)])
    files = {f"walk/{path.name}": path.read_bytes() for path in folder.iterdir()}
    files["__MACOSX/walk/0.mp4"] = b""
    path = packed_zip(tmp_path / "in.zip", files)
    videos, _ = found(path)
    assert videos["in.zip/walk"].digest == found(folder)[0]["walk"].digest
    assert brightnesses(shown(videos["in.zip/walk"], tmp_path)[0]) == [0, 1, 2]


def test_a_video_in_an_archive_that_cannot_be_decoded_is_named_as_it_lies_there(tmp_path):
    path = packed_tar(tmp_path / "in.tar", {"a/v.mp4": b"no video" * 99})
    video = found(path)[0]["in.tar/a/v.mp4"]
    with pytest.raises(DataError, match=f"^{path}/a/v.mp4: cannot be decoded"):
        shown(video, tmp_path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(DataError, match="its archive has become shorter"):
        shown(video, tmp_path)


def test_a_place_reads_no_more_than_its_own_bytes(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(bytes(range(100)))
    assert Place(path, "m", 10, 5).read(5) == bytes(range(10, 15))
    with pytest.raises(OSError, match="has more than 4 bytes"):
        Place(path, "m", 10, 5).read(4)


@pytest.mark.multiprocess
def test_no_video_takes_longer_than_the_limit(tmp_path, films, monkeypatch):
    """Not even one that moves all the time."""
    from ebwm_scale.data.prepare import video as video_module

    def endless(video, part, config, moved):
        while True:
            moved()
            time.sleep(0.01)

    monkeypatch.setattr(video_module, "make_part", endless)
    folder = of_folder(tmp_path / "in", {"v.mp4": films["00017.mp4"]})
    said = []
    with pytest.raises(DataError, match="none of 1 videos could be used"):
        make_video_dataset(
            [folder], tmp_path / "d", VideoDatasetConfig(**TINY), limit_s=1.0, report=said.append
        )
    assert any("v.mp4: skipped: took more than 1 s and was ended" in line for line in said)


def test_other_settings_are_those_of_datasets_from_before(tmp_path, films):
    folder = of_folder(tmp_path / "in", {"v.mp4": films["00017.mp4"]})
    manifest = make_video_dataset(
        [folder],
        tmp_path / "d",
        VideoDatasetConfig(**TINY, split="time", stride_s=0.25, gap_s=0.0),
        workers=1,
        report=lambda _: None,
    )
    settings = json.loads(manifest.read_text())["settings"]
    assert not {"stream", "image_rate", "patches"} & set(settings)
