"""Imagination: who is held against what, which actions are swapped, and intervals over episodes."""

import json

import numpy as np
import pytest
import torch
from imagined_worlds import SETTINGS, model_of, opened
from torch.nn import functional as F
from worlds import write_world

from ebwm_scale import evaluate, think
from ebwm_scale.core.errors import DataError, UserError
from ebwm_scale.evaluation import clusters, imagination
from ebwm_scale.evaluation.pixels import measure_pixels
from ebwm_scale.evaluation.rollouts import roll_out
from ebwm_scale.inference.imagination import (
    Imagined,
    imagine,
    known_ahead,
    with_actions_of,
)
from ebwm_scale.inference.thinking import ThinkingConfig
from ebwm_scale.inference.windows import windows_of

pytestmark = pytest.mark.multiprocess  # episodes are read in processes of their own


def test_windows_are_parts_of_held_out_episodes_with_the_actions_taken_in_them(world):
    split, observe = opened(world)
    windows = windows_of(split, observe, num_frames=6, max_windows=8)
    assert len({window.episode for window in windows}) == 4 and len(windows) == 8
    for window in windows:
        assert window.states.shape == (6, 4, 192) and len(window.conditions["action"]) == 5
        shown = observe.space.frames(window.states.flatten(0, 1)[None])[0].numpy()
        assert np.abs(shown.astype(int) - window.frames.astype(int)).max() <= 1
        for moved, before, after in zip(
            window.conditions["action"], window.frames, window.frames[1:]
        ):
            assert np.array_equal(before, after) or int(moved[0]) != 0
    with pytest.raises(DataError, match="no held-out episode and no clip has 20 frames"):
        windows_of(split, observe, num_frames=20, max_windows=2)


def test_a_dataset_without_whole_episodes_gives_its_clips(tmp_path):
    split, observe = opened(write_world(tmp_path / "world", num_clips=12, context_length=5))
    windows = windows_of(split, observe, num_frames=4, max_windows=9)
    assert len(windows) == 3 and windows[0].states.shape == (4, 4, 192)
    assert windows[0].frames is None and len(windows[0].conditions["action"]) == 3


def test_what_is_sensed_is_not_known_ahead_and_actions_are(world):
    split, observe = opened(world)
    window, other = windows_of(split, observe, num_frames=6, max_windows=4)[:2]
    known = known_ahead(window, 2)
    assert torch.equal(known["action"], window.conditions["action"])
    assert torch.equal(known["proprio"][:2], window.conditions["proprio"][:2])
    assert torch.equal(known["proprio"][2:], known["proprio"][1:2].expand(3, 2))
    swapped = with_actions_of(window, other, 1).conditions
    assert torch.equal(swapped["action"][:1], window.conditions["action"][:1])
    assert torch.equal(swapped["action"][1:], other.conditions["action"][1:])
    assert torch.equal(swapped["proprio"], window.conditions["proprio"])


def test_imagined_frames_follow_one_another_as_a_session_says(world):
    """A window by itself, and in a batch; the first k of more steps are those of k."""
    split, observe = opened(world)
    windows = windows_of(split, observe, num_frames=6, max_windows=4)
    model = model_of(world)
    ids = torch.arange(4)
    whole = imagine(model, windows, num_context=2, num_steps=4, sample_ids=ids, energies=True)
    assert whole.states.shape == (4, 4, 4, 192) and whole.energies.shape == (4, 4)
    alone = imagine(model, windows[2:3], num_context=2, num_steps=2, sample_ids=ids[2:3])
    torch.testing.assert_close(alone.states[0], whole.states[2, :2], rtol=1e-4, atol=1e-5)


def test_a_model_that_knows_the_truth_has_no_error_and_judges_by_it(world, monkeypatch):
    """The measures of an oracle: it imagines what was, under the actions that were taken."""
    split, _ = opened(world)
    true_actions = {}

    def oracle(model, windows, *, num_context, num_steps, config, sample_ids):
        states = []
        for window in windows:
            key = (window.episode, window.start)
            true_actions.setdefault(key, window.conditions["action"])
            wrong = (window.conditions["action"] != true_actions[key]).any()
            states.append(window.states[num_context : num_context + num_steps] + float(wrong))
        return Imagined(torch.stack(states), None)

    monkeypatch.setattr(imagination, "imagine", oracle)
    model = model_of(world, kind="baseline")
    result = imagination.evaluate_imagination(model, split, against=model, **SETTINGS)
    assert result["horizons"] == [1, 2, 4] and result["horizons_left_out"] == [16]
    for row in result["errors"]:
        assert row["model"]["mean"] == row["against"]["mean"] == 0
        assert row["persistence"]["mean"] > 0
        assert row["gain_over_persistence"] == row["persistence"]
        assert row["shuffled_actions"]["mean"] == pytest.approx(0.5)
        assert row["gain_over_shuffled_actions"]["low"] > 0
    judged = result["judge"]["prediction_error"]
    assert judged["another_action"]["within_a_context"]["mean"] == 1
    # A square that stands still looks the same at another time: such a pair counts half.
    assert judged["another_episode"]["auroc"]["mean"] > 0.7
    assert result["judge"]["prediction_error_of_against"] == judged and "steps" not in result


def test_errors_of_what_learns_nothing_are_those_of_its_definition(world):
    split, observe = opened(world)
    model = model_of(world)
    result = imagination.evaluate_imagination(model, split, **SETTINGS)
    windows = windows_of(split, observe, num_frames=2 + 4, max_windows=6)
    by_episode = {}
    for window in windows:
        last, before, truth = window.states[1], window.states[0], window.states[5]
        found = by_episode.setdefault(window.episode, ([], []))
        found[0].append(F.smooth_l1_loss(last, truth).item())
        found[1].append(F.smooth_l1_loss(last + 4 * (last - before), truth).item())
    row = result["errors"][-1]
    for number, name in enumerate(("persistence", "linear_extrapolation")):
        expected = np.mean([np.mean(values[number]) for values in by_episode.values()])
        assert row[name]["mean"] == pytest.approx(expected, rel=1e-5)
    assert [row["num_steps"] for row in result["steps"]] == [1, 2, 3, 4]
    assert result["steps"][1]["error"] == pytest.approx(result["errors"][0]["model"])
    assert set(result["judge"]) == {"energy", "energy_above_prediction", "prediction_error"}


def test_another_model_of_other_data_is_refused(world, tmp_path):
    split, _ = opened(world)
    other = model_of(write_world(tmp_path / "other", proprio=False))
    with pytest.raises(UserError, match="--against: its data.conditions is not that of this run"):
        imagination.evaluate_imagination(model_of(world), split, against=other, **SETTINGS)
    with pytest.raises(UserError, match="the held-out episodes have 9 more"):
        imagination.evaluate_imagination(
            model_of(world), split, **{**SETTINGS, "horizons": [30, 40]}
        )


def test_intervals_draw_whole_episodes():
    generator = torch.Generator().manual_seed(0)
    of_episode = torch.randn(12, generator=generator)
    names = [str(i) for i in range(12) for _ in range(20)]
    values = of_episode.repeat_interleave(20)
    once = clusters.mean_ci(of_episode, [str(i) for i in range(12)])
    assert clusters.mean_ci(values, names) == pytest.approx(once)  # copies say nothing new
    real, wrong = torch.randn(2, 30, generator=generator)
    names = [str(i // 4) for i in range(30)]
    lower = [float(a < b) for a in real for b in wrong]
    found = clusters.auroc_ci(real, wrong, names)
    assert found["mean"] == pytest.approx(np.mean(lower))
    assert found["low"] < found["mean"] < found["high"]
    assert clusters.auroc_ci(real, real + 100, names)["low"] == 1
    own, draws = clusters.auroc_draws([real], [wrong], names)  # of one seed: the same
    assert own.tolist() == [found["mean"]]
    assert np.quantile(draws, 0.025) == pytest.approx(found["low"])
    own, draws = clusters.auroc_draws([real, real], [real + 100, real - 100], names)
    assert own.tolist() == [1, 0] and set(draws.round(9)) == {0, 0.5, 1}  # seeds are drawn too


def test_pixels_are_measured_against_the_frames_themselves(world):
    pytest.importorskip("skimage", reason="the package scikit-image is not installed")
    split, observe = opened(world)
    windows = windows_of(split, observe, num_frames=4, max_windows=6)
    truth = torch.stack([window.states[2:] for window in windows])
    last = torch.stack([window.states[1:2] for window in windows]).expand_as(truth)
    imagined = {"truth": truth, "model": truth, "persistence": last}
    episodes = [window.episode for window in windows]
    found = measure_pixels(windows, imagined, observe.space, 2, [1, 2], episodes)
    for place, (psnr, ssim) in enumerate(zip(found["psnr"], found["ssim"])):
        assert psnr["horizon"] == ssim["horizon"] == place + 1
        assert psnr["model"]["mean"] == 100 and ssim["model"]["mean"] == 1  # the frames themselves
        expected = []
        for window in windows:
            off = window.frames[1].astype(float) - window.frames[2 + place]
            expected.append(min(100.0, 10 * np.log10(255**2 / max(1e-9, (off**2).mean()))))
        mean = clusters.mean_ci(torch.tensor(expected), episodes)["mean"]
        assert psnr["persistence"]["mean"] == pytest.approx(mean, rel=1e-5)
        assert psnr["persistence"]["mean"] < 100 and 0 < ssim["persistence"]["mean"] < 1


def test_the_command_evaluates_a_world_beside_another_run(world, monkeypatch, tmp_path):
    models = {"one": model_of(world), "two": model_of(world, kind="baseline", predicts="change")}
    monkeypatch.setattr(
        evaluate, "load_checkpoint", lambda path, **k: (models[path.name], models[path.name].config)
    )
    asked = ["--steps", "1", "2", "--horizons", "1", "3", "--max-samples", "6", "--films", "2"]
    code = evaluate.main(
        [str(tmp_path / "one"), "--against", str(tmp_path / "two"), *asked, "--output",
         str(tmp_path / "out")]
    )  # fmt: skip
    assert code == 0
    found = json.loads((tmp_path / "out" / "imagination.json").read_text())
    assert found["horizons"] == [1, 3] and found["against"].endswith("two")
    # A fresh baseline of changes is a copy of the last frame, and so is its prediction error.
    for row in found["errors"]:
        assert row["against"] == pytest.approx(row["persistence"], rel=1e-5)
    page = (tmp_path / "out" / "imagination.html").read_text()
    assert page.count("data:image/png;base64,") == 2  # --films
    assert {"imagination.html", "evaluation.json", "evaluation.html"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }


@pytest.fixture
def thinks(world, monkeypatch, tmp_path):
    """Run ebwm think in a folder of its own, on a model of the world."""
    model = model_of(world)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(think, "load_checkpoint", lambda *a, **k: (model, model.config))
    return lambda *arguments: think.main([str(tmp_path), *map(str, arguments)])


def test_a_held_out_episode_is_imagined_beside_the_truth(thinks, tmp_path, capsys):
    assert thinks("--episode", 0, "--max-new", 3, "--num-starts", 2) == 0
    out = capsys.readouterr().out
    assert out.count("energies") == 2 and out.count("errors") == 2
    from PIL import Image

    width, height = Image.open(tmp_path / "imagination.png").size
    assert (width, height) == (5 * 100, 3 * 100)  # 2 + 3 frames; the truth and two futures
    assert (tmp_path / "imagination.mp4").stat().st_size > 0
    np.save(tmp_path / "moves.npy", np.array([1, 1, 2, 0, 3]))
    for actions in ("hold", "random", "moves.npy"):
        asked = ("--episode", 1, "--max-new", 4, "--actions", actions, "--output", "other.gif")
        assert thinks(*asked) == 0
        assert "errors" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("--episode", "9"), "has no held-out episode 9"),
        (("--episode", "0", "--max-new", "30"), "it has 9 more, not 30"),
        (("--episode", "0", "--start", "0.5"), "a whole number of frames"),
        (("--episode", "0", "--actions", "none.npy"), "no such file"),
        (("--episode", "0", "--actions", "wide.npy"), "expected 8 rows or more"),
        (("--episode", "0", "--actions", "high.npy"), "below its 5 values"),
        (("--episode", "0", "--actions", "half.npy"), "give whole numbers from 0 on"),
        (("--episode", "0", "--output", "a.txt"), "unknown kind of file"),
        (("--actions", "true"), "only an episode is imagined under actions"),
        (("--video", "v.mp4"), "conditioned on actions, which a video does not tell"),
    ],
)
def test_what_cannot_be_imagined_is_one_line(thinks, tmp_path, capsys, arguments, expected):
    np.save(tmp_path / "wide.npy", np.zeros((20, 2)))
    np.save(tmp_path / "high.npy", np.full(20, 7))
    np.save(tmp_path / "half.npy", np.full(20, 0.5))
    assert thinks(*arguments) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


def test_a_future_under_its_own_actions_has_errors_and_others_differ(world):
    split, observe = opened(world)
    from ebwm_scale.data.format.episodes import episodes_of, read_episode

    episode = read_episode(split.manifest, episodes_of(split.manifest)[0])
    options = {"start": 2, "num_steps": 4, "config": ThinkingConfig(seed=1)}
    model = model_of(world)
    true = roll_out(model, episode, observe, actions="true", **options)
    held = roll_out(model, episode, observe, actions="hold", **options)
    assert true.errors.shape == (1, 4) and held.errors is None
    expected = F.smooth_l1_loss(true.futures[0].states[0, 3], true.window.states[5])
    assert float(true.errors[0, 3]) == pytest.approx(float(expected), rel=1e-5)
    assert not torch.equal(true.futures[0].states, held.futures[0].states)
    assert true.window.start == 2
