"""The figures of the page on reasoning, and what it says of them, are those of its result files."""

import json

import pytest
from quoted import (
    ROOT,
    after_its_trained_steps,
    readme_row,
    rows_of,
    signs,
    with_its_interval,
)

from ebwm_scale.config.load import load_config
from ebwm_scale.refinement.step_plan import step_scale

FAMILIES = ("sudoku", "reachability", "shortest_path")
KINDS = ("fall_of_loss", "rise_of_solved")
OTHERS = ("transformer++-4", "looped-4x4")


def page(name: str = "docs/reasoning.md") -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def study_of(family: str) -> dict:
    return json.loads((ROOT / "results" / f"reasoning_last_{family}.json").read_text())


def study_within_reach() -> dict:
    return json.loads((ROOT / "results" / "reasoning_reach.json").read_text())


def wider(family: str) -> dict:
    path = ROOT / "results" / f"reasoning_parameters_{family}.json"
    return json.loads(path.read_text())


def after(recipe: dict, num_steps: int) -> dict:
    (point,) = [point for point in recipe["steps"] if point["num_steps"] == num_steps]
    return point


@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_quotes_its_studies(family):
    text, study = page(), study_of(family)
    unit = study["recipes"]["transformer++-4"]["training_flops"]
    assert list(study["recipes"]) == ["energy", *OTHERS]
    for recipe in study["recipes"].values():
        trained = after_its_trained_steps(recipe)
        assert len(recipe["seeds"]) == 3
        row = (
            f"| 3 | {recipe['parameters']:,} | {recipe['training_flops'] / unit:.1f} "
            f"| {with_its_interval(trained['loss'], 3)} "
            f"| {with_its_interval(trained['solved'], 2)} |"
        )
        assert row in text, row
    for point in study["recipes"]["energy"]["steps"]:
        row = (
            f"| {point['num_steps']} | {with_its_interval(point['loss'], 3)} "
            f"| {with_its_interval(point['solved'], 2)} |"
        )
        if "gain_over_previous" in point:
            row += f" {with_its_interval(point['gain_over_previous']['rise_of_solved'], 3)} |"
        assert row in text, row
    for other in OTHERS:
        gained = study["against"]["energy"][other]
        line = f"{with_its_interval(gained['fall_of_loss'], 3)} less loss, "
        line += f"{with_its_interval(gained['rise_of_solved'], 2)} more solved."
        assert line in text, line


@pytest.mark.parametrize("family", FAMILIES)
def test_at_equal_parameters_it_solves_more_with_every_seed(family):
    study, other = study_of(family), wider(family)
    energy, wide = study["recipes"]["energy"], other["recipes"]["transformer++-4-wide"]
    assert wide["parameters"] == pytest.approx(energy["parameters"], rel=0.001)
    assert wide["seeds"] == energy["seeds"] and len(wide["seeds"]) == 3
    unit = study["recipes"]["transformer++-4"]["training_flops"]
    ours, theirs = after_its_trained_steps(energy), after(wide, 1)
    row = (
        f"| Transformer++, the same layers, wider | 3 | {wide['parameters']:,} "
        f"| {wide['training_flops'] / unit:.1f} | {with_its_interval(theirs['loss'], 3)} "
        f"| {with_its_interval(theirs['solved'], 2)} |"
    )
    assert row in page(), row
    assert all(a > b for a, b in zip(ours["solved"]["seeds"], theirs["solved"]["seeds"]))
    assert ours["solved"]["low"] > theirs["solved"]["high"]


def test_what_sixteen_layers_solve():
    files = ("reasoning_muon_sudoku", "reasoning_muon_reachability")
    files += ("reasoning_muon_shortest_path_damped",)
    sixteen = []
    for name in files:
        study = json.loads((ROOT / "results" / f"{name}.json").read_text())
        sixteen.append(study["recipes"]["transformer++-16"])
    sudoku, mazes, paths = (after(recipe, 1)["solved"] for recipe in sixteen)
    again = after(wider("reachability")["recipes"]["transformer++-16"], 1)["solved"]
    assert f"solve {sudoku['mean']:.2f} of the Sudokus" in page() and len(sudoku["seeds"]) == 3
    assert f"{mazes['mean']:.2f}" == f"{again['mean']:.2f}" == f"{paths['mean']:.2f}" == "0.99"
    line = "0.99 of the mazes with each of two seeds, and 0.99 of the shortest paths in one run"
    assert line in page()
    energy = study_of("sudoku")["recipes"]["energy"]["parameters"]
    assert f"{sixteen[0]['parameters'] / energy:.1f} times the parameters" in page()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_trained_step_pays_with_every_seed(family):
    energy = study_of(family)["recipes"]["energy"]
    assert energy["trained_steps"] == 3
    for point in energy["steps"][1:3]:
        for kind in KINDS:
            gain = point["gain_over_previous"][kind]
            assert signs([gain]) == "+" and min(gain["seeds"]) > 0, (point["num_steps"], kind)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_ahead_of_its_layers_and_solves_no_fewer_than_the_looped_form_that_shows(family):
    against = study_of(family)["against"]["energy"]
    assert signs([against["transformer++-4"][kind] for kind in KINDS]) == "++"
    recipes = study_of(family)["recipes"]
    more = recipes["energy"]["parameters"] / recipes["looped-4x4"]["parameters"] - 1
    assert f"with {100 * more:.0f} % more parameters" in page()
    loss = {"sudoku": "-"}.get(family, "0")
    assert signs([against["looped-4x4"][kind] for kind in KINDS]) == loss + "0"


@pytest.mark.parametrize("family", FAMILIES)
def test_four_times_the_trained_steps_are_no_worse(family):
    text, energy = page(), study_of(family)["recipes"]["energy"]
    beyond = energy["beyond_trained"]["12"]
    more, less = beyond["rise_of_solved"], beyond["fall_of_loss"]
    line = f"Twelve steps solve {with_its_interval(more, 3)} more than three, "
    assert f"{line}and their loss is {with_its_interval(less, 4)} lower." in text
    assert signs([less]) == "0"
    assert signs([more]) == {"shortest_path": "0"}.get(family, "+")


@pytest.mark.parametrize("family", FAMILIES)
def test_stopping_early_takes_more_steps_for_harder_instances_at_no_loss(family):
    stopped = study_of(family)["recipes"]["energy"]["settling"]
    taken = ", ".join(f"{seed['mean_steps']['mean']:.1f}" for seed in stopped)
    ranks = [seed["rank_correlation_of_steps_with_difficulty"] for seed in stopped]
    assert f"takes {taken} steps with the three seeds" in page()
    shown = ", ".join(f"{rank['mean']:.2f}" for rank in ranks)
    assert f"rank correlations {shown}." in page()
    assert signs(ranks) == "+++"
    assert "-" not in signs([seed["gain_over_trained"]["fall_of_loss"] for seed in stopped])


def test_what_the_looped_form_does_when_it_is_passed_more_often():
    four, sixteen = (after(study_of("sudoku")["recipes"]["looped-4x4"], n) for n in (4, 16))
    a, b = (point["solved"]["mean"] for point in (four, sixteen))
    c, d = (point["loss"]["mean"] for point in (four, sixteen))
    line = f"solves {b:.2f} in place of {a:.2f}, and its loss is {d:.2f} in place of {c:.2f}."
    assert line in page()
    for family in ("reachability", "shortest_path"):
        looped = study_of(family)["recipes"]["looped-4x4"]
        a, b = (after(looped, n)["solved"]["mean"] for n in (4, 16))
        assert f"solves {b:.2f} in place of {a:.2f}." in page(), family
    looped = study_of("reachability")["recipes"]["looped-4x4"]
    four, sixteen = (after(looped, n)["solved"]["seeds"] for n in (4, 16))
    assert sum(many < few - 0.01 for few, many in zip(four, sixteen)) == 2
    assert "falls with two of three seeds" in page()


def test_all_steps_beyond_the_trained_ones_are_as_long_together_as_the_page_says():
    refinement = load_config("studies/reasoning_last_base").refinement
    assert refinement.damping_after == refinement.num_steps == 3
    length = sum(step_scale(refinement, index) for index in range(3, 10_000))
    assert f"together {length:.2f} trained steps long" in page()


def test_larger_mazes_are_not_solved():
    recipes = study_of("reachability")["recipes"]
    (energy,), (looped,) = (recipes[name]["larger"].values() for name in ("energy", "looped-4x4"))
    three, twelve = (with_its_interval(after(energy, n)["solved"], 3) for n in (3, 12))
    line = f"of 8 by 8 {three} after three steps and {twelve} after twelve; "
    four = with_its_interval(after(looped, 4)["solved"], 3)
    assert f"{line}by the layers passed four times {four}." in page()


def test_larger_mazes_that_are_read_are_solved_no_better_after_more_steps_than_were_trained():
    energy = study_of("inside")["recipes"]["energy"]
    assert len(energy["seeds"]) == energy["trained_steps"] == 3
    risen = []
    for name, size in (("seven", "7 by 7"), ("eight", "8 by 8")):
        larger = energy["larger"][name]
        beyond = larger["beyond_trained"]["12"]
        solved = [with_its_interval(after(larger, n)["solved"], 3) for n in (1, 3, 12)]
        more = with_its_interval(beyond["rise_of_solved"], 4)
        assert f"| {size} | {' | '.join(solved)} | {more} |" in page()
        gains = [after(larger, n)["gain_over_previous"]["rise_of_solved"] for n in (2, 3)]
        assert signs([*gains, beyond["rise_of_solved"]]) == {"seven": "++0"}.get(name, "000")
        assert all(with_its_interval(gain, 3) in page() for gain in gains)
        risen.append(f"{-beyond['fall_of_loss']['mean']:.2f}")
    assert f"the loss rises by {' and '.join(risen)}" in page()


def larger_within_reach(family: str) -> tuple[dict, list[dict]]:
    """The recipes of a family, and what its energy model does by size: 6, 8, 10 and 14."""
    recipes = json.loads((ROOT / "results" / f"reasoning_reach_{family}.json").read_text())
    energy = recipes["recipes"]["energy"]
    assert len(energy["seeds"]) == energy["trained_steps"] == 3
    names = [name.rsplit("-", 1)[1] for name in energy["larger"]]
    assert names == ["8", "10", "14"]
    return recipes["recipes"], [energy, *energy["larger"].values()]


REACHED = ("reachability", "shortest_path")


@pytest.mark.parametrize("family", REACHED)
def test_the_page_quotes_what_is_solved_of_larger_mazes(family):
    _, sizes = larger_within_reach(family)
    for number in (1, 2, 3, 4, 6, 9, 12):
        solved = [with_its_interval(after(size, number)["solved"], 3) for size in sizes]
        assert f"| {' | '.join([str(number), *solved])} |" in page()
    stopped = sizes[0]["settling"]
    taken = ", ".join(f"{seed['mean_steps']['mean']:.1f}" for seed in stopped)
    ranks = [seed["rank_correlation_of_steps_with_difficulty"] for seed in stopped]
    line = f"takes {taken} steps on 6 by 6 with the three seeds; rank correlations with the "
    assert line + "difficulty " + ", ".join(f"{rank['mean']:.2f}" for rank in ranks) in page()
    assert signs(ranks) == "+++"


@pytest.mark.parametrize("family", REACHED)
def test_thinking_longer_than_was_trained_solves_more_larger_mazes_with_every_seed(family):
    _, (in_size, *larger) = larger_within_reach(family)
    rises = [size["beyond_trained"]["12"]["rise_of_solved"] for size in larger]
    assert signs(rises[1:]) == "++" and all(min(rise["seeds"]) > 0 for rise in rises)
    assert "-" not in signs(list(in_size["beyond_trained"]["12"].values()))
    shown = [with_its_interval(rise, 3) for rise in rises]
    for size in (in_size, *larger):
        for number in (2, 3):
            assert signs([after(size, number)["gain_over_previous"]["rise_of_solved"]]) == "+"
    line = f"solve {shown[0]} more of 8 by 8, {shown[1]} of 10 by 10 and {shown[2]} of 14 by 14"
    assert line in page()


@pytest.mark.parametrize("family", REACHED)
def test_the_page_says_what_the_looped_form_does_within_the_same_reach(family):
    recipes, _ = larger_within_reach(family)
    looped = recipes["looped-4x4"]
    assert looped["training_flops"] == pytest.approx(recipes["energy"]["training_flops"], rel=0.05)
    assert len(looped["seeds"]) == 3
    _, ten, fourteen = looped["larger"].values()
    for number in (4, 6, 16):
        solved = [with_its_interval(after(size, number)["solved"], 3) for size in (ten, fourteen)]
        assert " and ".join(solved) in page()


def test_larger_mazes_are_solved_within_reach_and_better_with_more_steps_than_were_trained():
    text, study = page(), study_within_reach()["recipes"]
    energy, looped = study["energy"], study["looped-4x4"]
    assert len(energy["seeds"]) == energy["trained_steps"] == 3 and len(looped["seeds"]) == 1
    sizes = [energy["larger"][name] for name in ("seven", "eight")]
    for number in (1, 2, 3, 4, 6, 9, 12):
        cells = [str(number)]
        for size in sizes:
            cells.append(with_its_interval(after(size, number)["solved"], 3))
            more = size["beyond_trained"].get(str(number))
            cells.append("" if more is None else with_its_interval(more["rise_of_solved"], 4))
        assert f"| {' | '.join(cells)} |" in text, cells
    for size in sizes:
        gains = [after(size, n)["gain_over_previous"]["rise_of_solved"] for n in (2, 3)]
        more, twelve = (size["beyond_trained"][n]["rise_of_solved"] for n in ("4", "12"))
        assert signs([*gains, more, twelve]) == "+++0"
        assert min(more["seeds"]) > 0
    more = [with_its_interval(s["beyond_trained"]["4"]["rise_of_solved"], 4) for s in sizes]
    assert f"with every seed**: four steps {' and '.join(more)} more than three" in text
    in_size = energy["beyond_trained"].values()
    assert set(signs([beyond["rise_of_solved"] for beyond in in_size])) == {"0"}
    assert f"{with_its_interval(after(energy, 3)['solved'], 3)} after three." in text


def test_what_the_page_says_beside_it():
    text, study = page(), study_within_reach()["recipes"]
    energy, looped = study["energy"], study["looped-4x4"]
    ours = [after(energy["larger"][name], 3)["solved"]["mean"] for name in ("seven", "eight")]
    before = study_of("inside")["recipes"]["energy"]["larger"]
    seeing_all = [after(before[name], 3)["solved"]["mean"] for name in ("seven", "eight")]
    shown = [f"{share:.2f}" for share in (*ours, *seeing_all)]
    assert f"it solves {shown[0]} of 7 by 7 and {shown[1]} of 8 by 8**" in text
    assert f"see all others solve {shown[2]} and {shown[3]}." in text
    passes = [
        with_its_interval(after(looped["larger"][name], number)["solved"], 3)
        for number in (4, 6)
        for name in ("seven", "eight")
    ]
    line = f"one seed: {passes[0]} and {passes[1]}, after six passes {passes[2]} and {passes[3]}."
    assert line in text
    assert looped["training_flops"] == pytest.approx(energy["training_flops"], rel=0.05)
    stopped = energy["settling"]
    taken = ", ".join(f"{seed['mean_steps']['mean']:.1f}" for seed in stopped)
    ranks = [seed["rank_correlation_of_steps_with_difficulty"] for seed in stopped]
    line = f"takes {taken} steps with the three seeds; rank correlations with the difficulty "
    assert line + ", ".join(f"{rank['mean']:.2f}" for rank in ranks) in text
    assert signs(ranks) == "+++"


def test_the_page_quotes_its_quick_start_and_that_takes_minutes():
    (run,) = json.loads((ROOT / "results/quickstart_reasoning/timing.json").read_text())["runs"]
    solved, larger = run["solved_after_steps"], run["of_10_by_10_solved_after_steps"]
    first, second = (
        f"{found['1']:.2f}, {found['2']:.2f} and {found['3']:.2f}" for found in (solved, larger)
    )
    other = run["transformer_plus_plus_solved"]
    assert run["of_10_by_10_transformer_plus_plus_solved"] == 0
    for line in (
        f"It took {run['wall_s']:.0f} seconds",
        f"steps {first} of 500 mazes were solved; Transformer++ solved {other:.2f}.",
        f"it was {second}, and {larger['12']:.2f} after twelve steps; Transformer++ solved none.",
    ):
        assert line in page(), line
    assert run["wall_s"] < 600
    assert round(run["wall_s"] / 60) == 8 and "in eight minutes on two cores" in page("README.md")


def test_the_page_quotes_what_damping_does_to_twelve_steps():
    found: dict[str, dict[float, float]] = {}
    names = {"reachability": "reachable cells", "shortest_path": "shortest paths"}
    for row in rows_of("reasoning_reach_damping.jsonl")[1:]:
        size = row["cells_a_side"]
        what = f"{names[row['family']]}, {size} by {size}, seed {row['seed']}"
        found.setdefault(what, {})[row["damping"]] = row["solved_after"]["12"]
    for what, solved in found.items():
        dampings = ", ".join(f"{damping:g}" for damping in solved)
        line = f"* {what}, damping {dampings}: {', '.join(f'{n:.3f}' for n in solved.values())}"
        assert line in page(), line
    shipped = (load_config(f"reasoning/{family}").refinement.damping for family in REACHED)
    assert tuple(shipped) == (2, 3) and load_config("quickstart_reasoning").refinement.damping == 2


def test_the_page_quotes_the_runs_before_it():
    eight, *four = [row["larger"]["eight"] for row in rows_of("reasoning_reach_tries.jsonl")[1:]]
    line = f"{eight['8'][0]:.3f} after eight and {eight['12'][0]:.3f} after twelve"
    first, second = (" and ".join(f"{run[n][0]:.3f}" for run in four) for n in ("4", "6"))
    assert f"{line}; two to four, seeds 33 and 1, {first} after four, {second} after six." in page()


def test_the_page_quotes_the_runs_beside_the_studies():
    text = page()
    names = {"sudoku": "Sudokus", "reachability": "mazes"}
    rows = rows_of("reasoning_last_tries.jsonl")[1:]
    for row in rows:
        start = f"* {names.get(row['family'])}, {row['tried']}"
        if "larger" in row:
            of_7, of_8 = (row["larger"][size] for size in ("7", "8"))
            line = f"of 7 by 7 {of_7['3']:.3f} after three steps and {of_7['12']:.3f} after twelve"
            assert f"{line}, of 8 by 8 {of_8['3']:.3f} and {of_8['12']:.3f}." in text
        elif "losses" in row:
            assert f"{start}, seed {row['seed']}: {row['losses'][-1]:.4f}" in text, row
        else:
            points = [row["solved_after"][number] for number in ("3", "6", "12")]
            shares = ", ".join(f"{share:.3f}" for share, _ in points)
            losses = ", ".join(f"{loss:.3f}" for _, loss in points)
            line = f"{start}: after 3, 6 and 12 steps solved {shares}, loss {losses}"
            assert line in text, line
    assert len(rows) > 10


def test_the_readme_quotes_what_is_solved():
    for start, family, other in (
        ("mazes of 6 by 6", "reachability", "transformer++-4"),
        ("Sudokus of 6 by 6", "sudoku", "transformer++-4"),
        ("such Sudokus, Transformer++ passed four times", "sudoku", "looped-4x4"),
    ):
        recipes = study_of(family)["recipes"]
        shown = tuple(
            ", ".join(
                f"{share:.2f}"
                for share in after_its_trained_steps(recipes[name])["solved"]["seeds"]
            )
            for name in (other, "energy")
        )
        assert readme_row(start) == shown


def test_the_readme_quotes_what_is_solved_of_larger_mazes():
    recipes, (_, _, ten, fourteen) = larger_within_reach("reachability")
    _, looped, _ = recipes["looped-4x4"]["larger"].values()
    for start, passes, steps in (("mazes of 10 by 10", 4, 3), ("such mazes, four times", 16, 12)):
        shown = tuple(
            ", ".join(f"{share:.2f}" for share in after(size, number)["solved"]["seeds"])
            for size, number in ((looped, passes), (ten, steps))
        )
        assert readme_row(start) == shown
    three, twelve = (f"{after(fourteen, n)['solved']['mean']:.2f}" for n in (3, 12))
    line = f"it solves {three} of 14 by 14 in the three trained steps, and {twelve} in twelve."
    assert line in page("README.md")
    most = max(looped["steps"], key=lambda point: point["solved"]["mean"])
    assert most["num_steps"] == 6
    line = f"Passed six times the looped form solves {most['solved']['mean']:.2f} of 10 by 10"
    assert f"{line}; passed more often it breaks." in page("README.md")
    worse = [looped["beyond_trained"][n]["rise_of_solved"] for n in ("8", "12", "16")]
    assert signs(worse) == "---"


def test_the_readme_quotes_what_thinking_on_is_worth():
    beyond = study_of("sudoku")["recipes"]["energy"]["beyond_trained"]["12"]
    more = with_its_interval(beyond["rise_of_solved"], 3)
    assert f"solves {more} more Sudokus." in page("README.md")
