"""tools/study_planning.py: everybody plays the same episodes, seeds are pooled, times are equal."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from control_worlds import Walk, frame_at, model_of, world

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))
import study_planning
from study_planning import equal_budget, pooled, summary

SEEDS = ("one", "two")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "world"
    return world(folder, num_clips=24, context_length=6, proprio=False)


@pytest.fixture
def study(manifest, monkeypatch, tmp_path):
    """study(*words) -> exit code, over a sweep of two recipes and two seeds."""
    recipes = {"energy": {}, "plain": {"model": {"kind": "baseline"}}}
    models = {name: model_of(manifest, **changes) for name, changes in recipes.items()}
    labels = [{"recipe": recipe, "seed": seed} for seed in SEEDS for recipe in recipes]
    runs = [f"{each['recipe']}-{each['seed']}" for each in labels]
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": runs, "labels": labels}))
    monkeypatch.setattr(
        study_planning, "load_checkpoint", lambda run: models[run.name.partition("-")[0]]
    )
    monkeypatch.setattr(study_planning, "read_run", lambda run: {})
    monkeypatch.setattr(
        study_planning, "make_environment", lambda name, options: Walk(target=(4, 6), start=(6, 6))
    )
    np.save(tmp_path / "goal.npy", frame_at((4, 6)))

    def run(*words):
        given = ["--env", "Walk-v0", "--goal", str(tmp_path / "goal.npy"), "--horizon", "2"]
        given += ["--budget", "4", "--episodes", "2", "--max-steps", "1"]
        given += ["--output", str(tmp_path / "plan.json")]
        monkeypatch.setattr(sys, "argv", ["study_planning.py", str(tmp_path), *given, *words])
        return study_planning.main()

    return run


def test_everybody_plays_each_seeds_own_episodes_and_a_killed_study_goes_on(study, tmp_path):
    assert study("--seed", "7") == 0
    found = json.loads((tmp_path / "plan.json").read_text())
    assert set(found["actors"]) == {"energy, cem", "plain, cem", "persistence", "random"}
    for actor in found["actors"].values():
        assert actor["num_episodes"] == 4 and len(actor["success"]["seeds"]) == 2
    played = {(row["actor"], row["model_seed"], row["seed"]) for row in found["rows"]}
    assert len(played) == len(found["rows"]) == 16
    assert {(seed, number) for _, seed, number in played} == {
        ("one", 7), ("one", 8), ("two", 9), ("two", 10)
    }  # fmt: skip
    gain = found["gains"]["energy, cem"]["random"]["nearest_distance"]["mean"]
    nearest = {name: actor["nearest_distance"]["mean"] for name, actor in found["actors"].items()}
    assert gain == pytest.approx(nearest["random"] - nearest["energy, cem"])

    rows = tmp_path / "planning-plan.jsonl"
    lines = rows.read_text().splitlines()
    kept = "\n".join(lines[:-5]) + "\n"
    rows.write_text(kept + lines[-5][:20])  # killed while it wrote a line
    assert study("--seed", "7") == 0
    assert rows.read_text().startswith(kept) and len(rows.read_text().splitlines()) == len(lines)
    again = json.loads((tmp_path / "plan.json").read_text())
    for name, actor in found["actors"].items():
        assert again["actors"][name]["nearest_distance"] == actor["nearest_distance"]


def test_episodes_of_other_settings_and_unknown_recipes_are_one_line(study, capsys, tmp_path):
    words = ["--recipes", "plain", "--seeds", "two", "--episodes", "1"]
    assert study(*words) == 0
    found = json.loads((tmp_path / "plan.json").read_text())
    assert {(row["model_seed"], row["actor"]) for row in found["rows"]} == {
        ("two", "plain, cem"), ("two", "persistence"), ("two", "random")
    }  # fmt: skip
    assert study(*words, "--seed", "3") == 2
    assert "holds episodes of other settings: remove it" in capsys.readouterr().err
    assert study("--seeds", "three") == 2
    assert "--seeds three: this sweep has one, two" in capsys.readouterr().err
    assert study("--recipes", "other") == 2
    assert "--recipes other: this sweep has energy, plain" in capsys.readouterr().err


def test_another_solver_gets_the_budget_that_takes_as_long(study, monkeypatch, tmp_path):
    def plan_seconds(planners, play):
        """A future of the gradient takes twice as long as one of CEM."""
        return [each.budget * (2 if each.solver_name == "gradient" else 1) for each in planners]

    monkeypatch.setattr(study_planning, "plan_seconds", plan_seconds)
    words = ["--solvers", "cem", "gradient", "--equal-time", "--budget", "16"]
    assert study(*words, "--recipes", "plain", "--episodes", "1") == 0
    budgets = json.loads((tmp_path / "plan.json").read_text())["budgets"]
    assert budgets == {"plain": {"cem": 16, "gradient": 7}}  # the last one that takes no longer


def test_equal_budgets_are_found_to_a_tenth_and_never_below_the_least():
    assert equal_budget(lambda budget: budget / 100, 3, 6400) in range(90, 101)
    assert equal_budget(lambda budget: 5.0, 3, 6400) == 3


def test_plans_are_timed_in_turns_in_episodes_of_their_own(manifest):
    played = []

    def play(timed, episode, max_steps):
        played.append((timed.actor, episode))
        timed.seconds = {"a": 6.0, "b": 2.0}[timed.actor]
        return type("Outcome", (), {"costs": [0.0, 0.0]})

    assert study_planning.plan_seconds(["a", "b"], play) == [3.0, 1.0]
    assert [actor for actor, _ in played] == ["a", "b"] * (len(played) // 2)
    assert min(episode for _, episode in played) > 10_000  # none that is measured


def test_pooled_means_count_seeds_and_episodes_and_gains_are_paired():
    def row(actor, seed, episode, success, nearest):
        return {
            "actor": actor, "model_seed": seed, "seed": episode, "success": success,
            "nearest_distance": nearest, "return": 0.0, "steps": 3, "plans": 3,
            "evaluations": 6, "seconds": 3.0, "cpu_seconds": 1.5,
        }  # fmt: skip

    rows = []
    for seed in "ab":
        for episode in range(20):
            luck = episode / 10
            rows.append(row("good", seed, episode, None if episode % 2 else True, luck))
            rows.append(row("bad", seed, episode, None, luck + 1))
    found = summary(rows)
    good = found["actors"]["good"]
    assert good["success"]["mean"] == 0.5 and good["success"]["seeds"] == [0.5, 0.5]
    assert good["success"]["low"] < 0.5 < good["success"]["high"]
    assert good["cpu_seconds_per_plan"] == 0.5 and good["evaluations_per_plan"] == 2
    nearer = found["gains"]["good"]["bad"]["nearest_distance"]
    assert [nearer[key] for key in ("mean", "low", "high")] == pytest.approx([1, 1, 1])
    assert found["gains"]["bad"]["good"]["success"]["mean"] == -0.5
    spread = pooled([np.zeros(10), np.ones(10)])  # seeds that differ are two, not twenty
    assert spread["low"] == 0 and spread["high"] == 1
