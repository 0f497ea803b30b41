"""Planning with every run of a sweep over recipes and seeds: who gets to the goal, how soon.

    python tools/study_planning.py runs/world_rooms --env TwoRooms-v0 --env-option farthest=0.4
        --goal ebwm_scale/data/prepare/worlds/two_rooms.py:goal_frame --episodes 40 --max-steps 10
        --horizon 4 --budget 64 --output results/world_plan_rooms.json
        [--recipes energy transformer++] [--solvers cem gradient] [--equal-time]

    actors      each recipe with each solver; planning with the last frame; random actions
    episodes    each seed has --episodes of its own; in each of them every actor plays from the same
                reset, one after the other, so that they share the state of the machine
    equal time  --equal-time: the first solver has --budget, and the others the budget with which a
                plan of the same model takes as many CPU seconds, measured beforehand in turns

Means have 95 % intervals of a bootstrap that draws seeds, and episodes of each; gains are paired by
episode: by how much the first actor's success is higher, and its nearest distance to the goal's
frame lower. Finished episodes are kept in the sweep's folder: the same command goes on after a
kill. Seconds are of planning alone: by the clock, and of the CPU.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ebwm_scale  # noqa: F401 (before torch is loaded: how its threads wait)

# isort: split

import numpy as np

from ebwm_scale.checkpoint.load import load_checkpoint
from ebwm_scale.control.baselines import RandomActor
from ebwm_scale.control.goals import read_goal
from ebwm_scale.control.mpc import Actor, Outcome, run_episode
from ebwm_scale.control.planner import LEAST_BUDGET, SOLVERS, Plan, Planner
from ebwm_scale.control.world_costs import DISTANCES, REACHED
from ebwm_scale.core.arguments import ArgumentParser, command
from ebwm_scale.core.disk import replace_text
from ebwm_scale.core.errors import UserError
from ebwm_scale.core.numerics import flush_denormals
from ebwm_scale.core.provenance import provenance
from ebwm_scale.data.format.manifest import Manifest, load_manifest
from ebwm_scale.data.prepare.worlds.environments import make_environment, option_values
from ebwm_scale.evaluation.bootstrap import BOOTSTRAP
from ebwm_scale.evaluation.planned_episodes import episode_row
from ebwm_scale.evaluation.scaling_laws import read_run
from ebwm_scale.plan_actions import check_counts

MEASURES = ("success", "nearest_distance", "return", "steps")
GAINS = {"success": 1, "nearest_distance": -1}  # what is better: higher, or lower
# Equal times are measured in episodes of their own: how many, how long, the number of the first,
# and a budget's widest multiple.
TURNS, SHORT, BEFOREHAND, WIDEST = 2, 2, 1_000_000, 16


@command
def main() -> int:
    options = parser().parse_args()
    check(options)
    flush_denormals()
    runs = runs_of(options.sweep, options.recipes, options.seeds)
    rows_file = options.sweep / f"planning-{options.output.stem}.jsonl"
    settings = settings_of(options, runs)
    rows = Rows(rows_file, settings)
    for number, (seed, recipes) in enumerate(runs.items()):
        play_seed(options, seed, recipes, options.seed + number * options.episodes, rows)
    result = provenance("gymnasium") | settings | summary(rows.played)
    result["budgets"] = rows.budgets
    result["rows"] = rows.played
    replace_text(options.output, json.dumps(result, indent=1) + "\n")
    for name, actor in result["actors"].items():
        print(f"{name}: {line_of(actor)}")
    print(f"{options.output}: {len(rows.played)} episodes")
    return 0


def parser() -> ArgumentParser:
    result = ArgumentParser(description=__doc__)
    add = result.add_argument
    add("sweep", type=Path)
    add("--recipes", nargs="+", default=None, metavar="NAME", help="default: all of the sweep")
    add("--seeds", nargs="+", default=None, metavar="NAME", help="default: all of the sweep")
    add("--env", required=True, metavar="ENV")
    add("--env-option", nargs="+", default=[], metavar="NAME=VALUE")
    add("--goal", required=True, metavar="GOAL", help="FILE.py:NAME, .npy, .png, episode:E:STEP")
    add("--reached", default=REACHED[0], choices=REACHED)
    add("--distance", default=DISTANCES[0], choices=DISTANCES)
    add("--solvers", nargs="+", default=["cem"], choices=SOLVERS)
    add("--equal-time", action="store_true", help="the others take as long as the first solver")
    add("--horizon", type=int, required=True, metavar="H")
    add("--budget", type=int, required=True, metavar="N", help="futures of a plan")
    add("--execute", type=int, default=1, metavar="N", help="actions of a plan that are taken")
    add("--goal-weight", type=float, default=1.0, metavar="W", help="of the solver gradient")
    add("--episodes", type=int, required=True, metavar="N", help="of each seed")
    add("--max-steps", type=int, required=True, metavar="N")
    add("--seed", type=int, default=0, metavar="N", help="of the first episode")
    add("--output", type=Path, required=True)
    return result


def check(options: argparse.Namespace) -> None:
    """UserError for numbers that cannot be."""
    check_counts(options)
    if options.seed < 0:
        raise UserError(f"--seed is {options.seed}: must be at least 0")
    if options.goal == "reward":
        raise UserError("--goal reward: this study has goals that are frames: name one")


Recipes = dict[str, Path]  # a seed's runs by recipe
Play = Callable[[Actor, int, int], Outcome]  # (who, number of the episode, steps at most)


def runs_of(
    sweep: Path, recipes: Sequence[str] | None, seeds: Sequence[str] | None
) -> dict[str, Recipes]:
    """By seed, the runs of the recipes; UserError for what is missing or has not finished."""
    try:
        listed = json.loads((sweep / "sweep.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{sweep}: no sweep: {error}") from None
    all_labels = [{"seed": "one", **labels} for labels in listed["labels"]]
    for axis, wanted in (("recipe", recipes), ("seed", seeds)):
        there = dict.fromkeys(labels[axis] for labels in all_labels)
        for name in wanted or ():
            if name not in there:
                raise UserError(f"--{axis}s {name}: this sweep has {', '.join(there)}")
    runs: dict[str, Recipes] = {}
    for name, labels in zip(listed["runs"], all_labels):
        recipe, seed = labels["recipe"], labels["seed"]
        if recipe not in (recipes or [recipe]) or seed not in (seeds or [seed]):
            continue
        if read_run(sweep / name) is None:
            raise UserError(f"{sweep / name}: has not finished: wait for it, or train it again")
        runs.setdefault(seed, {})[recipe] = sweep / name
    return runs


def settings_of(options: argparse.Namespace, runs: Mapping[str, Recipes]) -> dict[str, Any]:
    """What decides the episodes; a kept row is of the same."""
    names = ["env", "goal", "reached", "distance", "solvers", "equal_time", "horizon", "budget"]
    names += ["goal_weight", "execute", "episodes", "max_steps", "seed"]
    settings = {name: getattr(options, name) for name in names}
    settings["env_options"] = option_values(options.env_option)
    settings["runs"] = {
        seed: {recipe: run.name for recipe, run in recipes.items()}
        for seed, recipes in runs.items()
    }
    return settings


class Rows:
    """Finished episodes and chosen budgets, a line each, kept as they come.

    played: a row for each actor and episode. budgets: by recipe and solver, once chosen.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        self.played: list[dict[str, Any]] = []
        self.budgets: dict[str, dict[str, int]] = {}
        if not path.exists():
            self._append({"settings": settings})
            return
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # a kill may have cut the last line
        if whole != text:
            path.write_text(whole, encoding="utf-8")
        first, *lines = [json.loads(line) for line in whole.splitlines()] or [{}]
        if first.get("settings") != settings:
            raise UserError(
                f"{path}: holds episodes of other settings: remove it, or give another --output"
            )
        for line in lines:
            if "budgets" in line:
                self.budgets = line["budgets"]
            else:
                self.played.append(line)

    def has(self, seed: str, actor: str, episode: int) -> bool:
        key = (seed, actor, episode)
        return any((row["model_seed"], row["actor"], row["seed"]) == key for row in self.played)

    def chose(self, budgets: dict[str, dict[str, int]]) -> None:
        self.budgets = budgets
        self._append({"budgets": budgets})

    def add(self, row: dict[str, Any]) -> None:
        self.played.append(row)
        self._append(row)

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class Timed:
    """An actor whose plans' CPU seconds are counted."""

    def __init__(self, actor: Actor):
        self.actor = actor
        self.seconds = 0.0

    @property
    def manifest(self) -> Manifest:
        return self.actor.manifest

    def begin(self, episode: int = 0) -> None:
        self.actor.begin(episode)
        self.seconds = 0.0

    def plan(self, *arguments: Any, **options: Any) -> Plan:
        started = time.process_time()
        plan = self.actor.plan(*arguments, **options)
        self.seconds += time.process_time() - started
        return plan

    def shown(self, states: Any) -> np.ndarray | None:
        return None  # nobody looks


def play_seed(
    options: argparse.Namespace, seed: str, recipes: Recipes, first: int, rows: Rows
) -> None:
    """The episodes of a seed: every actor in each of them."""
    make = maker_of(options)
    env = make()
    space = env.action_space
    env.close()
    loaded = {recipe: load_checkpoint(run) for recipe, run in recipes.items()}
    manifests = {str(config.data.manifest) for _, config in loaded.values()}
    if len(manifests) > 1:
        raise UserError(f"{options.sweep}: its runs are of several datasets: {sorted(manifests)}")
    manifest = load_manifest(manifests.pop())
    goal = read_goal(options.goal, manifest)
    assert goal is not None, "reward was refused"

    def planner(recipe: str, solver: str, budget: int, imagines: str = "model") -> Planner:
        model, config = loaded[recipe]
        return Planner(
            model,
            config,
            manifest,
            solver=solver,
            horizon=options.horizon,
            budget=budget,
            seed=options.seed,
            space=space,
            imagines=imagines,
            reached=options.reached,
            distance=options.distance,
            goal_weight=options.goal_weight,
        )

    def play(actor: Actor, episode: int, max_steps: int) -> Outcome:
        env = make()
        try:
            return run_episode(env, actor, goal, max_steps, seed=episode, execute=options.execute)
        finally:
            env.close()

    if not rows.budgets:  # of the first seed's models; those of others are as large
        rows.chose(budgets_of(options, list(loaded), planner, play))
    actors: dict[str, Actor] = {}
    for recipe, budgets in rows.budgets.items():
        for solver, budget in budgets.items():
            actors[f"{recipe}, {solver}"] = planner(recipe, solver, budget)
    eye = planner(next(iter(loaded)), "random", 1)
    actors["persistence"] = planner(next(iter(loaded)), "cem", options.budget, "persistence")
    actors["random"] = RandomActor(manifest, seed=options.seed, space=space)
    for episode in range(first, first + options.episodes):
        for name, actor in actors.items():
            if rows.has(seed, name, episode):
                continue
            timed = Timed(actor)
            outcome = play(timed, episode, options.max_steps)
            row = episode_row(outcome, outcome.success is not None, eye, episode)
            row |= {"model_seed": seed, "actor": name, "cpu_seconds": timed.seconds}
            rows.add(row)
        print(f"{seed}: episode {episode - first + 1} of {options.episodes}", flush=True)


def maker_of(options: argparse.Namespace) -> Callable[[], Any]:
    values = option_values(options.env_option)
    return lambda: make_environment(options.env, values)


def budgets_of(
    options: argparse.Namespace,
    recipes: Sequence[str],
    planner: Callable[[str, str, int], Planner],
    play: Play,
) -> dict[str, dict[str, int]]:
    """By recipe and solver, the futures of a plan."""
    first, *others = options.solvers
    found: dict[str, dict[str, int]] = {}
    for recipe in recipes:
        found[recipe] = dict.fromkeys(options.solvers, int(options.budget))
        if not options.equal_time:
            continue
        for solver in others:

            def share(budget: int, recipe: str = recipe, solver: str = solver) -> float:
                pair = [planner(recipe, first, options.budget), planner(recipe, solver, budget)]
                reference, other = plan_seconds(pair, play)
                return other / reference

            least = LEAST_BUDGET.get(solver, 1)
            found[recipe][solver] = equal_budget(share, least, WIDEST * options.budget)
            print(f"{recipe}, {solver}: {found[recipe][solver]} futures a plan", flush=True)
    return found


def equal_budget(share: Callable[[int], float], least: int, most: int) -> int:
    """The budget with which share(budget), a time over the one that is matched, is about 1.

    Bisection between least and most, until they are closer than a tenth; share rises with budget.
    """
    if share(least) >= 1:
        return least
    low, high = least, most
    while high > low + 1 and high > 1.1 * low:
        middle = max(low + 1, round((low * high) ** 0.5))
        low, high = (middle, high) if share(middle) < 1 else (low, middle)
    return low


def plan_seconds(planners: Sequence[Planner], play: Play) -> list[float]:
    """CPU seconds of a plan of each, the median of short episodes that are played in turns."""
    seconds: list[list[float]] = [[] for _ in planners]
    for turn in range(TURNS + 1):
        for planner, own in zip(planners, seconds):
            timed = Timed(planner)
            outcome = play(timed, BEFOREHAND + turn, SHORT)
            if turn:  # the first one warms up
                own.append(timed.seconds / len(outcome.costs))
    return [float(np.median(own)) for own in seconds]


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is said of each actor, and of each pair of them."""
    known = any(row["success"] is not None for row in rows)
    tables: dict[str, dict[str, dict[int, Mapping[str, Any]]]] = {}
    for row in rows:
        tables.setdefault(row["actor"], {}).setdefault(row["model_seed"], {})[row["seed"]] = row
    measures = [name for name in MEASURES if known or name != "success"]
    result: dict[str, Any] = {"actors": {}, "gains": {}}
    values = {
        actor: {name: values_of(seeds, name) for name in measures}
        for actor, seeds in tables.items()
    }
    for actor, seeds in tables.items():
        own = [row for episodes in seeds.values() for row in episodes.values()]
        plans = sum(row["plans"] for row in own)
        result["actors"][actor] = {
            "num_episodes": len(own),
            "evaluations_per_plan": sum(row["evaluations"] for row in own) / plans,
            "seconds_per_plan": sum(row["seconds"] for row in own) / plans,
            "cpu_seconds_per_plan": sum(row["cpu_seconds"] for row in own) / plans,
        } | {name: pooled(values[actor][name]) for name in measures}
    for one in tables:
        result["gains"][one] = {}
        for other in tables:
            if other != one:
                result["gains"][one][other] = {
                    name: pooled(
                        [
                            sign * (ours - theirs)
                            for ours, theirs in zip(values[one][name], values[other][name])
                        ]
                    )
                    for name, sign in GAINS.items()
                    if name in measures
                }
    return result


def values_of(seeds: Mapping[str, Mapping[int, Mapping[str, Any]]], name: str) -> list[np.ndarray]:
    """A measure in each seed's episodes, in the order of the episodes."""
    return [
        np.array([float(episodes[number][name] or 0) for number in sorted(episodes)])
        for _, episodes in sorted(seeds.items())
    ]


def pooled(seeds: Sequence[np.ndarray]) -> dict[str, Any]:
    """The mean over all episodes, and a 95 % interval that draws seeds and episodes of each."""
    random = np.random.Generator(np.random.Philox(0))
    means = []
    for _ in range(BOOTSTRAP):
        drawn = [seeds[number] for number in random.integers(0, len(seeds), len(seeds))]
        own = [values[random.integers(0, len(values), len(values))] for values in drawn]
        means.append(np.concatenate(own).mean())
    return {
        "mean": float(np.concatenate(list(seeds)).mean()),
        "low": float(np.quantile(means, 0.025)),
        "high": float(np.quantile(means, 0.975)),
        "seeds": [float(values.mean()) for values in seeds],
    }


def line_of(actor: Mapping[str, Any]) -> str:
    shown = []
    for name in ("success", "nearest_distance"):
        if name in actor:
            value = actor[name]
            shown.append(f"{name} {value['mean']:.3f} ({value['low']:.3f} to {value['high']:.3f})")
    return "; ".join([*shown, f"{actor['cpu_seconds_per_plan']:.3g} CPU s a plan"])


if __name__ == "__main__":
    raise SystemExit(main())
