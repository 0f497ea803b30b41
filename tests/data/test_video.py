"""Video datasets: what clips hold, how they are split, and that nothing unreadable or killed leaves
a half.
"""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

pytest.importorskip("av", reason="the package av is not installed")

from ebwm_scale.core.errors import DataError
from ebwm_scale.data.encoders.space import FrameSpace
from ebwm_scale.data.format.content import decode_image
from ebwm_scale.data.format.manifest import load_manifest
from ebwm_scale.data.format.shards import open_split
from ebwm_scale.data.format.verify import verify_dataset
from ebwm_scale.data.loading.batches import BatchLoader
from ebwm_scale.data.loading.mixture import open_sources
from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.data.prepare import video as video_module
from ebwm_scale.data.prepare.clips import resize_and_crop, shown_at
from ebwm_scale.data.prepare.decoding import pictures
from ebwm_scale.data.prepare.video import VideoDatasetConfig, make_video_dataset
from ebwm_scale.data.prepare.video_sources import find_videos

# The clips are decoded in processes of their own, by whichever test comes first.
pytestmark = pytest.mark.multiprocess

TINY = dict(
    context_length=3,
    interval_s=0.25,
    height=16,
    width=16,
    encoder_settings={"patch": 8, "components": 4},
    samples_per_shard=5,
)


def quiet(_):
    pass


def write_video(path, *, seconds=3.0, rate=20, seed=0, height=24, width=40):
    """A square that moves over a gradient; frame k's red corner pixel has brightness 10 k."""
    import av

    generator = np.random.default_rng(seed)
    speed, base = generator.integers(1, 4), generator.integers(0, 100, 3)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = (
            width,
            height,
            "yuv420p",
            4_000_000,
        )
        for k in range(round(seconds * rate)):
            frame = (
                np.broadcast_to(
                    np.linspace(0, 120, width)[None, :, None] + base, (height, width, 3)
                )
                .astype(np.uint8)
                .copy()
            )
            left = (k * speed) % (width - 8)
            frame[8:16, left : left + 8] = (250, 40, 10)
            frame[:8, :8] = min(255, 4 * k)
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for i in range(4):
        write_video(folder / f"v{i}.mp4", seed=i)
    return folder


def build(inputs, output, said=None, **changes):
    like = changes.pop("like", None)
    still_s = changes.pop("still_s", 120.0)
    return make_video_dataset(
        [inputs],
        output,
        VideoDatasetConfig(**{**TINY, **changes}),
        like=like,
        workers=1,
        still_s=still_s,
        report=quiet if said is None else said.append,
    )


@pytest.fixture(scope="session")
def built(videos, tmp_path_factory):
    return build(videos, tmp_path_factory.mktemp("data") / "clips", validation_fraction=0.3)


def test_frames_are_those_on_screen_at_each_interval(videos):
    found = list(shown_at(pictures(videos / "v0.mp4"), 0.25, [0.0, 0.1]))
    assert [one.k for one in found if one.offset == 0] == list(range(12))
    assert {one.offset for one in found} == {0, 1}
    for one in found:
        number = round((0.25 * one.k + (0.1 if one.offset else 0)) * 20)  # 20 frames a second
        assert abs(int(one.pixels[3, 3, 0]) - min(255, 4 * number)) <= 6, (one.offset, one.k)


def test_clips_begin_every_stride_and_hold_frames_an_interval_apart(videos, tmp_path):
    manifest = build(
        videos / "v0.mp4",
        tmp_path / "d",
        stored="jpeg",
        stride_s=0.5,
        split="time",
        validation_fraction=0.3,
        gap_s=0.0,
    )
    split = open_split(manifest, "train", verify="hashes")
    for i in range(len(split)):
        about, frames = split.about(i), split.read(i)
        assert (
            about["video"] == "v0.mp4"
            and about["start_s"] == 0.5 * i
            and frames.shape == (4, 16, 16, 3)
            and frames.dtype == np.uint8
        )
    shown = shown_at(pictures(videos / "v0.mp4"), 0.25, [0.0])
    direct = {one.k: one.pixels for one in shown}
    distances = {
        k: np.abs(split.read(1)[1].astype(int) - resize_and_crop(frame, 16, 16, 1)[0][1]).mean()
        for k, frame in direct.items()
    }
    assert (
        min(distances, key=distances.get) == 3 and distances[3] < 5
    )  # clip 1 starts at 0.5 s, its second frame is at 0.75 s


def test_windows_cover_the_frame(videos):
    frame = np.arange(24 * 40 * 3, dtype=np.uint32).reshape(24, 40, 3).astype(np.uint8)
    assert len(resize_and_crop(frame, 16, 16, 3, (1, 2))) == 3 + 2 * 6
    gradient = np.broadcast_to(np.arange(40, dtype=np.uint8)[None, :, None] * 6, (24, 40, 3))
    left, middle, right = (w.mean() for _, w in resize_and_crop(gradient, 12, 12, 3))
    assert left < middle < right and middle == pytest.approx(gradient.mean(), abs=4)
    tall = resize_and_crop(np.swapaxes(gradient, 0, 1), 12, 12, 2)
    assert tall[0][1].mean() < tall[1][1].mean()


def test_further_zooms_add_windows_to_training_only(videos, tmp_path):
    split = {
        name: open_split(
            build(videos, tmp_path / "d", crops=2, zooms=(1, 2), validation_fraction=0.3),
            name,
            verify="sizes",
        )
        for name in ("train", "validation")
    }
    windows = {
        name: {
            (split[name].about(i)["zoom"], split[name].about(i)["crop"])
            for i in range(len(split[name]))
        }
        for name in split
    }
    assert windows["validation"] == {(1, 0), (1, 1)} and windows["train"] == windows[
        "validation"
    ] | {(2, 2 + i) for i in range(8)}


def test_embeddings_are_the_encoders_standardised_over_the_training_frames(built):
    split = open_split(built, "train", verify="hashes")
    content = split.manifest.content
    assert content.dimension == 4 * 4 and split.read(0).dtype == np.float16
    space = FrameSpace(content)
    states = torch.cat(
        [
            space.states(torch.from_numpy(split.read(i).astype(np.float32))[None])[0]
            for i in range(len(split))
        ]
    )
    assert states.mean().abs() < 0.2 and 0.7 < states.std() < 1.3
    frames = space.frames(states[None, :4])[0]
    assert frames.shape == (4, 16, 16, 3) and frames.dtype == torch.uint8
    again = space.states(frames[None])
    assert (again - states[None, :4]).abs().mean() < 0.3  # back from rounded pixels


def test_stored_frames_and_stored_embeddings_are_the_same_states(videos, tmp_path, built):
    frames = build(videos, tmp_path / "frames", stored="jpeg", validation_fraction=0.3)
    batches = {}
    for manifest in (built, frames):
        split = open_split(manifest, "train", verify="sizes")
        loader = BatchLoader(
            split,
            context_length=3,
            global_batch_size=4,
            micro_batch_size=4,
            rank=0,
            world_size=1,
            seed=1,
            window_shards=2,
            num_workers=0,
        )
        batches[manifest] = Observation(split.manifest, "cpu")(next(loader).sequences)
    for a, b in zip(batches[built], batches[frames]):
        assert (
            a.shape == (4, 3, 16) and a.dtype == torch.float32 and torch.allclose(a, b, atol=2e-2)
        )  # float16 in the shards


def test_with_patches_each_state_is_a_patch_of_the_same_numbers(videos, tmp_path, built):
    patches = build(videos, tmp_path / "patches", patches=True, validation_fraction=0.3)
    whole, cut = (open_split(path, "train", verify="hashes") for path in (built, patches))
    content = cut.manifest.content
    assert (content.group_size, content.grid, content.dimension) == (4, (2, 2), 4)
    assert cut.manifest.context_length == 3 * 4 and cut.num_targets == 4 * whole.num_targets
    assert len(cut) == len(whole)
    for number in range(len(whole)):
        assert np.array_equal(cut.read(number), whole.read(number).reshape(-1, 4))
    stored = [torch.from_numpy(split.read(0)[None].copy()) for split in (whole, cut)]
    a, b = (FrameSpace(split.manifest.content).states(s) for split, s in zip((whole, cut), stored))
    assert torch.equal(a.reshape(b.shape), b)
    assert "patches" not in load_manifest(built).values["settings"]


def test_the_same_batches_on_any_number_of_ranks_and_workers(built):
    split = open_split(built, "train", verify="sizes")

    def sequences(world_size, num_workers, first_step=0):
        parts = []
        for rank in range(world_size):
            loader = BatchLoader(
                split,
                context_length=3,
                global_batch_size=8,
                micro_batch_size=8 // world_size,
                rank=rank,
                world_size=world_size,
                seed=1,
                window_shards=2,
                num_workers=num_workers,
                first_step=first_step,
            )
            parts.append([next(loader).sequences for _ in range(4 - first_step)])
            loader.close()
        return torch.cat([torch.stack(p) for p in parts], 1)

    reference = sequences(1, 0)
    for world_size, num_workers in ((2, 0), (4, 2), (8, 1)):
        assert torch.equal(sequences(world_size, num_workers), reference)
    assert torch.equal(sequences(2, 0, first_step=2), reference[2:])


def test_a_video_is_in_one_split_only_and_copies_count_once(built, videos, tmp_path):
    names = {
        name: {
            open_split(built, name, verify="sizes").about(i)["video"]
            for i in range(len(open_split(built, name, verify="sizes")))
        }
        for name in ("train", "validation")
    }
    assert (
        not names["train"] & names["validation"] and len(names["train"] | names["validation"]) == 4
    )
    (tmp_path / "twice").mkdir()
    for _i, name in enumerate(("a.mp4", "b.mp4")):
        (tmp_path / "twice" / name).write_bytes((videos / "v0.mp4").read_bytes())
    assert len(find_videos([tmp_path / "twice"], report=quiet)) == 1


def test_a_single_video_is_cut_in_time_with_a_gap(videos, tmp_path):
    said = []
    write_video(tmp_path / "long.mp4", seconds=8)
    manifest = build(
        tmp_path / "long.mp4", tmp_path / "d", said, stride_s=0.25, validation_fraction=0.3
    )
    ends = [
        open_split(manifest, "train", verify="sizes").about(i)["start_s"] + 0.75
        for i in range(len(open_split(manifest, "train", verify="sizes")))
    ]
    starts = [
        open_split(manifest, "validation", verify="sizes").about(i)["start_s"]
        for i in range(len(open_split(manifest, "validation", verify="sizes")))
    ]
    assert max(ends) + 0.75 <= min(starts) + 1e-6 and any("split by time" in line for line in said)


def test_chosen_videos_are_held_out(videos, tmp_path):
    manifest = build(videos, tmp_path / "d", validation_videos=("v2.mp4",))
    split = open_split(manifest, "validation", verify="sizes")
    assert {split.about(i)["video"] for i in range(len(split))} == {"v2.mp4"}
    with pytest.raises(DataError, match="validation videos nowhere.mp4: must be some of"):
        build(videos, tmp_path / "e", validation_videos=("nowhere.mp4",))


def test_unreadable_and_short_videos_are_reported_and_left_out(videos, tmp_path):
    folder, said = tmp_path / "mixed", []
    folder.mkdir()
    for name in ("v0.mp4", "v1.mp4"):
        (folder / name).write_bytes((videos / name).read_bytes())
    (folder / "noise.mp4").write_bytes(os.urandom(5000))
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "cut.mp4").write_bytes((videos / "v2.mp4").read_bytes()[:1500])
    write_video(folder / "short.mp4", seconds=0.4)
    manifest = build(folder, tmp_path / "d", said, validation_fraction=0.5)
    skipped = " ".join(line for line in said if "skipped" in line)
    assert (
        all(name in skipped for name in ("noise.mp4", "empty.mp4", "cut.mp4", "short.mp4"))
        and "shorter than a clip" in skipped
    )
    assert load_manifest(manifest).source["num_skipped"] == 4 and verify_dataset(manifest)[0] == []
    assert "short.mp4: skipped: 0.40 s long: shorter than a clip of 3 + 1 frames, 0.25 s" in skipped
    summary = "2 of 6 videos are stored whole, 0 with something left out or put right, 4 skipped"
    assert summary in said
    with pytest.raises(DataError, match="none of 1 videos could be used"):
        build(folder / "noise.mp4", tmp_path / "e")
    with pytest.raises(DataError, match="no video found"):
        build(tmp_path / "d", tmp_path / "f")


def test_a_decoder_that_crashes_costs_one_video(videos, tmp_path, monkeypatch):
    real, said = video_module.make_part, []
    monkeypatch.setattr(
        video_module,
        "make_part",
        lambda v, *rest: (
            os.kill(os.getpid(), signal.SIGSEGV) if v.name == "v3.mp4" else real(v, *rest)
        ),
    )
    manifest = build(videos, tmp_path / "d", said, validation_fraction=0.3)
    assert any("v3.mp4: skipped: the decoder ended with SIGSEGV" in line for line in said)
    assert load_manifest(manifest).source["num_skipped"] == 1


def test_a_decoder_that_stands_still_is_named_and_ended(videos, tmp_path, monkeypatch):
    real, said = video_module.make_part, []
    monkeypatch.setattr(
        video_module,
        "make_part",
        lambda v, *rest: time.sleep(600) if v.name == "v3.mp4" else real(v, *rest),
    )
    start = time.monotonic()
    manifest = build(videos, tmp_path / "d", said, validation_fraction=0.3, still_s=6.0)
    assert time.monotonic() - start < 60
    (line,) = [line for line in said if "v3.mp4" in line]
    assert "skipped: its worker process" in line and "did not move for 6 s" in line
    assert load_manifest(manifest).source["num_skipped"] == 1


def test_what_was_left_out_is_said_per_video_and_in_all_and_again_after_a_restart(videos, tmp_path):
    from recordings import damaged, remux

    folder, said = tmp_path / "mixed", []
    folder.mkdir()
    for name in ("v0.mp4", "v1.mp4"):
        (folder / name).write_bytes((videos / name).read_bytes())
    for name in ("v2.mp4", "v3.mp4"):
        remux(videos / name, folder / name, damaged({25}, "cut"))
    manifest = build(folder, tmp_path / "d", said, validation_fraction=0.3)
    for name in ("v2.mp4", "v3.mp4"):
        assert any(f"warning: {folder / name}: " in line and "damage" in line for line in said)
    (summary,) = [line for line in said if "videos are stored whole" in line]
    assert summary.startswith("2 of 4 videos are stored whole, 2 with something left out or put ")
    found = load_manifest(manifest).source["findings"]
    assert found["left_out_pictures"] > 2 and found["faulty_pictures"] == 2
    assert str(found["left_out_pictures"]) in summary
    split = open_split(manifest, "train", verify="hashes")
    assert len(split) > 0


def test_linked_folders_are_followed_once_and_other_kinds_are_counted(videos, tmp_path):
    folder, said = tmp_path / "in", []
    (folder / "real").mkdir(parents=True)
    write_video(folder / "real" / "own.mp4", seconds=1.0, seed=7)
    (folder / "real" / "notes.txt").write_text("x")
    (folder / "real" / "more.txt").write_text("x")
    (folder / "real" / "README").write_text("x")
    (folder / "linked").symlink_to(videos)
    (folder / "again").symlink_to(folder / "real")
    found = find_videos([folder], report=said.append)
    assert len(found) == 5 and {video.name.split("/")[0] for video in found} == {"linked", "real"}
    assert "no videos, left out: 3 files (2 x .txt, 1 x no suffix)" in said
    (folder / "real" / "back").symlink_to(folder)
    with pytest.raises(DataError, match="back"):
        find_videos([folder], report=quiet)


KILLED = """
import os, sys
from pathlib import Path
from ebwm_scale.data.prepare import video
real = video.make_part
def part(v, *rest):
    if len(list(Path(sys.argv[2]).parent.glob(".d.parts/*.tar"))) == 2:
        os.kill(os.getppid(), 9)
    real(v, *rest)
video.make_part = part
config = video.VideoDatasetConfig(
    context_length=3,
    height=16,
    width=16,
    encoder_settings={"patch": 8, "components": 4},
    samples_per_shard=5,
    validation_fraction=0.3,
)
video.make_video_dataset([sys.argv[1]], sys.argv[2], config, workers=1)
"""


def test_a_killed_preparation_leaves_no_dataset_and_goes_on_with_the_rest(videos, tmp_path, built):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, videos, tmp_path / "d"], capture_output=True, timeout=120
    )
    assert done.returncode == -9 and not (tmp_path / "d").exists()
    time.sleep(0.5)  # the process that was decoding ends by itself
    said = []
    manifest = build(videos, tmp_path / "d", said, validation_fraction=0.3)
    assert any("were decoded by an earlier run" in line for line in said)
    assert [s.sha256 for s in load_manifest(manifest).splits["train"].shards] == [
        s.sha256 for s in load_manifest(built).splits["train"].shards
    ]
    assert not (tmp_path / ".d.parts").exists()


def test_second_run_keeps_the_dataset_and_other_settings_are_refused(videos, tmp_path):
    said = []
    build(videos, tmp_path / "d")
    build(videos, tmp_path / "d", said)
    assert any("already there" in line for line in said)
    with pytest.raises(DataError, match="differs in settings"):
        build(videos, tmp_path / "d", quality=50)


def test_a_dataset_like_another_can_be_mixed_with_it(videos, tmp_path, built):
    write_video(tmp_path / "new.mp4", seconds=6, seed=9)
    other = build(
        tmp_path / "new.mp4", tmp_path / "d", like=built, split="time", validation_fraction=0.3
    )
    mixed = open_sources([(built, 1), (other, 1)], "train", verify="sizes")
    assert mixed.read(len(mixed) - 1).shape == (4, 16)
    unlike = build(tmp_path / "new.mp4", tmp_path / "e", split="time", validation_fraction=0.3)
    with pytest.raises(DataError.__mro__[1], match="differ in .*(parameters|mean)"):
        open_sources([(built, 1), (unlike, 1)], "train", verify="sizes")


def test_damage_to_a_video_dataset_is_found(built, tmp_path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(built.parent, folder)
    index = json.loads((folder / "train-000000.index.json").read_text())
    offset = index["fields"]["frames.npy"]["offsets"][1]
    content = bytearray((folder / "train-000000.tar").read_bytes())
    content[offset + 150] ^= 1
    (folder / "train-000000.tar").write_bytes(content)
    assert any(
        f"sample {index['keys'][1]} (frames.npy, offset {offset}" in p
        for p in verify_dataset(folder)[0]
    )
    (folder / "encoder.safetensors").write_bytes(b"x" * 10)
    assert any("encoder.safetensors" in p for p in verify_dataset(folder)[0])
    with pytest.raises(DataError, match="sha256 is not the manifest's"):
        FrameSpace(load_manifest(folder).content).encoder


@pytest.mark.parametrize(
    "changes, expected",
    [
        (dict(context_length=0), "context length is 0"),
        (dict(stride_s=-1.0), "stride is -1"),
        (dict(quality=0), "quality is 0"),
        (dict(encoder_settings={"patch": 7, "components": 4}), "patch is 7"),
        (dict(encoder_settings={"patch": 8, "components": 500}), "components is 500"),
        (dict(encoder="sd-vae", encoder_settings={}), "sd-vae needs"),
        (dict(interval_s=0.25, stride_s=0.1234567), "no common multiple"),
    ],
)
def test_impossible_settings_are_one_clear_line(videos, tmp_path, changes, expected):
    said = []
    with pytest.raises(DataError) as error:
        build(videos, tmp_path / "d", said, **changes)
    assert (
        expected in " ".join([str(error.value), *said])
        and "\n" not in str(error.value)
        and not (tmp_path / "d").exists()
    )


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff\xe0" + b"x" * 100])
def test_a_broken_image_is_an_error(content):
    with pytest.raises(ValueError, match="no readable image"):
        decode_image(content)
