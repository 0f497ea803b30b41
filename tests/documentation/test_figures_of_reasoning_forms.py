"""The figures of the page on earlier forms of reasoning are those of its result files."""

import json

import pytest
from quoted import (
    ROOT,
    after_its_trained_steps,
    rows_of,
    signs,
    with_its_interval,
)

REASONING = ("reachability", "sudoku", "shortest_path")


MUON = ("muon_sudoku", "muon_reachability", "muon_shortest_path")


@pytest.mark.parametrize("family", [*REASONING, *MUON])
def test_the_page_on_reasoning_quotes_its_studies(family):
    text = (ROOT / "docs" / "reasoning-forms.md").read_text(encoding="utf-8")
    study = json.loads((ROOT / "results" / f"reasoning_{family}.json").read_text())
    unit = study["recipes"]["transformer++-4"]["training_flops"]
    for recipe in study["recipes"].values():
        trained = after_its_trained_steps(recipe)
        row = (
            f"| {len(recipe['seeds'])} | {recipe['parameters']:,} "
            f"| {recipe['training_flops'] / unit:.1f} | {with_its_interval(trained['loss'], 3)} "
            f"| {with_its_interval(trained['solved'], 2)} |"
        )
        assert row in text, row
    energy = study["recipes"]["energy"]
    for point in energy["steps"]:
        row = (
            f"| {point['num_steps']} | {with_its_interval(point['loss'], 3)} "
            f"| {with_its_interval(point['solved'], 2)} |"
        )
        if "gain_over_previous" in point:
            row += f" {with_its_interval(point['gain_over_previous']['fall_of_loss'], 3)} |"
        assert row in text, row
    for other in study["against"]["energy"].values():
        assert with_its_interval(other["rise_of_solved"], 2) in text
        assert with_its_interval(other["fall_of_loss"], 3) in text


@pytest.mark.parametrize("family", ["sudoku", "shortest_path"])
def test_the_page_on_reasoning_quotes_the_looped_runs(family):
    """One run each, beside the same layers passed once, on the same instances."""
    text = (ROOT / "docs" / "reasoning-forms.md").read_text(encoding="utf-8")
    name = f"results/reasoning_looped_{family}.json"
    recipes = json.loads((ROOT / name).read_text())["recipes"]
    (line,) = [line for line in text.splitlines() if f"`{name}`" in line]
    looped = {step["num_steps"]: step["solved"]["mean"] for step in recipes["looped-4x4"]["steps"]}
    (once,) = (step["solved"]["mean"] for step in recipes["transformer++-4"]["steps"])
    assert f"{looped[4]:.2f} in one run" in line and f"{once:.2f}" in line
    if family == "sudoku":
        assert f"{looped[6]:.2f} when passed six times" in line
    assert all(recipe["seeds"] == ["seed-33"] for recipe in recipes.values())


def test_the_page_on_reasoning_quotes_the_studies_of_one_layer():
    text = (ROOT / "docs" / "reasoning-forms.md").read_text(encoding="utf-8")
    for family in ("reachability", "sudoku"):
        study = json.loads((ROOT / "results" / f"reasoning_one_layer_{family}.json").read_text())
        for name in ("energy", "transformer++"):
            trained = after_its_trained_steps(study["recipes"][name])
            assert with_its_interval(trained["solved"], 2) in text, (family, name)
    tries = json.loads((ROOT / "results" / "reasoning_tries.json").read_text())
    for row in tries["rows"]:
        if row["answered"].startswith(("mazes of 6", "Sudokus")):
            shown = ", ".join(
                f"{point['loss']:.3f} ({point['solved']:.2f})"
                for point in row["after"]
                if point["num_steps"] in (1, 2, 4, 8, 16, 32)
            )
            assert shown in text, shown


def test_the_page_on_reasoning_says_only_what_the_study_with_muon_says():
    text = (ROOT / "docs" / "reasoning-forms.md").read_text(encoding="utf-8")
    study = json.loads((ROOT / "results" / "reasoning_muon_sudoku.json").read_text())
    energy, against = study["recipes"]["energy"], study["against"]["energy"]
    assert all(len(recipe["seeds"]) == 3 for recipe in study["recipes"].values())
    for other, signs_of_both in (("transformer++-4", "++"), ("looped-4x4", "00")):
        gained = against[other]
        assert signs([gained["fall_of_loss"], gained["rise_of_solved"]]) == signs_of_both
    assert signs([against["transformer++-16"]["fall_of_loss"]]) == "0"
    assert against["transformer++-16"]["rise_of_solved"]["low"] >= 0
    steps = [point["gain_over_previous"]["fall_of_loss"] for point in energy["steps"][1:4]]
    assert signs(steps) == "++0"
    beyond = energy["beyond_trained"]["16"]
    rise = {key: -beyond["fall_of_loss"][key] for key in ("mean", "low", "high")}
    assert f"loss is {rise['mean']:.3f} [{rise['high']:.3f}, {rise['low']:.3f}] higher" in text
    assert with_its_interval(beyond["rise_of_solved"], 3) in text
    assert signs([beyond["rise_of_solved"]]) == "0"
    stopped = energy["settling"]
    taken = ", ".join(f"{seed['mean_steps']['mean']:.1f}" for seed in stopped)
    ranks = [seed["rank_correlation_of_steps_with_difficulty"]["mean"] for seed in stopped]
    assert f"takes {taken} steps" in text
    assert f"rank correlations {', '.join(f'{rank:.2f}' for rank in ranks)}" in text


def solved(recipe: dict, num_steps: int) -> dict:
    (point,) = [point for point in recipe["steps"] if point["num_steps"] == num_steps]
    return point["solved"]


def stopping_in_words(energy: dict) -> tuple[str, str]:
    """(Steps, rank correlations with the difficulty) of thinking that stops, seed by seed."""
    stopped = energy["settling"]
    taken = ", ".join(f"{seed['mean_steps']['mean']:.1f}" for seed in stopped)
    ranks = [seed["rank_correlation_of_steps_with_difficulty"]["mean"] for seed in stopped]
    return taken, ", ".join(f"{rank:.2f}" for rank in ranks)


def test_the_page_on_reasoning_says_only_what_mazes_with_muon_say():
    text = (ROOT / "docs" / "reasoning-forms.md").read_text(encoding="utf-8")
    study = json.loads((ROOT / "results" / "reasoning_muon_reachability.json").read_text())
    recipes = study["recipes"]
    against = [study["against"]["energy"][name] for name in list(recipes)[1:]]
    assert list(recipes) == ["energy", "transformer++-4", "looped-4x4", "transformer++-16"]
    assert [len(recipe["seeds"]) for recipe in recipes.values()] == [3, 3, 3, 1]
    for gained in ("fall_of_loss", "rise_of_solved"):
        assert signs([other[gained] for other in against]) == "+00"
    taken, ranks = stopping_in_words(recipes["energy"])
    assert f"takes {taken} steps" in text and f"{ranks}." in text
    of_larger = {}
    for name in ("energy", "looped-4x4"):
        (of_larger[name],) = recipes[name]["larger"].values()
    four, sixteen = (with_its_interval(solved(of_larger["energy"], n), 3) for n in (4, 16))
    assert f"it solves {four} after four steps and {sixteen} after sixteen" in text


def test_the_page_on_reasoning_says_which_steps_pay_on_shortest_paths():
    text = (ROOT / "docs" / "reasoning-forms.md").read_text(encoding="utf-8")
    study = json.loads((ROOT / "results" / "reasoning_muon_shortest_path.json").read_text())
    recipes, against = study["recipes"], study["against"]["energy"]
    energy, looped = recipes["energy"], recipes["looped-4x4"]
    assert all(len(recipe["seeds"]) == 3 for recipe in recipes.values())
    gains = [point["gain_over_previous"] for point in energy["steps"][1:4]]
    for kind in ("fall_of_loss", "rise_of_solved"):
        assert signs([gain[kind] for gain in gains]) == "++0"
        assert all(of_seed > 0 for gain in gains[:2] for of_seed in gain[kind]["seeds"])
        assert signs([against["transformer++-4"][kind], against["looped-4x4"][kind]]) == "+0"
    second, third = (with_its_interval(gain["rise_of_solved"], 2) for gain in gains[:2])
    assert f"the second solves {second} more, the third {third}." in text
    assert f"after twelve it solves {solved(energy, 12)['mean']:.2f}." in text
    four, many = (solved(looped, n)["mean"] for n in (4, 16))
    assert f"{many:.2f} solved after sixteen in place of {four:.2f}" in text
    lost = [seed["gain_over_trained"]["fall_of_loss"] for seed in energy["settling"]]
    assert sorted(signs(lost)) == ["-", "-", "0"]
    (larger,), (of_looped,) = energy["larger"].values(), looped["larger"].values()
    three, twelve = (with_its_interval(solved(larger, n), 3) for n in (3, 12))
    assert f"it solves {three} after three steps and {twelve} after twelve" in text
    assert f"passed four times {with_its_interval(solved(of_looped, 4), 3)}" in text
    more = energy["parameters"] / looped["parameters"] - 1
    assert f"It has {100 * more:.0f} % more parameters" in text


def test_the_page_on_reasoning_says_what_weights_that_rise_do_on_shortest_paths():
    text = (ROOT / "docs" / "reasoning-forms.md").read_text(encoding="utf-8")
    study = json.loads((ROOT / "results" / "reasoning_muon_shortest_path.json").read_text())
    rising = study["recipes"]["energy-rising"]
    ends = ", ".join(f"{loss:.3f}" for loss in rising["steps"][3]["loss"]["seeds"])
    assert f"end at {ends} with the three seeds" in text
    assert signs([rising["steps"][2]["gain_over_previous"]["fall_of_loss"]]) == "+"
    taken, ranks = stopping_in_words(rising)
    assert f"takes {taken} steps, with rank correlations of {ranks}" in text
    for seed in rising["settling"]:
        assert signs([seed["gain_over_trained"]["fall_of_loss"]]) == "0"


def test_the_page_on_reasoning_says_what_is_solved_of_larger_mazes_that_are_read():
    text = (ROOT / "docs" / "reasoning-forms.md").read_text(encoding="utf-8")
    study = json.loads((ROOT / "results" / "reasoning_muon_inside.json").read_text())
    few, many = study["recipes"].values()
    (a, b, c), (d, e, f) = shares_of_larger(few, (1, 4, 16))
    shown = f"it solves {a} after one step, {b} after four and {c} after sixteen;"
    assert f"{shown} of 8 by 8 {d}, {e} and {f}." in text
    (a, b, c), (d, e, f) = shares_of_larger(many, (1, 10, 15))
    shown = f"of 7 by 7 {a} after one, {b} after ten and {c} after fifteen;"
    assert f"{shown} of 8 by 8 {d}, {e} and {f}." in text
    for recipe, more in ((few, "16"), (many, "15")):  # what more than the trained steps adds
        for name in INSIDE:
            beyond = recipe["larger"][name]["beyond_trained"][more]["rise_of_solved"]
            assert beyond["low"] <= 0


INSIDE = ("inside-larger-7", "inside-larger-8")


def shares_of_larger(recipe: dict, numbers: tuple[int, ...]) -> list[list[str]]:
    """What is solved of each larger size after these numbers of steps."""
    return [
        [f"{solved(recipe['larger'][name], number)['mean']:.2f}" for number in numbers]
        for name in INSIDE
    ]


def test_the_page_on_reasoning_quotes_the_runs_beside_the_study_of_shortest_paths():
    text = (ROOT / "docs" / "reasoning-forms.md").read_text(encoding="utf-8")
    names = {"reachability": "mazes", "sudoku": "Sudokus", "shortest-path": "shortest paths"}
    names["hops"] = "look-ups of one to six hops"
    names["shortest-path-inside"] = "shortest paths in a common square"
    rows = rows_of("reasoning_muon_tries_steps.jsonl")[1:]
    assert len(rows) == 13
    for row in rows:
        start = f"* {names[row['family']]}, {row['tried']}, seed {row['seed']}"
        assert f"{start}: {row['losses'][-1]:.4f}" in text, row


def test_damped_steps_on_shortest_paths_were_stable_and_did_little():
    text = (ROOT / "docs" / "reasoning-forms.md").read_text(encoding="utf-8")
    study = json.loads((ROOT / "results" / "reasoning_muon_shortest_path_damped.json").read_text())
    energy, deep = study["recipes"]["energy"], study["recipes"]["transformer++-16"]
    four, of_deep = solved(energy, 4), solved(deep, 1)
    assert f"It solved {four['mean']:.2f}, and sixteen layers {of_deep['mean']:.2f} in" in text
    assert -energy["beyond_trained"]["16"]["fall_of_loss"]["mean"] < 0.002
    for recipe in (study["against"]["energy"][name] for name in ("looped-4x4", "transformer++-16")):
        assert signs([recipe["fall_of_loss"]]) == "-"  # both others are ahead
    assert idle_seeds(energy) == 1


def test_the_page_on_mazes_says_that_one_seed_s_later_steps_do_nothing():
    study = json.loads((ROOT / "results" / "reasoning_muon_reachability.json").read_text())
    assert idle_seeds(study["recipes"]["energy"]) == 1


def idle_seeds(energy: dict) -> int:
    """With how many seeds the second step solves next to nothing more."""
    gains = energy["steps"][1]["gain_over_previous"]["rise_of_solved"]["seeds"]
    return sum(abs(gain) < 0.01 for gain in gains)


def test_the_page_on_reasoning_quotes_the_mazes_that_were_too_many_steps_or_too_large():
    text = (ROOT / "docs" / "reasoning-forms.md").read_text(encoding="utf-8")
    study = json.loads((ROOT / "results" / "reasoning_muon_reachability.json").read_text())
    energy, looped = study["recipes"]["energy"], study["recipes"]["looped-4x4"]
    beyond = energy["beyond_trained"]["16"]["fall_of_loss"]
    rise = f"{-beyond['mean']:.3f} [{-beyond['high']:.3f}, {-beyond['low']:.3f}]"
    assert f"the loss is {rise} higher" in text
    four, many = (solved(looped, n)["mean"] for n in (4, 16))
    assert f"they solve {many:.2f} in place of {four:.2f}" in text
    (of_larger,) = looped["larger"].values()
    four, eight = (with_its_interval(solved(of_larger, n), 3) for n in (4, 8))
    assert f"passed four times {four}, passed eight times {eight}" in text
    one = solved(energy, 1)["seeds"][1]
    assert f"{one:.2f} are solved after one step and after four" in text
    assert f"{solved(energy, 4)['seeds'][1]:.2f}" == f"{one:.2f}"


def test_the_page_on_reasoning_quotes_the_runs_beside_the_studies_of_mazes():
    text = (ROOT / "docs" / "reasoning-forms.md").read_text(encoding="utf-8")
    for row in rows_of("reasoning_muon_tries_mazes.jsonl")[1:]:
        family = {"reachability": "mazes", "shortest-path": "shortest paths"}[row["family"]]
        rate = row["settings"][0].split("=")[1]
        line = f"* {family}, {row['tried']}, rate {rate}: {row['losses'][-1]:.4f}"
        assert line in text, line


def test_the_page_on_reasoning_quotes_the_runs_before_the_study_with_muon():
    text = (ROOT / "docs" / "reasoning-forms.md").read_text(encoding="utf-8")
    for row in rows_of("reasoning_muon_tries.jsonl")[1:]:
        loss = f"{row['losses'][-1]:.3f}"
        is_listed = row["tried"] in ("Transformer++", "passed four times")
        assert (loss if is_listed else f"{row['tried']} {loss}") in text, row
