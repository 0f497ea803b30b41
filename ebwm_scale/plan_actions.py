"""Plan actions in an environment with a trained world model: does it get where it should?

    ebwm plan-actions RUN --env ENV --goal FILE.png
    ebwm plan-actions RUN --env ENV --goal episode:0:40 [--solver gradient] [--against RUN2]
                          [--baseline random persistence]
    ebwm plan-actions RUN --env ENV --goal FILE.py:NAME [--success FILE.py:NAME]
    ebwm plan-actions RUN --env ENV --goal reward

At each step the frames and actions so far go into the model, a solver looks for the actions whose
imagined future comes nearest to the goal, and the first ones are taken. RUN is trained on a dataset
of worlds whose frames are conditioned on `action`. A goal is a frame (a file, one of a held-out
episode, or what NAME(env, observation, info) gives once an episode has begun) or reward.

Success is what the environment says: info["success"], or a terminal step whose reward is above 0
and above all before it; or NAME(observation, reward, terminated, info) of --success. Beside this
model the same episodes are played by others: --against another run with the same solver and budget,
--baseline persistence (the solver, for who the last frame stays) and random actions.
plan_actions.json has shares, returns and distances with intervals; plan_actions.html the same with
films.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ebwm_scale.checkpoint.load import load_checkpoint
from ebwm_scale.config.schema import Config
from ebwm_scale.control.actions import action_condition
from ebwm_scale.control.baselines import RandomActor
from ebwm_scale.control.goals import read_goal
from ebwm_scale.control.mpc import Actor, Success
from ebwm_scale.control.planner import SOLVERS, Planner
from ebwm_scale.control.reward_readout import RewardGoal, fit_reward
from ebwm_scale.control.world_costs import DISTANCES, REACHED, CostConfig
from ebwm_scale.core.arguments import ArgumentParser, command
from ebwm_scale.core.console import progress_on_console, say
from ebwm_scale.core.errors import EXIT_FINISHED, DataError, UserError
from ebwm_scale.core.plain_text import shorten
from ebwm_scale.core.provenance import provenance
from ebwm_scale.data.format.content import VideoContent
from ebwm_scale.data.format.manifest import Manifest
from ebwm_scale.data.format.side_files import open_manifest
from ebwm_scale.data.prepare.worlds.environments import (
    make_environment,
    name_value_pairs,
    option_values,
)
from ebwm_scale.data.prepare.worlds.policies import function_of_file
from ebwm_scale.data.prepare.worlds.source import FRAMES
from ebwm_scale.evaluation.imagination import refuse_another_space
from ebwm_scale.evaluation.planned_episodes import Episodes, measures, play_all

BASELINES = ("random", "persistence")
WITHOUT_MODEL = "cem"  # the solver of persistence where the model's follows a gradient


@command
def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    check(options)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, config = load_checkpoint(options.checkpoint, device=device)
    manifest = manifest_of(options, config)
    frame = read_goal(options.goal, manifest)
    success = success_of(options.success)
    make = maker_of(options)
    env = make()
    try:
        space = env.action_space
    finally:
        env.close()
    planner = planner_of(options, model, config, manifest, space, options.solver)
    options.horizon = planner.horizon  # that of everybody, also of a run of another context
    goal = fit_reward(manifest, planner.spec) if frame is None else frame
    actors: dict[str, Actor] = {"model": planner}
    if options.against is not None:
        other, other_config = load_checkpoint(options.against, device=device)
        refuse_another_space(model, other)
        actors["against"] = planner_of(
            options, other, other_config, manifest, space, options.solver
        )
    for name in options.baseline:
        if name == "random":
            actors[name] = RandomActor(manifest, seed=options.seed, space=space)
            continue
        solver = WITHOUT_MODEL if options.solver == "gradient" else options.solver
        actors[name] = planner_of(
            options, model, config, manifest, space, solver, imagines="persistence"
        )
    episodes = Episodes(
        make,
        goal,
        options.episodes,
        options.max_steps,
        options.seed,
        options.execute,
        success,
        keys_of(options),
    )
    with progress_on_console() as progress:
        played = play_all(actors, episodes, progress)
    result = about(options, arguments, config, planner, goal) | measures(
        played, planner, options.seed
    )
    from ebwm_scale.reporting.plan_actions_page import films_of, write_plan_actions

    content = manifest.content
    assert isinstance(content, VideoContent), "a planner was made of it"
    films = films_of(played, min(options.films, options.episodes), content.interval_s)
    say(str(write_plan_actions(options.output or options.checkpoint, result, films)))
    for line in lines_of(result):
        say(line)
    return EXIT_FINISHED


def parser() -> argparse.ArgumentParser:
    result = ArgumentParser(description=__doc__)
    result.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="run folder or checkpoint folder"
    )
    world = result.add_argument_group("the environment")
    world.add_argument(
        "--env", required=True, metavar="ENV", help="of Gymnasium; MODULE:ENV where a module has it"
    )
    world.add_argument(
        "--env-option",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="for gymnasium.make",
    )
    world.add_argument(
        "--camera", default=None, metavar="KEY", help="where frames are, as in recording"
    )
    world.add_argument(
        "--map",
        nargs="+",
        default=[],
        metavar="NAME=KEY",
        help="where a condition is sensed (default: as recorded)",
    )
    world.add_argument(
        "--data", metavar="MANIFEST", help="the run's dataset, if it has moved since training"
    )
    aim = result.add_argument_group("the goal")
    aim.add_argument(
        "--goal",
        required=True,
        metavar="GOAL",
        help="reward, a .npy or .png, episode:E:STEP, or FILE.py:NAME",
    )
    aim.add_argument(
        "--reached",
        default=REACHED[0],
        choices=REACHED,
        help="which imagined frames are compared with the goal's: mean of all, the last, or any "
        "(default %(default)s)",
    )
    aim.add_argument(
        "--distance",
        default=DISTANCES[0],
        choices=DISTANCES,
        help="of an imagined frame from the goal's: frame, patch by patch, or moved, which also "
        "grows with the way that things have to go (default %(default)s)",
    )
    aim.add_argument(
        "--success", default=None, metavar="FILE.py:NAME", help="says whether a step reached it"
    )
    search = result.add_argument_group("the search")
    search.add_argument(
        "--solver", default="cem", choices=SOLVERS, help="how actions are found (default cem)"
    )
    search.add_argument(
        "--horizon",
        type=int,
        default=None,
        metavar="H",
        help="steps ahead (default: about half of the trained context)",
    )
    search.add_argument(
        "--budget",
        type=int,
        default=256,
        metavar="N",
        help="futures that a plan may evaluate (default %(default)s)",
    )
    search.add_argument(
        "--execute",
        type=int,
        default=1,
        metavar="N",
        help="actions of a plan that are taken before the next one (default %(default)s)",
    )
    search.add_argument(
        "--energy-weight",
        type=float,
        default=0.0,
        metavar="W",
        help="of the imagined frames' energies beside the goal (default %(default)s)",
    )
    search.add_argument(
        "--goal-weight",
        type=float,
        default=1.0,
        metavar="W",
        help="of the goal against the energy, for the solver gradient (default %(default)s)",
    )
    play = result.add_argument_group("the episodes")
    play.add_argument(
        "--episodes", type=int, default=10, metavar="N", help="how many (default %(default)s)"
    )
    play.add_argument(
        "--max-steps",
        type=int,
        default=100,
        metavar="N",
        help="of the environment, in each (default %(default)s)",
    )
    play.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the first episode (default 0)"
    )
    play.add_argument(
        "--against",
        type=Path,
        default=None,
        metavar="RUN",
        help="another run of the same data, such as Transformer++: the same solver and budget",
    )
    play.add_argument(
        "--baseline",
        nargs="+",
        default=[],
        choices=BASELINES,
        help="who else acts in the same episodes",
    )
    result.add_argument(
        "--films",
        type=int,
        default=2,
        metavar="N",
        help="episodes of each that the page shows (default %(default)s)",
    )
    result.add_argument(
        "--output", type=Path, default=None, metavar="DIR", help="default: the run folder"
    )
    return result


def check_counts(options: argparse.Namespace) -> None:
    """UserError where a number of episodes, steps or actions is below 1."""
    for name in ("episodes", "max_steps", "execute"):
        if getattr(options, name) < 1:
            option = name.replace("_", "-")
            raise UserError(f"--{option} is {getattr(options, name)}: must be at least 1")


def check(options: argparse.Namespace) -> None:
    """UserError for numbers that cannot be."""
    check_counts(options)
    for name in ("films", "seed"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name} is {getattr(options, name)}: must be at least 0")
    if options.goal_weight <= 0:
        raise UserError(f"--goal-weight is {options.goal_weight}: must be above 0")


def manifest_of(options: argparse.Namespace, config: Config) -> Manifest:
    """The dataset that a run was trained on, which must have actions."""
    if config.state.kind == "vocabulary":
        raise UserError(
            f"{options.checkpoint}: a model of text: actions are planned with a world model"
        )
    sources = [source.manifest for source in config.data.sources or ()]
    path = options.data or config.data.manifest or (sources[0] if sources else None)
    try:
        if path is None:
            raise DataError(f"{options.checkpoint}: names no dataset")
        manifest = open_manifest(path)
    except DataError as error:
        raise DataError(
            f"{error}; its encoder and statistics are needed: name the dataset with --data"
        ) from None
    action_condition(manifest)
    return manifest


def maker_of(options: argparse.Namespace) -> Callable[[], Any]:
    """Makes the environment."""
    values = option_values(options.env_option)
    return lambda: make_environment(options.env, values)


def keys_of(options: argparse.Namespace) -> dict[str, str]:
    """Which keys of the environment columns are, where they are said."""
    keys = dict(name_value_pairs(options.map, "--map", "proprio=observation"))
    if options.camera is not None:
        keys[FRAMES] = options.camera
    return keys


def planner_of(
    options: argparse.Namespace,
    model,
    config: Config,
    manifest: Manifest,
    space: Any,
    solver: str,
    imagines: str = "model",
) -> Planner:
    weight = 0.0 if imagines == "persistence" else options.energy_weight
    return Planner(
        model,
        config,
        manifest,
        solver=solver,
        horizon=options.horizon,
        budget=options.budget,
        seed=options.seed,
        space=space,
        imagines=imagines,
        costs=CostConfig(weight),
        reached=options.reached,
        distance=options.distance,
        goal_weight=options.goal_weight,
    )


def success_of(text: str | None) -> Success | None:
    """The function that a text names."""
    if text is None:
        return None
    usage = "--success takes FILE.py:NAME"
    path, separator, name = text.rpartition(":")
    if not separator:
        raise UserError(f"--success {text}: {usage}")
    function = function_of_file(Path(path), name, usage)

    def reached(observation: Any, reward: float, terminated: bool, info: Any) -> bool:
        try:
            return bool(function(observation, reward, terminated, info))
        except Exception as error:  # noqa: BLE001 (a user's function raises what it likes)
            what = f"{type(error).__name__}: {shorten(error, 200)}"
            raise UserError(f"--success {text}: fails: {what}") from None

    return reached


def about(
    options: argparse.Namespace,
    arguments: Sequence[str] | None,
    config: Config,
    planner: Planner,
    goal: Any,
) -> dict[str, Any]:
    """What a result says of where it comes from."""
    notes = []
    if isinstance(goal, RewardGoal):
        notes.append(
            f"Rewards are expected by a linear readout of frames and actions, which tells "
            f"{goal.told:.0%} of their variance on held-out steps."
        )
    if options.solver == "gradient" and "persistence" in options.baseline:
        notes.append(
            f"Planning with the last frame has no gradient to follow: it uses {WITHOUT_MODEL}, "
            "which draws at random where all futures are alike."
        )
    return {
        "checkpoint": str(options.checkpoint),
        "against": None if options.against is None else str(options.against),
        "data": str(planner.manifest.path),
        "env": options.env,
        "env_options": option_values(options.env_option),
        "goal": options.goal,
        "reached": options.reached,
        "distance": options.distance,
        "reward_told": goal.told if isinstance(goal, RewardGoal) else None,
        "success": options.success,
        "solver": options.solver,
        "horizon": planner.horizon,
        "budget": options.budget,
        "execute": options.execute,
        "energy_weight": options.energy_weight,
        "goal_weight": options.goal_weight,
        "num_episodes": options.episodes,
        "max_steps": options.max_steps,
        "seed": options.seed,
        "kind": config.model.kind,
        "notes": notes,
        **provenance("gymnasium", arguments=list(arguments) if arguments else None),
    }


def lines_of(result: dict[str, Any]) -> list[str]:
    """What a person reads first: a line for each actor."""
    lines = []
    for name, actor in result["actors"].items():
        said = []
        if actor["success"] is not None:
            said.append(f"success {_interval(actor['success'])}")
        said.append(f"return {_interval(actor['return'])}")
        if actor["nearest_distance"] is not None:
            said.append(f"nearest {_interval(actor['nearest_distance'])}")
        said.append(f"{actor['seconds_per_plan']:.3g} s per plan")
        lines.append(f"{name}: {'; '.join(said)}")
    return lines


def _interval(value: dict[str, float]) -> str:
    return f"{value['mean']:.4g} ({value['low']:.4g} to {value['high']:.4g})"


if __name__ == "__main__":
    sys.exit(main())
