"""The figures of the page on reasoning are those of its result files."""

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
    text = (ROOT / "docs" / "reasoning.md").read_text(encoding="utf-8")
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
    text = (ROOT / "docs" / "reasoning.md").read_text(encoding="utf-8")
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
    text = (ROOT / "docs" / "reasoning.md").read_text(encoding="utf-8")
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
    text = (ROOT / "docs" / "reasoning.md").read_text(encoding="utf-8")
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


@pytest.mark.parametrize(
    "family, more_seeds, signs_of_both",
    [("muon_reachability", 1, ("+00", "+00")), ("muon_shortest_path", 0, ("0-", "0-"))],
)
def test_the_page_on_reasoning_says_only_what_mazes_with_muon_say(
    family, more_seeds, signs_of_both
):
    """more_seeds: whether sixteen layers are there, with a single one."""
    text = (ROOT / "docs" / "reasoning.md").read_text(encoding="utf-8")
    study = json.loads((ROOT / "results" / f"reasoning_{family}.json").read_text())
    recipes = study["recipes"]
    against = [study["against"]["energy"][name] for name in list(recipes)[1:]]
    names = ["energy", "transformer++-4", "looped-4x4", "transformer++-16"]
    assert list(recipes) == names[: 3 + more_seeds]
    numbers = [len(recipe["seeds"]) for recipe in recipes.values()]
    assert numbers == [3, 3, 3, 1][: 3 + more_seeds]
    for gained, expected in zip(("fall_of_loss", "rise_of_solved"), signs_of_both):
        assert signs([other[gained] for other in against]) == expected
    taken, ranks = stopping_in_words(recipes["energy"])
    assert f"takes {taken} steps" in text and f"{ranks}." in text
    of_larger = {}
    for name in ("energy", "looped-4x4"):
        (of_larger[name],) = recipes[name]["larger"].values()
    four, sixteen = (with_its_interval(solved(of_larger["energy"], n), 3) for n in (4, 16))
    assert f"it solves {four} after four steps and {sixteen} after sixteen" in text
    looped = with_its_interval(solved(of_larger["looped-4x4"], 4), 3)
    assert f"the layers passed four times {looped}" in text


def test_the_page_on_reasoning_says_which_steps_pay_on_shortest_paths():
    text = (ROOT / "docs" / "reasoning.md").read_text(encoding="utf-8")
    study = json.loads((ROOT / "results" / "reasoning_muon_shortest_path.json").read_text())
    energy, looped = study["recipes"]["energy"], study["recipes"]["looped-4x4"]
    gains = [point["gain_over_previous"] for point in energy["steps"][1:4]]
    for kind in ("fall_of_loss", "rise_of_solved"):
        assert signs([gain[kind] for gain in gains]) == "++0"
        assert all(of_seed > 0 for gain in gains[:2] for of_seed in gain[kind]["seeds"])
    one, three = (f"{solved(energy, n)['mean']:.2f}" for n in (1, 3))
    assert f"After the first it solves {one}, after the third {three};" in text
    for seed in energy["settling"]:
        assert signs([seed["gain_over_trained"]["fall_of_loss"]]) == "0"
    beyond = energy["beyond_trained"]["16"]["fall_of_loss"]
    rise = f"{-beyond['mean']:.3f} [{-beyond['high']:.3f}, {-beyond['low']:.3f}]"
    assert f"after sixteen the loss is {rise} higher" in text
    four, many = (solved(looped, n)["mean"] for n in (4, 16))
    assert f"{many:.2f} solved in place of {four:.2f}" in text
    (last,) = [point for point in energy["steps"] if point["num_steps"] == 4]
    ends = [f"{loss:.4f}" for loss in last["loss"]["seeds"]]
    assert f"{ends[0]}, {ends[1]} and {ends[2]}" in text


def test_damped_steps_on_shortest_paths_were_stable_and_did_little():
    text = (ROOT / "docs" / "reasoning.md").read_text(encoding="utf-8")
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
    text = (ROOT / "docs" / "reasoning.md").read_text(encoding="utf-8")
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


def test_readme_and_results_quote_what_is_solved_of_mazes_at_equal_flops():
    study = json.loads((ROOT / "results" / "reasoning_muon_reachability.json").read_text())
    shares = [
        f"{after_its_trained_steps(study['recipes'][name])['solved']['mean']:.2f}"
        for name in ("transformer++-16", "looped-4x4", "energy")
    ]
    deep, looped, energy = shares
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"With Muon it is {deep}, {looped} and {energy}." in readme
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert f"{energy} of the mazes beside {deep} and {looped}." in results


def test_the_page_on_reasoning_quotes_the_runs_beside_the_studies_of_mazes():
    text = (ROOT / "docs" / "reasoning.md").read_text(encoding="utf-8")
    for row in rows_of("reasoning_muon_tries_mazes.jsonl")[1:]:
        family = {"reachability": "mazes", "shortest-path": "shortest paths"}[row["family"]]
        rate = row["settings"][0].split("=")[1]
        line = f"* {family}, {row['tried']}, rate {rate}: {row['losses'][-1]:.4f}"
        assert line in text, line


def test_the_readme_quotes_what_is_solved_of_mazes_and_sudokus():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [
        ("muon_reachability", "transformer++-4"),
        ("reachability", "transformer++-4"),
        ("muon_sudoku", "transformer++-4"),
        ("muon_sudoku", "looped-4x4"),
    ]
    for family, other in rows:
        study = json.loads((ROOT / "results" / f"reasoning_{family}.json").read_text())
        cells = []
        for name in (other, "energy"):
            trained = after_its_trained_steps(study["recipes"][name])
            cells.append(", ".join(f"{share:.2f}" for share in trained["solved"]["seeds"]))
        assert f"| {cells[0]} | {cells[1]} | `results/reasoning_{family}.json` |" in text


def test_the_page_on_reasoning_quotes_the_runs_before_the_study_with_muon():
    text = (ROOT / "docs" / "reasoning.md").read_text(encoding="utf-8")
    for row in rows_of("reasoning_muon_tries.jsonl")[1:]:
        loss = f"{row['losses'][-1]:.3f}"
        is_listed = row["tried"] in ("Transformer++", "passed four times")
        assert (loss if is_listed else f"{row['tried']} {loss}") in text, row
