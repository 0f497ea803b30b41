"""The page of a world: what it says, what it shows moving; and a study of several runs."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from imagined_worlds import SETTINGS, model_of, opened

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))

import study_world

from ebwm_scale.core.errors import DataError
from ebwm_scale.data.format.episodes import find_episode, read_episode
from ebwm_scale.evaluation import imagination
from ebwm_scale.evaluation.shown_futures import shown_futures
from ebwm_scale.inference.imagination import Imagined
from ebwm_scale.reporting.imagination_page import films_of, render, write_imagination
from ebwm_scale.reporting.world_verdict import judge_world

pytestmark = pytest.mark.multiprocess  # episodes are read in processes of their own


def test_the_page_shows_every_measure(world, tmp_path):
    split, _ = opened(world)
    result = imagination.evaluate_imagination(
        model_of(world), split, against=model_of(world, kind="baseline"), **SETTINGS
    )
    page = write_imagination(tmp_path, {"checkpoint": "runs/<one>", "against": "two", **result})
    text = page.read_text()
    for said in ("runs/&lt;one&gt;", "under other actions", "another action", "straight line"):
        assert said in text
    assert "No held-out episode is long enough for 16 steps" in text
    assert "Does it imagine its world?" in text and "data:image" not in text
    with pytest.raises(DataError, match="not a result of ebwm evaluate on a world"):
        render({"errors": []})


def test_futures_begin_with_what_was_seen_and_go_on_as_the_model_says(world, monkeypatch, tmp_path):
    split, observe = opened(world)
    models = {"model": model_of(world), "against": model_of(world, kind="baseline")}
    asked = {"count": 2, "num_steps": 3, "seed": 0}
    futures = shown_futures(models, split, **asked)
    assert len(futures) == 2 and futures[0].episode != futures[1].episode
    for future in futures:
        c = future.num_context
        episode = read_episode(split.manifest, find_episode(split.manifest, future.episode))
        seen = episode.frames[future.start : future.start + c + 3]
        assert np.array_equal(future.truth, seen)
        for frames in future.imagined.values():
            assert np.array_equal(frames[:c], seen[:c]) and len(frames) == c + 3
            assert (frames[c:] != seen[c:]).any()  # neither model is trained

    def know(model, windows, *, num_context, num_steps, **_):
        ahead = [w.states[num_context : num_context + num_steps] for w in windows]
        return Imagined(torch.stack(ahead), None)

    monkeypatch.setattr("ebwm_scale.evaluation.shown_futures.imagine", know)
    for future in shown_futures(models, split, **asked):
        assert np.array_equal(future.imagined["model"], future.truth)
    assert shown_futures(models, split, count=0, num_steps=3, seed=0) == []
    pages = films_of(futures)
    assert all(each["image"].startswith("data:image/png;base64,") for each in pages)
    assert "from frame 3 on by: this model, the other model" in pages[0]["caption"]


def test_the_page_shows_planning_of_the_same_checkpoint_and_of_no_other(world, tmp_path):
    split, _ = opened(world)
    result = imagination.evaluate_imagination(model_of(world), split, **SETTINGS)
    result = {"checkpoint": "runs/one", **result}
    row = {"success": None, "return": interval(-3, -4, -2), "seconds_per_plan": 0.5}
    planning = {
        "checkpoint": "runs/one",
        "env": "Valley-v0",
        "goal": "reward",
        "solver": "cem",
        "num_episodes": 3,
        "actors": {"model": row, "random": {**row, "return": interval(-9, -10, -8)}},
        "gains": {"random": {"return": interval(6, 5, 7)}},
    }
    beside = tmp_path / "plan_actions.json"
    beside.write_text(json.dumps(planning))
    text = write_imagination(tmp_path, result).read_text()
    assert "Valley-v0" in text and "does better than random actions" in text
    beside.write_text(json.dumps({**planning, "checkpoint": "runs/two"}))
    assert "Valley-v0" not in write_imagination(tmp_path, result).read_text()
    beside.write_text("{")
    with pytest.raises(DataError, match="plan_actions.json: cannot be read: .* plan again"):
        write_imagination(tmp_path, result)


def interval(mean, low, high):
    return {"mean": mean, "low": low, "high": high}


def judged_world(persistence, shuffled, steps=(1, 1, 1)):
    """What is said where the gains have these intervals."""
    errors = []
    for horizon in (1, 8):
        row = {"horizon": horizon, "model": interval(1, 1, 1), "persistence": interval(2, 2, 2)}
        row |= {"shuffled_actions": interval(4, 4, 4)}
        row |= {"gain_over_persistence": interval(*persistence)}
        row |= {"gain_over_shuffled_actions": interval(*shuffled)}
        errors.append(row)
    told = {"another_action": {"auroc": interval(0.7, 0.6, 0.8)}}
    after = [{"num_steps": 1}, {"num_steps": 2, "gain_over_previous": interval(*steps)}]
    after.append({"num_steps": 3, "gain_over_previous": interval(-1, -1, -1)})  # not trained
    judge = {"energy": told, "prediction_error": told}
    return judge_world({"errors": errors, "judge": judge, "trained_steps": 2, "steps": after})


@pytest.mark.parametrize(
    ("persistence", "shuffled", "answer"),
    [
        ((1, 0.5, 1.5), (2, 1, 3), "Yes"),
        ((1, -0.5, 1.5), (2, 1, 3), "Not shown"),
        ((1, 0.5, 1.5), (2, -1, 3), "Not shown"),
        ((-1, -2, -0.5), (2, 1, 3), "No"),
        ((1, 0.5, 1.5), (-2, -3, -1), "No"),
    ],
)
def test_a_world_is_imagined_where_both_intervals_say_so(persistence, shuffled, answer):
    found, sentence, checks = judged_world(persistence, shuffled)
    assert found == answer
    assert "After 8 imagined steps a frame's error is 50% below" in sentence
    assert [check.mark for check in checks][-2:] == ["yes", "yes"]  # judging; the trained steps
    assert judged_world(persistence, shuffled, (-1, -2, -1))[2][-1].mark == "no"


def test_a_study_compares_recipes_over_seeds_on_the_same_windows(world, monkeypatch, tmp_path):
    torch.manual_seed(0)
    models = {f"energy-{seed}": model_of(world) for seed in "ab"}
    models |= {f"base-{seed}": model_of(world, kind="baseline", predicts="change") for seed in "ab"}
    for model in models.values():  # a sweep's runs are of their dataset
        object.__setattr__(model.config.data, "manifest", str(world))
    known = {"all_parameters": 5, "step_time_s": 0.1}
    monkeypatch.setattr(
        study_world, "load_checkpoint", lambda run: (models[run.name], models[run.name].config)
    )
    monkeypatch.setattr(study_world, "read_run", lambda run: None if run.name == "late" else known)
    runs = [*models, "late"]
    labels = [dict(zip(("recipe", "seed"), name.split("-"))) for name in models]
    labels.append({"recipe": "energy", "seed": "c"})
    sweep = {"sweep": [], "file": "world.yaml", "runs": runs, "labels": labels}
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    output = tmp_path / "out.json"
    asked = ["--horizons", "1", "3", "--max-windows", "6", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["study_world.py", str(tmp_path), *asked])
    assert study_world.main() == 0
    found = json.loads(output.read_text())
    assert found["missing"] == ["late"] and found["horizons"] == [1, 3]
    energy, base = found["recipes"]["energy"], found["recipes"]["base"]
    assert energy["seeds"] == ["a", "b"] and base["steps"] == []
    assert set(energy["judge"]) - set(base["judge"]) == {"energy", "energy_above_prediction"}
    for judge, kinds in energy["judge"].items():
        for kind, told in kinds.items():
            gained = found["judge_against"]["energy"]["base"][judge][kind]
            for measure in ("auroc", "within_a_context"):
                value, gain = told[measure], gained[measure]
                assert len(value["seeds"]) == 2 and value["low"] <= value["mean"] <= value["high"]
                theirs = base["judge"]["prediction_error"][kind][measure]["mean"]
                assert gain["mean"] == pytest.approx(value["mean"] - theirs, abs=1e-6)
    for number, row in enumerate(base["errors"]):  # fresh, it copies the last frame
        assert row["model"]["mean"] == pytest.approx(row["persistence"]["mean"], rel=1e-5)
        ours = energy["errors"][number]["model"]["mean"]
        gain = found["against"]["energy"]["base"][number]["gain"]
        assert gain["mean"] == pytest.approx(row["model"]["mean"] - ours, abs=1e-6)
        assert gain["low"] <= gain["mean"] <= gain["high"] and len(gain["seeds"]) == 2
    assert [row["num_steps"] for row in energy["steps"]] == list(range(1, len(energy["steps"]) + 1))


def test_an_interval_of_a_study_draws_seeds_and_whole_episodes():
    episodes = ["a", "a", "a", "b"]
    values = torch.tensor([1.0, 1, 1, 5])
    alone = study_world.interval([values], episodes)
    assert alone["mean"] == 2 and (alone["low"], alone["high"]) == (1, 5)  # all of one episode
    both = study_world.interval([values, values + 10], episodes)
    assert both["seeds"] == [2, 12] and both["low"] == 1 and both["high"] == 15
