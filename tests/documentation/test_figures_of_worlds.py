"""The figures of pages on worlds are those of their result files."""

import json

import world_tables
from quoted import (
    ROOT,
    signs,
)


def test_the_page_on_imagination_quotes_the_studies_of_worlds():
    text = (ROOT / "docs" / "imagination.md").read_text(encoding="utf-8")
    shown = world_tables.shown
    rows = world_tables.error_rows() + world_tables.judge_rows() + world_tables.step_rows()
    rows += world_tables.noise_rows()
    assert len(rows) > 10
    for row in rows:
        assert row in text, row
    study = world_tables.read("two-rooms.json")
    assert f"{study['num_windows']} windows of {study['num_episodes']} held-out episodes" in text
    for name, words in (("minigrid", "{} of {} in MiniGrid"), ("breakout", "{} of {} in Breakout")):
        other = world_tables.read(f"{name}.json")
        assert words.format(other["num_windows"], other["num_episodes"]) in text
        for place in (0, -1):
            gain = other["recipes"]["energy"]["errors"][place]["gain_over_persistence"]
            assert shown(gain) in text, (name, place)
    for row in study["against"]["energy"]["transformer++"][1:]:
        assert shown(row["gain"]) in text
    for name in ("two-rooms", "minigrid", "breakout"):
        recipes = world_tables.read(f"{name}.json")["recipes"]
        assert shown(recipes["energy"]["errors"][0]["gain_over_shuffled_actions"]) in text
        times = [min(recipes[recipe]["step_time_s"]) for recipe in ("energy", "transformer++")]
        assert 4 < times[0] / times[1] < 8, name  # "about six times"
    for recipe in ("energy", *world_tables.BASELINES):
        assert f"{study['recipes'][recipe]['parameters']:,}" in text
    energy = study["recipes"]["energy"]
    for place in (0, -1):
        assert shown(energy["errors"][place]["gain_over_persistence"]) in text
    assert len(energy["seeds"]) == 3
    for judge in ("energy", "energy_above_prediction"):
        gained = study["judge_against"]["energy"]["transformer++"][judge]["another_action"]
        assert f"differs by {shown(gained['auroc'], 2)}" in text
    other = world_tables.read("minigrid.json")["judge_against"]["energy"]["transformer++"]
    for told in other["energy"].values():
        assert shown(told["auroc"], 2) in text


def test_the_page_on_imagination_says_only_what_the_studies_intervals_say():
    """Each sentence that is no figure, against the figures that it is about."""
    for name, two_layers, four_layers, judges, further_steps in (
        ("two-rooms", "0+++", "-000", "-00 000 +00", "+--"),
        ("minigrid", "0000", "0000", "--- --- 000", "+-0"),
        ("breakout", "0000", "0000", "000 000 000", "+-0"),
    ):
        study = world_tables.read(f"{name}.json")
        energy, against = study["recipes"]["energy"], study["against"]["energy"]
        assert len(energy["seeds"]) == 3
        assert signs(row["gain_over_persistence"] for row in energy["errors"]) == "++++"
        assert signs(row["gain_over_shuffled_actions"] for row in energy["errors"]) == "++++"
        assert signs(row["gain"] for row in against["transformer++"]) == two_layers
        assert signs(row["gain"] for row in against["transformer++-4"]) == four_layers
        gained = study["judge_against"]["energy"]["transformer++"]
        found = [
            signs(gained[judge][kind]["auroc"] for kind in world_tables.WRONG)
            for judge in ("energy", "energy_above_prediction", "prediction_error")
        ]
        assert " ".join(found) == judges, name
        steps = [step["gain_over_previous"] for step in energy["steps"][1:]]
        assert signs(steps) == further_steps, name


def test_the_page_on_imagination_quotes_the_study_of_the_first_form():
    text = (ROOT / "docs" / "imagination.md").read_text(encoding="utf-8")
    study = json.loads((ROOT / "results" / "world_rooms.json").read_text())
    energy = study["recipes"]["energy"]
    for row in study["against"]["energy"]["transformer++"]:
        if row["horizon"] in (1, 4, 8):
            assert world_tables.shown(row["gain"]) in text
    for step in energy["steps"][1:]:
        assert world_tables.shown(step["gain_over_previous"]) in text
    for judge in ("energy", "prediction_error"):
        for kind in ("another_action", "another_time"):
            of_seeds = [each[judge][kind]["auroc"]["mean"] for each in energy["judge"]]
            assert ", ".join(f"{value:.2f}" for value in of_seeds) in text


def test_the_readme_quotes_the_studies_of_worlds():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    recipes = world_tables.read("two-rooms.json")["recipes"]
    seeds = {
        name: ", ".join(f"{value:.3f}" for value in recipe["errors"][-1]["model"]["seeds"])
        for name, recipe in recipes.items()
    }
    for other in world_tables.BASELINES:
        assert f"| {seeds[other]} | {seeds['energy']} | `results/worlds/two-rooms.json` |" in text
    actors = world_tables.read("plan-minigrid.json")["actors"]
    reached = [
        ", ".join(f"{value:.2f}" for value in actors[actor]["success"]["seeds"])
        for actor in ("transformer++, cem", "energy, cem")
    ]
    assert f"(random actions: {actors['random']['success']['mean']:.2f}) | " in text
    assert f"| {reached[0]} | {reached[1]} | `results/worlds/plan-minigrid.json` |" in text
    for name in world_tables.WORLDS:
        recipes = world_tables.read(f"{name}.json")["recipes"]
        assert recipes["energy"]["steps"][1]["gain_over_previous"]["low"] > 0, name  # a step pays


def test_the_page_on_planning_actions_quotes_its_studies():
    text = (ROOT / "docs" / "planning-actions.md").read_text(encoding="utf-8")
    rows = world_tables.plan_rows()
    assert len(rows) >= 6
    for row in rows:
        assert row in text, row
    ours, others = "energy, cem", ("transformer++, cem", "transformer++-4, cem")
    studies = [world_tables.read(f"plan-{name}.json") for name in ("two-rooms", "minigrid")]
    for study, compared in zip(studies, ("00", "+0"), strict=True):
        gains = study["gains"][ours]
        for other in ("random", "persistence"):  # better than chance
            for measure in ("success", "nearest_distance"):
                assert gains[other][measure]["low"] > 0
                assert world_tables.shown(gains[other][measure], 2) in text, (other, measure)
        assert signs(gains[other]["success"] for other in others) == compared
        for other in (*others, "energy, gradient"):
            assert world_tables.shown(gains[other]["success"], 2) in text, other
        assert signs(gains["energy, gradient"].values()) == "++"
        chance = study["gains"]["energy, gradient"]["random"]["success"]
        assert signs([chance]) == "0" and world_tables.shown(chance, 2) in text
        seconds = {name: actor["cpu_seconds_per_plan"] for name, actor in study["actors"].items()}
        assert 0.8 < seconds["energy, gradient"] / seconds[ours] < 1.2  # equal times
        for other in others:
            assert f"{seconds[ours] / seconds[other]:.1f}" in text
    far = json.loads((ROOT / "results" / "world_plan_far.json").read_text())["actors"]
    assert f"{far['against']['success']['mean']:.2f} of {len(far['model']['episodes'])}" in text
    assert f"the energy model {far['model']['success']['mean']:.2f}" in text
