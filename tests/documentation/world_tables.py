"""The tables of docs/imagination.md on three worlds, made from the result files."""

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[2] / "results" / "worlds"
WORLDS = {
    "two-rooms": "two rooms",
    "minigrid": "MiniGrid",
    "breakout": "Breakout",
}  # a study's file -> the world's name on the page
JUDGES = {  # (recipe, judge) -> its name on the page
    ("energy", "energy"): "energy",
    ("energy", "energy_above_prediction"): "energy above its prediction's",
    ("energy", "prediction_error"): "distance from its prediction",
    ("transformer++", "prediction_error"): "distance from Transformer++'s",
}
BASELINES = ("transformer++", "transformer++-4")  # of two layers, and of four
WRONG = ("another_action", "another_time", "another_episode")


def studies():
    """(the world's name, its study) of each world."""
    return [(name, read(f"{world}.json")) for world, name in WORLDS.items()]


def read(name):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def shown(value, digits=3):
    return f"{value['mean']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def row(*cells):
    return f"| {' | '.join(map(str, cells))} |"


def error_rows():
    """World, frames ahead, energy model, Transformer++ of two and of four layers, by how much lower
    than each, last frame, actions.
    """
    rows = []
    for name, study in studies():
        for place, ours in enumerate(study["recipes"]["energy"]["errors"]):
            cells = [ours["model"]]
            cells += [study["recipes"][other]["errors"][place]["model"] for other in BASELINES]
            cells += [study["against"]["energy"][other][place]["gain"] for other in BASELINES]
            cells += [ours["persistence"], ours["gain_over_shuffled_actions"]]
            rows.append(row(name, ours["horizon"], *map(shown, cells)))
    return rows


def judge_rows():
    """World, judge, AUROC against each kind of wrong frame."""
    rows = []
    for name, study in studies():
        for (recipe, judge), label in JUDGES.items():
            told = study["recipes"][recipe]["judge"][judge]
            rows.append(row(name, label, *[shown(told[kind]["auroc"], 2) for kind in WRONG]))
    return rows


def step_rows():
    """World, error after one step, what each further one lowers it by."""
    rows = []
    for name, study in studies():
        first, *further = study["recipes"]["energy"]["steps"]
        gains = [shown(each["gain_over_previous"]) for each in further]
        rows.append(row(name, shown(first["error"]), *gains))
    return rows


def noise_rows():
    """Noise, errors after 1 and 8 frames, AUROC of the energy against two kinds of wrong frames."""
    rows = []
    for name, recipe in read("noise.json")["recipes"].items():
        if name == "transformer++":
            continue
        errors = {each["horizon"]: each["model"] for each in recipe["errors"]}
        told = [recipe["judge"]["energy"][kind]["auroc"] for kind in WRONG[:2]]
        cells = [shown(errors[1]), shown(errors[8]), *[shown(each, 2) for each in told]]
        rows.append(row(name.removeprefix("noise-"), *cells))
    return rows


ACTORS = {  # an actor of a study of planning -> its name on the page
    "energy, cem": "energy model, CEM",
    "transformer++, cem": "Transformer++, CEM",
    "transformer++-4, cem": "Transformer++ of four layers, CEM",
    "energy, gradient": "energy model, gradient",
    "transformer++, gradient": "Transformer++, gradient",
    "transformer++-4, gradient": "Transformer++ of four layers, gradient",
    "persistence": "planning with the last frame",
    "random": "random actions",
}
PLANNED = {"two-rooms": "two rooms", "minigrid": "MiniGrid"}


def plan_rows():
    """World, actor, success, nearest distance, futures and CPU seconds of a plan."""
    rows = []
    for world, name in PLANNED.items():
        actors = read(f"plan-{world}.json")["actors"]
        for actor, label in ACTORS.items():
            if actor not in actors:
                continue
            found = actors[actor]
            cells = [shown(found[key], 2) for key in ("success", "nearest_distance")]
            cells += [f"{found['evaluations_per_plan']:.0f}"]
            cells += [f"{found['cpu_seconds_per_plan']:.2f}"]
            rows.append(row(name, label, *cells))
    return rows
