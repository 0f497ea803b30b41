"""The explorer of video and worlds says what thinking computes, for true frames and wrong ones, for
actions and plans; and each mistake in one line.
"""

import dataclasses
import re

import numpy as np
import pytest
import torch
from explored_runs import frame_model_of

from ebwm_scale import explore
from ebwm_scale.control.planner import Planner
from ebwm_scale.core.errors import UserError
from ebwm_scale.data.format.episodes import find_episode, read_episode
from ebwm_scale.evaluation.rollouts import roll_out
from ebwm_scale.exploring.frame_actions import action_options
from ebwm_scale.exploring.frame_request import numbers_of
from ebwm_scale.exploring.frame_source import stored_actions
from ebwm_scale.inference.frame_by_frame import frame_error, judge, look_ahead
from ebwm_scale.inference.generation import candidate_energies
from ebwm_scale.inference.imagination import imagine
from ebwm_scale.inference.thinking import ThinkingConfig
from ebwm_scale.reporting.numbers import show
from ebwm_scale.reporting.pictures import difference, picture, scale_of_differences

pytestmark = pytest.mark.multiprocess  # datasets are written by processes of their own


@pytest.fixture
def world(opened):
    return opened("world").explorer


def window_of(explorer, *, first=2, num_frames=6, number=0):
    return explorer.source.window(number, first, num_frames)


def texts_of(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))


def test_imagined_frames_are_those_of_think(opened, runs):
    """As `ebwm think world --episode 1 --start 2 --max-new 3` tells energies and errors."""
    pages = opened("world", "--episode", "1", "--first", "2", "--ahead", "3")
    page = pages.page(None)
    model, config = runs["world"]
    explorer = pages.explorer
    episode = read_episode(explorer.manifest, find_episode(explorer.manifest, "1"))
    config = ThinkingConfig(seed=config.train.seed)
    told = roll_out(
        model, episode, explorer.observe, start=2, num_steps=3, actions="true", config=config
    )
    assert told.num_context == pages.start.num_context
    for energy, error in zip(told.futures[0].energies[0], told.errors[0]):
        assert f"energy {show(float(energy))}, error {show(float(error))}" in page
    # the first of them, step by step
    assert f"after step 3, energy {show(float(told.futures[0].energies[0, 0]))}" in page


def test_a_view_has_the_steps_of_thinking_and_one_more(world, runs):
    model, _ = runs["world"]
    window = window_of(world)
    config = ThinkingConfig(num_steps=3, num_starts=3, seed=5)
    view = look_ahead(model, window, 2, config)
    assert [len(start.moments) for start in view.starts] == [4, 4, 4]
    energies = [start.last.energy for start in view.starts]
    assert view.chosen == int(np.argmin(energies)) and len(set(energies)) == 3
    kept = imagine(model, [window], num_context=2, num_steps=1, config=config, energies=True)
    torch.testing.assert_close(view.prediction, kept.states[0, 0])
    assert float(kept.energies[0, 0]) == pytest.approx(min(energies), rel=1e-6)
    for number in (1, 2, 4):
        fewer = look_ahead(model, window, 2, dataclasses.replace(config, num_steps=number))
        for start, other in zip(view.starts, fewer.starts):
            same = [*start.moments, start.one_more][number]
            torch.testing.assert_close(same.state, other.last.state)
            assert same.energy == pytest.approx(other.last.energy, rel=1e-5, abs=1e-6)
            assert same.num_steps == number
    stopped = look_ahead(model, window, 2, dataclasses.replace(config, tolerance=1e9))
    assert all(len(s.moments) == 2 and s.one_more is None for s in stopped.starts)


def test_frames_are_judged_by_their_energy_and_their_distance(world, runs):
    model, _ = runs["world"]
    window = window_of(world)
    view = look_ahead(model, window, 3)
    frames = [window.states[3], window.states[0], view.prediction]
    judged = judge(model, window, 3, frames, view.prediction)
    assert judged.energies[2] == pytest.approx(view.starts[0].last.energy, rel=1e-5)
    assert judged.distances[2] == 0
    assert judged.distances[0] == frame_error(window.states[3], view.prediction)
    embedded = model.state_space().embed(window.states[3][None]).vectors[0]
    known = {name: values[:3] for name, values in window.conditions.items()}
    (energy,) = candidate_energies(model, window.context(3), embedded, known).tolist()
    assert judged.energies[0] == pytest.approx(energy, rel=1e-5)
    plain, _ = runs["plain_world"]
    told = judge(plain, window, 3, frames, look_ahead(plain, window, 3).prediction)
    assert told.energies is None and len(told.distances) == 3


def test_the_true_frame_stands_beside_wrong_ones(opened):
    text = texts_of(opened("world", "--against", "plain_world", "--first", "3").page(None))
    for kind in (
        "the true next frame",
        "another time: frame 10",
        "another episode: 1",
        "the last observed frame again",
        "what plain_world predicts",
        "the true frame, had the action been",
    ):
        assert kind in text
    assert "world: the true frame’s energy is" in text
    assert "plain_world: the true frame’s distance from its prediction is" in text
    assert "plain_world: energy" not in text


def test_each_action_is_imagined_and_what_was_done_is_as_it_happened(opened, runs):
    explorer = opened("world").explorer
    request = dataclasses.replace(explorer.start(33), num_ahead=1, first=1, action="0.5 -1")
    values = explorer.answer(request)
    choices = values["actions"]["choices"]
    assert values["actions"]["columns"] == 3 and len(choices) == 9 + 2
    assert [choice["name"] for choice in choices[9:]] == ["what was done", "yours"]
    assert choices[10]["numbers"] == "0.5, −1"
    done = choices[9]["reel"]["shots"][1][0]
    assert done["image"] == values["future"]["reel"]["shots"][1][1]["image"]
    images = {choice["reel"]["shots"][1][0]["image"] for choice in choices[:9]}
    assert len(images) == 9
    corners = [tuple(float(n.replace("−", "-")) for n in c["numbers"].split(", ")) for c in choices]
    assert corners[0] == (-1, -1) and corners[8] == (1, 1)  # the least and the largest moves


def test_ids_are_offered_each(opened):
    values = opened("buttons").explorer.answer(opened("buttons").start)
    numbers = [choice["numbers"] for choice in values["actions"]["choices"]]
    assert numbers[:5] == ["0", "1", "2", "3", "4"] and len(numbers) == 6
    page = opened("buttons").page({"action": "3"})
    assert "yours: 3" in page


def test_actions_of_other_widths_are_offered_too(world):
    for width, count in ((1, 5), (3, 6), (9, 8)):
        mean, std = np.zeros(width, np.float32), np.ones(width, np.float32)
        condition = dataclasses.replace(world.spec.condition, width=width, mean=mean, std=std)
        spec = dataclasses.replace(
            world.spec,
            condition=condition,
            low=-torch.ones(width),
            high=torch.ones(width),
            observe=_Standard(width),
        )
        offered = action_options(spec, None, "").options
        assert len(offered) == count
        assert all(option.stored.shape == (width,) for option in offered)
        assert len({option.numbers for option in offered}) == count


class _Standard:
    """An observation whose actions have mean 0 and deviation 1."""

    device = torch.device("cpu")

    def __init__(self, width):
        self.width = width

    def statistics(self, name):
        return torch.zeros(self.width), torch.ones(self.width)


def test_a_plan_is_the_planners_and_stays_within_what_was_done(opened, runs):
    explorer = opened("world").explorer
    request = dataclasses.replace(
        explorer.start(33), first=1, num_context=2, horizon=2, budget=12, goal=6, seed=7
    )
    plan = explorer.answer(request)["plan"]
    model, config = runs["world"]
    planner = Planner(
        model,
        config,
        explorer.manifest,
        horizon=2,
        budget=12,
        seed=7,
        thinking=ThinkingConfig(seed=7),
    )
    planner.spec = explorer.spec
    window = window_of(explorer, first=1, num_frames=6)
    goal = explorer.source.window(0, 6, 1).frames[0]
    known = explorer.observe.restored(
        {name: values[: 2 - (name == "action")] for name, values in window.conditions.items()}
    )
    known = {name: values.numpy() for name, values in known.items()}
    expected = planner.plan(window.frames[:2], known, goal)
    rows = plan["actions"]["rows"]
    assert len(rows) == 2 and f"cost of the best is {show(expected.cost)}" in plan["sentence"]
    for row, action in zip(rows, expected.actions):
        planned = [float(number.replace("−", "-")) for number in row[1].split(", ")]
        assert planned == pytest.approx(action.tolist(), abs=6e-3)
        assert max(map(abs, planned)) <= 1
    assert len(plan["reel"]["shots"]) == 3 and plan["goal"] == 6
    again = explorer.answer(request)["plan"]
    assert again["sentence"] == plan["sentence"]  # whatever was planned before


def test_clips_without_actions_and_frames_have_a_page(opened):
    page = opened("video", "--against", "plain_video", "--episode", "2").page(None)
    text = texts_of(page)
    assert "clip 2 of 0 to 3" in text and "another clip" in text
    assert "Choose an action" not in text and "A plan to" not in text
    assert page.count('class="frame candidate"') > 4


def test_a_frame_behind_the_last_one_is_predicted_without_a_truth(opened):
    text = texts_of(opened("video", "--first", "1", "--context", "4").page(None))
    assert "there is no true next frame to compare with" in text
    assert "Imagined frames beside the truth" not in text and "after step 3, energy" in text


def test_an_encoder_without_a_way_back_leaves_the_numbers(opened, monkeypatch):
    pages = opened("world")
    monkeypatch.setattr(pages.explorer.observe.space.encoder, "decode", lambda embeddings: None)
    text = texts_of(pages.page(None))
    assert "the true next frame" in text and "energy" in text


@pytest.mark.parametrize(
    "given, said",
    [
        ({"number": "9"}, "episode is '9': give a whole number from 0 to"),
        ({"num_context": "0"}, "observed frames is '0'"),
        ({"first": "9", "num_context": "4"}, "has 11 frames: from frame 9 on it has no 4"),
        ({"first": "9", "num_context": "2"}, "no 2 to observe with one behind them"),
        ({"action": "1"}, "the action is '1': give 2 numbers"),
        ({"action": "1 nan"}, "the action is '1 nan'"),
        ({"action": "<script>"}, "the action is '<script>'"),
        ({"action": "1 " * 300}, "the action has"),
        ({"goal": "11"}, "goal, a frame's number is '11'"),
        ({"solver": "<b>"}, "solver is '<b>': give one of gradient"),
        ({"go": "5"}, "go is no direction"),
        ({"budget": "1e9"}, "plan: imagined futures is '1e9'"),
    ],
)
def test_what_cannot_be_shown_is_named_and_the_form_is_kept(opened, given, said):
    pages = opened("world")
    with pytest.raises(UserError) as caught:
        pages.page(given)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    page = pages.refusal(given, str(caught.value))
    assert 'role="alert"' in page and "<script>" not in page.replace("<script>\n", "", 1)
    assert 'name="budget"' in page


def test_starts_that_cannot_differ_are_said_to(opened, runs, video_manifest):
    runs["still"] = frame_model_of(video_manifest, initial="most_recent")
    said = "All starts begin at the same state"
    assert said in opened("still", "--num-starts", "2").page(None)
    noisy = opened("still", "--num-starts", "2", "--noise", "0.1").page(None)
    assert said not in noisy
    assert said not in opened("still").page(None)


def test_ids_are_read_as_ids():
    assert numbers_of("3", 1, 5) == [3]
    assert numbers_of("0.5, -2", 2, 0) == [0.5, -2]
    for text in ("5", "-1", "1.5", "1 2", ""):
        with pytest.raises(UserError, match="give 1 ids from 0 to 4"):
            numbers_of(text, 1, 5)


def test_buttons_go_to_the_next_and_stay_at_the_ends(opened):
    pages = opened("world")
    last = pages.explorer.fields.count - 1
    page = pages.page({"number": str(last), "go": "1"})
    assert f"episode {last} of 0 to {last}" in page and "Next episode" not in page
    assert "Previous episode" in page and "episode 0 of" in pages.page({"number": "1", "go": "-1"})


def test_the_command_refuses_what_does_not_fit(opened, runs, capsys):
    for words, said in [
        (["world", "--against", "text"], "--against text: a model of text; give one of video"),
        (["text", "--against", "world"], "--against world: a model of video; give one of text"),
        (["world", "--against", "video"], "--against: its "),
        (["world", "--episode", "x"], "episode is 'x'"),
        (["plain_world", "--num-steps", "2"], "a Transformer++ does not think"),
    ]:
        assert explore.main(words) == 2
        printed = capsys.readouterr().err
        assert said in printed and printed.count("\n") == 1


def test_pictures_are_exact_and_differences_rise_in_lightness():
    frame = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (8, 8, 3), np.uint8)
    assert picture(frame).startswith("data:image/png;base64,")
    assert picture(np.zeros((80, 80, 3), np.uint8)).startswith("data:image/jpeg;base64,")
    none = difference(frame, frame)
    assert (none == none[0, 0]).all()
    colours = [int(code[1:3], 16) + int(code[3:5], 16) for _, code in scale_of_differences()]
    assert colours == sorted(colours) and len(set(colours)) == 4


def test_stored_actions_are_those_of_the_episode(world):
    window = window_of(world, first=1, num_frames=5)
    episode = read_episode(world.manifest, find_episode(world.manifest, "0"))
    expected = episode.conditions["action"][1:5]
    np.testing.assert_allclose(
        stored_actions(world.observe, window.conditions), expected, atol=1e-6
    )
    assert np.array_equal(world.source.actions(0), episode.conditions["action"])
