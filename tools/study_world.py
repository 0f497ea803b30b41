"""How far models imagine a world, over recipes and seeds: every run of a sweep, on the same windows
of held-out episodes.

    python tools/study_world.py runs/world_rooms --output results/world_rooms.json
        [--horizons 1 2 4 8 16] [--max-windows 96] [--seeds NAME ..]

Errors are SmoothL1 in the models' space. Means have 95 % intervals of a bootstrap that draws seeds
and episodes; `gain_over_..` is by how much a recipe's error is lower, paired by window; `against`
compares recipes over the seeds that both have. `judge` is how well a recipe tells real next frames
from wrong ones (AUROC), by its energy, by that above its own prediction's, and by the distance from
its prediction; `judge_against` by how much its judges are better than another recipe's prediction.
`steps` is the error of the next frame after each refinement step.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ebwm_scale  # noqa: F401 (before torch is loaded: how its threads wait)

# isort: split

import numpy as np
from torch import Tensor

from ebwm_scale.checkpoint.load import load_checkpoint
from ebwm_scale.core.arguments import ArgumentParser, command
from ebwm_scale.core.errors import UserError
from ebwm_scale.core.numerics import flush_denormals
from ebwm_scale.core.provenance import provenance
from ebwm_scale.data.format.shards import open_split
from ebwm_scale.evaluation.bootstrap import BOOTSTRAP
from ebwm_scale.evaluation.clusters import auroc_draws
from ebwm_scale.evaluation.imagination import (
    Judgements,
    errors_after_steps,
    frame_errors,
    imagined_frames,
    judgements,
    windows_ahead,
)
from ebwm_scale.evaluation.scaling_laws import read_run

OTHERS = ("persistence", "linear_extrapolation", "shuffled_actions")


@command
def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("sweep", type=Path)
    parser.add_argument(
        "--seeds", nargs="+", default=None, metavar="NAME", help="default: all of the sweep"
    )
    parser.add_argument("--horizons", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--max-windows", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    flush_denormals()
    try:
        sweep = json.loads((options.sweep / "sweep.json").read_text(encoding="utf-8"))
    except OSError as error:
        print(f"{options.sweep}: no sweep: {error}", file=sys.stderr)
        return 2
    recipes: dict[str, dict[str, Measured]] = {}
    missing = []
    for name, labels in zip(sweep["runs"], sweep["labels"]):
        if options.seeds is not None and labels.get("seed", "one") not in options.seeds:
            continue
        if read_run(options.sweep / name) is None:
            missing.append(name)
            continue
        measured = Measured(
            options.sweep / name,
            options.horizons,
            max_windows=options.max_windows,
            batch_size=options.batch_size,
        )
        recipes.setdefault(labels["recipe"], {})[labels.get("seed", "one")] = measured
        print(name, measured.line(), flush=True)
    if not recipes:
        raise UserError(f"{options.sweep}: none of its runs has finished")
    first = next(iter(next(iter(recipes.values())).values()))
    result: dict[str, Any] = {
        "missing": missing,
        "num_windows": len(first.episodes),
        "num_episodes": len(set(first.episodes)),
        "context_frames": first.num_context,
        "horizons": first.horizons,
        "recipes": {name: summary(seeds) for name, seeds in recipes.items()},
    }
    result["against"] = {
        one: {other: compare(recipes[one], recipes[other]) for other in recipes if other != one}
        for one in recipes
    }
    result["judge_against"] = {
        one: {
            other: compare_judges(recipes[one], recipes[other]) for other in recipes if other != one
        }
        for one in recipes
    }
    about = provenance() | {"sweep": {key: sweep[key] for key in ("sweep", "file")}}
    options.output.write_text(json.dumps(about | result, indent=1) + "\n", encoding="utf-8")
    print(f"{options.output}: {sum(map(len, recipes.values()))} runs")
    if missing:
        print(f"not finished: {', '.join(missing)}")
    return 0


class Measured:
    """A run on windows of held-out episodes.

    errors: by who imagines, (n,) at each horizon. judge: by judge and kind of wrong frame.
    steps: by number of refinement steps, (n,) errors of the next frame; empty of Transformer++.
    """

    def __init__(self, run: Path, horizons: Sequence[int], *, max_windows: int, batch_size: int):
        model, config = load_checkpoint(run)
        self.run = read_run(run) or {}
        assert config.data.manifest is not None, "a study has one dataset"
        split = open_split(config.data.manifest, "validation", verify="sizes")
        of, _, self.horizons = windows_ahead(
            model,
            split,
            horizons,
            max_windows=max_windows,
            batch_size=batch_size,
            seed=config.train.seed,
        )
        self.episodes, self.num_context = of.episodes, of.num_context
        imagined = imagined_frames(of, self.horizons[-1])
        truth = imagined.pop("truth")
        self.errors = {
            name: {h: frame_errors(states[:, h - 1], truth[:, h - 1]) for h in self.horizons}
            for name, states in imagined.items()
        }
        self.judge = judgements(of)
        is_energy = config.model.kind == "energy"
        self.trained_steps = config.refinement.num_steps if is_energy else None
        self.steps = errors_after_steps(of) if is_energy else {}

    def line(self) -> str:
        shown = []
        for name in ("model", "persistence", "shuffled_actions"):
            if name in self.errors:
                means = [f"{float(error.mean()):.4f}" for error in self.errors[name].values()]
                shown.append(f"{name} {' '.join(means)}")
        return f"error after {self.horizons} frames: {'; '.join(shown)}"


def interval(seeds: Sequence[Tensor], episodes: Sequence[str]) -> dict[str, Any]:
    """The mean of windows, a 95 % interval over seeds and episodes, and each seed's mean.

    seeds: values (n,) of each seed. episodes: of the n windows.
    """
    names = sorted(set(episodes))
    place = np.array([names.index(episode) for episode in episodes])
    counts = np.bincount(place, minlength=len(names))
    table = np.stack([values.double().numpy() for values in seeds])
    sums = np.stack([np.bincount(place, values, len(names)) for values in table])
    random = np.random.Generator(np.random.Philox(0))
    means = []
    for _ in range(BOOTSTRAP):
        drawn_seeds = random.integers(0, len(sums), len(sums))
        drawn = random.integers(0, len(names), len(names))
        total = sums[drawn_seeds][:, drawn].sum()
        means.append(total / (counts[drawn].sum() * len(sums)))
    return {
        "mean": float(table.mean()),
        "low": float(np.quantile(means, 0.025)),
        "high": float(np.quantile(means, 0.975)),
        "seeds": table.mean(1).tolist(),
    }


def summary(seeds: dict[str, Measured]) -> dict[str, Any]:
    """What is said of a recipe."""
    runs = list(seeds.values())
    first = runs[0]
    rows = []
    for horizon in first.horizons:
        row: dict[str, Any] = {"horizon": horizon}
        for name in first.errors:
            row[name] = interval([run.errors[name][horizon] for run in runs], first.episodes)
        for name in OTHERS:
            if name in first.errors:
                gains = [run.errors[name][horizon] - run.errors["model"][horizon] for run in runs]
                row[f"gain_over_{name}"] = interval(gains, first.episodes)
        rows.append(row)
    return {
        "seeds": list(seeds),
        "parameters": first.run["all_parameters"],
        "step_time_s": [run.run["step_time_s"] for run in runs],
        "trained_steps": first.trained_steps,
        "errors": rows,
        "judge": {
            judge: {
                kind: told_over_seeds([run.judge[judge][kind] for run in runs]) for kind in kinds
            }
            for judge, kinds in first.judge.items()
        },
        "steps": after_steps(runs),
    }


def told_over_seeds(seeds: Sequence[Judgements]) -> dict[str, Any]:
    """AUROC, and the share within one context, with intervals over seeds and episodes."""
    own, draws = auroc_draws(
        [each.real for each in seeds], [each.wrong for each in seeds], seeds[0].episodes
    )
    return {
        "auroc": spread(float(own.mean()), draws) | {"seeds": own.tolist()},
        "within_a_context": interval([each.lower for each in seeds], seeds[0].episodes),
    }


def spread(mean: float, draws: np.ndarray) -> dict[str, Any]:
    """A mean with the 95 % interval of its draws."""
    return {
        "mean": mean,
        "low": float(np.quantile(draws, 0.025)),
        "high": float(np.quantile(draws, 0.975)),
    }


def after_steps(runs: list[Measured]) -> list[dict[str, Any]]:
    """The error after each refinement step, and how much lower than after the one before."""
    rows: list[dict[str, Any]] = []
    episodes = runs[0].episodes
    for number in runs[0].steps:
        row: dict[str, Any] = {
            "num_steps": number,
            "error": interval([run.steps[number] for run in runs], episodes),
        }
        if number > 1:
            gains = [run.steps[number - 1] - run.steps[number] for run in runs]
            row["gain_over_previous"] = interval(gains, episodes)
        rows.append(row)
    return rows


def compare(ours: dict[str, Measured], theirs: dict[str, Measured]) -> list[dict[str, Any]]:
    """By how much our error is lower at each horizon, over the seeds that both have."""
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return []
    first = ours[seeds[0]]
    rows = []
    for horizon in first.horizons:
        gains = [
            theirs[seed].errors["model"][horizon] - ours[seed].errors["model"][horizon]
            for seed in seeds
        ]
        rows.append({"horizon": horizon, "gain": interval(gains, first.episodes)})
    return rows


def compare_judges(ours: dict[str, Measured], theirs: dict[str, Measured]) -> dict[str, Any]:
    """By how much each of our judges is better than the distance from their prediction."""
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return {}
    found: dict[str, Any] = {}
    for judge, kinds in ours[seeds[0]].judge.items():
        found[judge] = {}
        for kind in kinds:
            one = [ours[seed].judge[judge][kind] for seed in seeds]
            other = [theirs[seed].judge["prediction_error"][kind] for seed in seeds]
            found[judge][kind] = {
                "auroc": gained_auroc(one, other),
                "within_a_context": interval(
                    [a.lower - b.lower for a, b in zip(one, other)], one[0].episodes
                ),
            }
    return found


def gained_auroc(ours: Sequence[Judgements], theirs: Sequence[Judgements]) -> dict[str, Any]:
    (own, draws), (other, other_draws) = [
        auroc_draws(
            [each.real for each in seeds], [each.wrong for each in seeds], seeds[0].episodes
        )
        for seeds in (ours, theirs)
    ]
    return spread(float((own - other).mean()), draws - other_draws)


if __name__ == "__main__":
    raise SystemExit(main())
