"""python -m ebwm_scale.think: text and video, energy models and baselines, and what it refuses."""

import json
import random

import numpy as np
import pytest
import torch

from ebwm_scale import think
from ebwm_scale.config.load import config_from_dict
from ebwm_scale.data.prepare.text import make_text_dataset
from ebwm_scale.data.prepare.tokenizer import train_tokenizer
from ebwm_scale.data.prepare.video import VideoDatasetConfig, make_video_dataset
from ebwm_scale.data.tokenizer import open_tokenizer
from ebwm_scale.world_model import WorldModel

LENGTH = 12


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("text"), random.Random(0)
    (folder / "corpus").mkdir()
    words = [
        "".join(generator.choice("abcdefghij") for _ in range(generator.randint(2, 6)))
        for _ in range(60)
    ]
    for i in range(4):
        (folder / "corpus" / f"{i}.txt").write_text(
            " ".join(generator.choice(words) for _ in range(300))
        )
    train_tokenizer([folder / "corpus"], folder / "t.model", 300)
    return make_text_dataset(
        [folder / "corpus"],
        folder / "d",
        tokenizer=folder / "t.model",
        context_length=LENGTH,
        report=lambda _: None,
    )


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    av = pytest.importorskip("av", reason="the package av is not installed")
    folder = tmp_path_factory.mktemp("video")
    with av.open(str(folder / "v.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=20)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
        for k in range(160):
            frame = np.roll(
                np.linspace(0, 200, 32).astype(np.uint8)[None, :, None].repeat(24, 0).repeat(3, 2),
                k,
                axis=1,
            )
            for packet in stream.encode(
                av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            ):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    config = VideoDatasetConfig(
        context_length=4,
        stride_s=0.25,
        height=16,
        width=16,
        encoder_settings={"patch": 8, "components": 4},
        validation_fraction=0.3,
    )
    return folder / "v.mp4", make_video_dataset(
        [folder / "v.mp4"], folder / "d", config, workers=1, report=lambda _: None
    )


@pytest.fixture
def use(monkeypatch):
    """Put an untrained model in place of a checkpoint; the command is the same."""

    def place(sections, manifest):
        torch.manual_seed(0)
        config = config_from_dict(
            {
                "model": {
                    "num_layers": 2,
                    "width": 32,
                    "num_heads": 2,
                    **sections.get("model", {}),
                },
                "state": sections.get("state", {}),
                "refinement": {"step_size": 3.0},
                "data": {
                    "manifest": str(manifest),
                    "context_length": sections.get("length", LENGTH),
                },
            }
        )
        model = WorldModel(config).eval()
        monkeypatch.setattr(think, "load_checkpoint", lambda path, **options: (model, config))

    return place


def run(capsys, *arguments):
    code = think.main(["run", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("kind", ["energy", "baseline"])
def test_text_is_continued_and_prompts_of_any_length_are_taken(text, use, capsys, kind):
    use({"model": {"vocabulary_size": 300, "kind": kind}}, text)
    code, out, err = run(capsys, "--prompt", "abc de", "--max-new", 20)
    assert (
        code == 0
        and out.startswith("abc de")
        and len(out) > 10
        and "tokens/s" in err
        and ("steps per token" in err) == (kind == "energy")
        and "mean energy" not in err
    )
    assert (
        "mean energy" in run(capsys, "--prompt", "abc de", "--max-new", 3, "--energies")[2]
    ) == (kind == "energy")
    long = "abc defg hij " * 30
    code, out, err = run(
        capsys, "--prompt", long, "--prompt", "", "--prompt", "ünknown ☃ characters", "--max-new", 5
    )
    assert (
        code == 0
        and f"is cut to its last {LENGTH}, the context" in err
        and len(out.split("\n\n")) >= 3
        and "ünknown ☃" in out
    )


def test_streamed_text_is_the_decoded_text(text, use, capsys):
    use({"model": {"vocabulary_size": 300}}, text)
    alone = run(capsys, "--prompt", "abc", "--max-new", 12, "--temperature", 1, "--seed", 3)[1]
    pair = run(capsys, "--prompt", "abc", "--prompt", "abc", "--max-new", 12)[1]
    greedy = run(capsys, "--prompt", "abc", "--max-new", 12)[1]
    assert (
        pair.split("\n\n")[0] == greedy.rstrip("\n")
        and alone
        == run(capsys, "--prompt", "abc", "--max-new", 12, "--temperature", 1, "--seed", 3)[1]
    )
    tokenizer = open_tokenizer(json.loads(text.read_text()) and text.parent / "tokenizer.model")
    assert tokenizer.encode(greedy.rstrip("\n"))


def test_thinking_options_reach_the_model(text, use, capsys, tmp_path):
    use({"model": {"vocabulary_size": 300}}, text)
    (tmp_path / "prompts.txt").write_text("abc\nde fg\n")
    code, _, err = run(
        capsys,
        "--prompts",
        tmp_path / "prompts.txt",
        "--max-new",
        3,
        "--num-steps",
        6,
        "--num-starts",
        2,
        "--accept-only-if-lower",
        "--tolerance",
        1e9,
    )
    assert (
        code == 0 and "1.00 steps per token" in err
    )  # a tolerance that no step exceeds: everything stops after the first
    err = run(capsys, "--prompt", "abc", "--max-new", 3, "--num-steps", 6)[2]
    assert "6.00 steps per token" in err
    assert "--num-steps 6: trained were 2, and further ones may make predictions worse" in err
    err = run(capsys, "--prompt", "abc", "--max-new", 3, "--num-steps", 2)[2]
    assert "trained were" not in err


@pytest.mark.parametrize("name", ["c.png", "c.gif", "c.mp4"])
@pytest.mark.multiprocess
def test_video_is_continued_to_a_file_that_can_be_opened(video, use, capsys, tmp_path, name):
    path, manifest = video
    use({"state": {"kind": "embedding", "dimension": 16}, "length": 4}, manifest)
    code, out, err = run(
        capsys, "--video", path, "--max-new", 6, "--output", tmp_path / name, "--start", 1
    )
    assert code == 0 and "4 frames of context, 6 predicted" in out and "energies" in out, err
    from PIL import Image

    if name.endswith("mp4"):
        import av

        with av.open(str(tmp_path / name)) as container:
            assert sum(1 for _ in container.decode(video=0)) == 10
    else:
        image = Image.open(tmp_path / name)
        assert getattr(image, "n_frames", 1) == (10 if name.endswith("gif") else 1)


@pytest.mark.parametrize(
    "sections, arguments, expected",
    [
        ("text", ("--video", "x.mp4"), "this is a model of text"),
        ("text", (), "nothing to continue"),
        ("text", ("--prompt", "a", "--max-new", 0), "--max-new is 0"),
        ("text", ("--prompt", "a", "--num-steps", 0), "num_steps is 0"),
        ("text", ("--prompts", "/nowhere"), "cannot be read"),
        (
            "text",
            ("--prompt", "a", "--prompt", "b\udcff"),
            "--prompt 2 is not UTF-8 at character 1",
        ),
        ("text", ("--prompt", "\ud800"), "--prompt 1 is not UTF-8 at character 0"),
        ("text", ("--prompts", "NOT UTF-8"), "cannot be read as UTF-8 text"),
        ("text", ("--prompt", "a", "--data", "/nowhere"), "name the dataset with --data"),
        ("text", ("--prompt", "a", "--temperature", -1), "temperature is -1"),
        ("baseline", ("--prompt", "a", "--num-steps", 3), "does not think"),
        ("video", ("--prompt", "a"), "this is a model of video"),
        ("video", ("--video", "/nowhere.mp4"), "no such file"),
        ("video", (), "nothing to continue"),
        ("video file", ("--start", 99), "must lie inside the video"),
        ("video file", ("--output", "x.webm"), "unknown kind of file"),
    ],
)
@pytest.mark.multiprocess
def test_what_cannot_be_done_is_one_clear_line(
    text, video, use, capsys, tmp_path, sections, arguments, expected
):
    path, manifest = video
    (tmp_path / "prompts").write_bytes(b"good\nb\xffd\n")
    arguments = tuple(tmp_path / "prompts" if a == "NOT UTF-8" else a for a in arguments)
    if sections.startswith("video"):
        use({"state": {"kind": "embedding", "dimension": 16}, "length": 4}, manifest)
        arguments = ("--video", path, *arguments) if sections == "video file" else arguments
    else:
        use(
            {
                "model": {
                    "vocabulary_size": 300,
                    "kind": "baseline" if sections == "baseline" else "energy",
                }
            },
            text,
        )
    code, out, err = run(capsys, *arguments)
    assert code == 2 and expected in err and err.count("\n") == 1


def test_data_of_another_model_is_refused(text, use, capsys):
    use({"model": {"vocabulary_size": 77}}, text)
    assert "not the data it was trained on" in run(capsys, "--prompt", "a")[2]


def test_what_is_no_checkpoint_is_one_clear_line(capsys, tmp_path):
    code = think.main([str(tmp_path), "--prompt", "a"])
    assert code == 2 and "neither a run folder" in capsys.readouterr().err


@pytest.mark.multiprocess
def test_the_context_of_a_video_is_what_a_player_shows_and_damage_is_said(video, tmp_path, capsys):
    import sys
    from pathlib import Path
    from types import SimpleNamespace

    sys.path.append(str(Path(__file__).parents[1] / "data"))
    from recordings import damaged, numbered, pattern, remux, write

    content = SimpleNamespace(interval_s=0.25, height=48, width=80)
    turned = write(
        tmp_path / "turned.mp4",
        [np.rot90(pattern())] * 40,
        setup=lambda stream: stream.set_display_rotation(270),
    )
    frames = think.context_frames(turned, content, 0.5, 4)
    assert frames.shape == (4, 48, 80, 3)
    expected = pattern().ravel().astype(float)
    for frame in frames:
        assert np.corrcoef(frame.ravel().astype(float), expected)[0, 1] > 0.97
    assert capsys.readouterr().err == ""

    whole = write(tmp_path / "whole.mp4", numbered(60))
    broken = remux(whole, tmp_path / "broken.mp4", damaged({25}, "cut"))
    assert 1 <= len(think.context_frames(broken, content, 0.0, 9)) <= 6  # up to the damage
    assert len(think.context_frames(broken, content, 1.6, 4)) == 4
    assert "left out because of damage" in capsys.readouterr().err
    with pytest.raises(think.UserError, match="has no frame at 9.0 s"):
        think.context_frames(whole, content, 9.0, 4)
    (tmp_path / "none.mp4").write_bytes(b"")
    with pytest.raises(think.DataError, match="is empty"):
        think.context_frames(tmp_path / "none.mp4", content, 0.0, 4)
