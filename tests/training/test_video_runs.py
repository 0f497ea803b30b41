"""Training on clips: every recipe, the same promises as for text, and damage that is set aside
while it goes on.
"""

import json
import re
import signal

import numpy as np
import pytest

pytest.importorskip("av", reason="the package av is not installed")

from training_runs import Runs, same

from ebwm_scale.data.prepare.video import VideoDatasetConfig, make_video_dataset

VIDEO = {"state.kind": "embedding", "refinement.step_size": 5}
RECIPES = {
    "anchored": {"state.initial": "most_recent", "refinement.graph": "full"},
    "S1": {"model.conditioning": "time_embed", "model.predicted_input": "state"},
    "S2": {
        "refinement.graph": "truncate",
        "refinement.loss": "last",
        "refinement.replay": True,
        "refinement.noise": 0.1,
        "refinement.step_size_random_factor": 2,
        "state.initial": "most_recent",
    },
    "baseline": {"model.kind": "baseline"},
}


def write_video(path, seed):
    import av

    generator = np.random.default_rng(seed)
    base, speed = generator.integers(0, 100, (24, 24, 3)), generator.integers(1, 4)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=20)
        stream.width, stream.height, stream.pix_fmt = 24, 24, "yuv420p"
        for k in range(80):
            frame = np.roll(base, k * speed, axis=1).astype(np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """{stored: manifest}: clips of 4 + 1 frames of 16 x 16, embeddings of 16 numbers."""
    folder = tmp_path_factory.mktemp("clips")
    (folder / "videos").mkdir()
    for seed in range(3):
        write_video(folder / "videos" / f"{seed}.mp4", seed)
    config = dict(
        context_length=4,
        stride_s=0.25,
        height=16,
        width=16,
        encoder_settings={"patch": 8, "components": 4},
        validation_videos=("1.mp4",),
        samples_per_shard=6,
    )
    return {
        stored: make_video_dataset(
            [folder / "videos"],
            folder / stored,
            VideoDatasetConfig(**config, stored=stored),
            workers=1,
            report=lambda _: None,
        )
        for stored in ("embedding", "jpeg")
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory, clips):
    return Runs(tmp_path_factory.mktemp("runs"), clips["embedding"])


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(recipe, marks=pytest.mark.soak) if recipe == "S2" else recipe
        for recipe in RECIPES
    ],
)
def test_every_recipe_trains_and_resumes_bitwise_after_a_kill(runs, recipe):
    overrides = VIDEO | RECIPES[recipe]
    output = runs.run(recipe, overrides=overrides)
    assert "SmoothL1 (persistence" in output and "frames/s" in output
    if recipe in ("anchored", "S2"):
        assert (
            runs.interrupt(
                f"{recipe}_killed", signal.SIGKILL, after="step 5/8", overrides=overrides
            )
            == -signal.SIGKILL
        )
        runs.run(f"{recipe}_killed", overrides=overrides, flags=("--resume",))
        assert (
            runs.rows(f"{recipe}_killed") == runs.rows(recipe)
            and same(runs.state(f"{recipe}_killed"), runs.state(recipe)) == []
        )


@pytest.mark.soak
def test_two_processes_give_the_losses_of_one(runs):
    overrides = VIDEO | RECIPES["anchored"]
    runs.run("one", overrides=overrides)
    runs.run("two", overrides=overrides, processes=2)
    one, two = runs.losses("one"), runs.losses("two")
    assert one.keys() == two.keys() and all(
        two[key] == pytest.approx(one[key], rel=1e-5) for key in one
    )


def test_stored_frames_train_like_stored_embeddings(runs, clips):
    overrides = VIDEO | RECIPES["anchored"]
    runs.run(
        "frames", overrides=overrides | {"data.manifest": str(clips["jpeg"]), "data.num_workers": 1}
    )
    runs.run("embeddings", overrides=overrides)
    frames, embeddings = runs.losses("frames"), runs.losses("embeddings")
    assert all(
        frames[key] == pytest.approx(embeddings[key], rel=2e-2) for key in embeddings
    )  # float16 embeddings


def test_rows_and_report_hold_the_baselines_and_the_pictures(runs):
    overrides = VIDEO | RECIPES["anchored"]
    if not (runs.folder / "one").exists():
        runs.run("one", overrides=overrides)
    folder = runs.folder / "one"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row.get("split") == "validation"][-1]
    assert {
        "persistence_loss",
        "linear_extrapolation_loss",
        "num_frames",
        "loss_per_step",
        "initial_loss",
    } <= last.keys() and "perplexity" not in last
    assert last["initial_loss"] == pytest.approx(
        last["persistence_loss"], rel=1e-5
    )  # it starts from the last frame
    assert {"frames_seen", "frames_per_s"} <= rows[0].keys()
    clip = json.loads((folder / "samples.json").read_text())["clips"][0]
    assert [c["step"] for c in clip["candidates"]] == [0, 1, 2] and clip["candidates"][0][
        "loss"
    ] == pytest.approx(clip["persistence_loss"], rel=1e-5)
    assert all(np.isfinite(c["energy"]) for c in clip["candidates"]) and np.isfinite(
        clip["truth_energy"]
    )
    assert (
        len(clip["context"]) == 4
        and len(clip["continuation"]) == len(clip["continuation_truth"]) == 3
    )
    page = (folder / "report.html").read_text()
    assert (
        page.count('<img src="data:image/jpeg;base64,') == 3 * (4 + 3 + 1 + 6)
        and "It predicts better than copying the last frame" in page
    )
    assert re.search(r"linear extrapolation", page)


def test_samples_damaged_while_training_are_set_aside_and_too_many_end_the_run(
    runs, clips, tmp_path
):
    import shutil

    overrides = VIDEO | {"data.verify": "sizes", "train.max_steps": 20}
    for name, rows, limit, code in (("few", (2,), 4, 0), ("many", (0, 1, 2, 3, 4, 5), 3, 1)):
        shutil.copytree(clips["embedding"].parent, tmp_path / name)
        shard = sorted((tmp_path / name).glob("train-*.tar"))[0]
        index = json.loads(shard.with_suffix(".index.json").read_text())
        content = bytearray(shard.read_bytes())
        for row in rows:
            content[index["fields"]["frames.npy"]["offsets"][row] + 200] ^= 1
        shard.write_bytes(content)
        output = runs.run(
            name,
            expect=code,
            overrides=overrides
            | {
                "data.manifest": str(tmp_path / name / "manifest.json"),
                "data.max_quarantined": limit,
            },
        )
        listed = [
            json.loads(line)
            for line in (runs.folder / name / "quarantine.jsonl").read_text().splitlines()
        ]
        assert {bad["key"] for bad in listed} <= {index["keys"][row] for row in rows} and all(
            "checksum" in bad["reason"] for bad in listed
        )
        assert (
            len(listed) == 1
            if code == 0
            else len(listed) > 3 and "data.max_quarantined is 3" in output
        )


def test_a_mixture_and_a_stream_train(runs, clips, tmp_path):
    shards = sorted(clips["embedding"].parent.glob("train-*.tar"))
    output = runs.run(
        "stream",
        overrides=VIDEO
        | {"data.stream": [f"pipe:cat {s}" for s in shards], "data.stream_buffer": 4},
        flags=("--allow-pipe",),
    )
    assert "shards are streamed" in output and runs.rows("stream")[-1]["step"] == 8
    runs.interrupt(
        "stream_killed",
        signal.SIGKILL,
        after="step 5/8",
        overrides=VIDEO | {"data.stream": [str(s) for s in shards], "data.stream_buffer": 4},
    )
    assert "resumed at step 3" in runs.run(
        "stream_killed",
        flags=("--resume",),
        overrides=VIDEO | {"data.stream": [str(s) for s in shards], "data.stream_buffer": 4},
    )
    sources = [
        {"manifest": str(clips["embedding"]), "weight": 2},
        {"manifest": str(clips["embedding"])},
    ]
    runs.run("mixed", overrides=VIDEO | {"data.manifest": None, "data.sources": sources})
    assert runs.rows("mixed")[-1]["step"] == 8
