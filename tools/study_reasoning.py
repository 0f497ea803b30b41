"""What thinking is worth on tasks with one right answer: every run of a sweep over recipes and
seeds, after each number of steps, with intervals over instances and seeds.

    python tools/study_reasoning.py runs/worth_mazes --output results/reasoning_mazes.json
        [--larger data/mazes-larger-8/manifest.json ..] [--max-samples 512] [--times 4]
        [--damping 2]

All runs answer the same held-out instances. Per recipe and number of steps (of a looped
Transformer++ loops): loss and solved share, each seed's own, and their mean with a 95 % interval
from a bootstrap that draws instances and seeds. `gain_over_previous` is how much lower the loss is
and how much more is solved than after the number before; `beyond_trained` compares --times the
trained number with the trained one; `against` compares two recipes after their trained steps. All
are paired by instance. `settling` is thinking that stops when an answer settles: how many steps it
takes, and how their number goes with the difficulty (Spearman's rank correlation).
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import ebwm_scale  # noqa: F401 (before torch is loaded: how its threads wait)

# isort: split

import numpy as np
import torch
from torch import Tensor

from ebwm_scale.checkpoint.load import load_checkpoint
from ebwm_scale.config.resolved import min_num_steps
from ebwm_scale.config.schema import Config
from ebwm_scale.core.arguments import ArgumentParser, command
from ebwm_scale.core.errors import UserError
from ebwm_scale.core.numerics import flush_denormals
from ebwm_scale.core.provenance import provenance
from ebwm_scale.data.format.content import difficulty_of
from ebwm_scale.data.format.shards import open_split
from ebwm_scale.evaluation.answers import trained_steps
from ebwm_scale.evaluation.bootstrap import BOOTSTRAP
from ebwm_scale.evaluation.scaling_laws import read_run
from ebwm_scale.evaluation.solving import (
    Marks,
    fit_groups,
    marks_after,
    read_instances,
    settling,
)
from ebwm_scale.planning.flops import model_flops, step_flops


@command
def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--max-samples", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument(
        "--times",
        type=int,
        default=4,
        help="thinking up to so many times the trained steps (default %(default)s)",
    )
    parser.add_argument(
        "--damping",
        type=float,
        help="of an energy model's steps beyond the trained ones, in place of its own: training "
        "does not know of it",
    )
    parser.add_argument(
        "--larger", type=Path, nargs="+", default=[], metavar="MANIFEST", help="other sizes"
    )
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    flush_denormals()
    try:
        sweep = json.loads((options.sweep / "sweep.json").read_text())
    except OSError as error:
        print(f"{options.sweep}: no sweep: {error}", file=sys.stderr)
        return 2
    recipes: dict[str, dict[str, Measured]] = {}
    missing = []
    for name, labels in zip(sweep["runs"], sweep["labels"]):
        if read_run(options.sweep / name) is None:
            missing.append(name)
            continue
        measured = Measured(options.sweep / name, options)
        recipes.setdefault(labels["recipe"], {})[labels.get("seed", "one")] = measured
        print(name, measured.line(), flush=True)
    result = {"missing": missing, "times": options.times}
    result["recipes"] = {name: summary(seeds) for name, seeds in recipes.items()}
    result["against"] = {
        one: {other: compare(recipes[one], recipes[other]) for other in recipes if other != one}
        for one in recipes
    }
    about = provenance() | {"sweep": {key: sweep[key] for key in ("sweep", "file")}}
    options.output.write_text(json.dumps(about | result, indent=1) + "\n")
    print(f"{options.output}: {sum(map(len, recipes.values()))} runs")
    if missing:
        print(f"not finished: {', '.join(missing)}")
    return 0


class Measured:
    """A run's answers to held-out instances: per number of steps marks of every instance."""

    def __init__(self, run: Path, options: argparse.Namespace):
        self.model, config = load_checkpoint(run)
        self.config = self.model.config = with_damping(config, options.damping)
        self.run = read_run(run) or {}
        self.trained = trained_steps(self.config) or 1
        most = 1 if trained_steps(self.config) is None else options.times * self.trained
        numbers = {1, self.trained, most}
        numbers.update(range(1, min(self.trained, 16) + 1))
        numbers.update(
            round(self.trained * factor) for factor in (1.5, 2, 3) if factor * self.trained <= most
        )
        self.numbers = sorted(numbers)
        assert self.config.data.manifest is not None, "a study has one dataset"
        self.marks, self.difficulty, self.stopping = self._answer(
            self.config.data.manifest, options, early=True
        )
        self.larger = {}
        for manifest in options.larger:
            marks, _, _ = self._answer(manifest, options, early=False)
            self.larger[manifest.parent.name] = marks

    def _answer(
        self, manifest: str | Path, options: argparse.Namespace, *, early: bool
    ) -> tuple[dict[int, Marks], Tensor, dict[str, Any] | None]:
        split = open_split(manifest, "validation", verify="sizes")
        fit_groups(self.model, split.manifest)
        batches, sample_ids = read_instances(
            self.model, split, options.max_samples, options.batch_size
        )
        difficulty = torch.tensor([difficulty_of(split.read_fields(i)) for i in sample_ids])
        marks = marks_after(self.model, batches, self.numbers)
        stopping = None
        if early and self.config.model.kind == "energy":
            stopping = settling(self.model, batches, difficulty, [], marks[self.trained])
        return marks, difficulty, stopping

    def line(self) -> str:
        curve = [f"{float(marks.loss.mean()):.3f}" for marks in self.marks.values()]
        solved = [f"{float(marks.solved.mean()):.2f}" for marks in self.marks.values()]
        return f"loss {' '.join(curve)}; solved {' '.join(solved)} after {self.numbers} steps"


def with_damping(config: Config, damping: float | None) -> Config:
    """The configuration with another damping, where that is of steps beyond the trained ones."""
    if damping is None or config.model.kind != "energy":
        return config
    refinement = config.refinement
    after = refinement.damping_after
    if after < refinement.num_steps:
        raise UserError(
            f"--damping {damping}: training saw the damping of these runs, "
            f"refinement.damping_after is {after} and num_steps {refinement.num_steps}; leave it "
            "out"
        )
    update = {"refinement": refinement.model_copy(update={"damping": damping})}
    return config.model_copy(update=update)


def interval(values: Tensor | np.ndarray) -> dict[str, Any]:
    """values (seeds, instances): their mean, a 95 % interval over both, and each seed's mean."""
    table = np.asarray(values, dtype=np.float64)
    random = np.random.Generator(np.random.Philox(0))
    means = []
    for _ in range(BOOTSTRAP):
        seeds = random.integers(0, table.shape[0], table.shape[0])
        instances = random.integers(0, table.shape[1], table.shape[1])
        means.append(table[seeds][:, instances].mean())
    return {
        "mean": float(table.mean()),
        "low": float(np.quantile(means, 0.025)),
        "high": float(np.quantile(means, 0.975)),
        "seeds": table.mean(1).tolist(),
    }


def tables(runs: list[dict[int, Marks]], number: int) -> tuple[np.ndarray, np.ndarray]:
    """(loss, solved) after a number of steps, (seeds, instances) each."""
    loss = np.stack([marks[number].loss.numpy() for marks in runs])
    solved = np.stack([marks[number].solved.numpy() for marks in runs])
    return loss, solved


def gain(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> dict:
    """How much better one is than the other, paired by seed and instance."""
    return {
        "fall_of_loss": interval(other[0] - one[0]),
        "rise_of_solved": interval(one[1] - other[1]),
    }


def training_flops(config: Config) -> float:
    """Of a whole training, with the mean over the numbers of steps that it draws."""
    refinement = config.refinement
    numbers = range(min_num_steps(refinement), refinement.num_steps + 1)
    samples = config.train.global_batch_size
    of_steps = [
        model_flops(step_flops(config, samples=samples, num_steps=number)) for number in numbers
    ]
    return config.train.max_steps * sum(of_steps) / len(of_steps)


def curve(runs: list[dict[int, Marks]], trained: int) -> dict[str, Any]:
    """After each number of steps, what it gains over the one before, and what going on costs."""
    numbers = list(runs[0])
    points = []
    for number in numbers:
        loss, solved = tables(runs, number)
        points.append({"num_steps": number, "loss": interval(loss), "solved": interval(solved)})
    for point, (before, after) in zip(points[1:], itertools.pairwise(numbers)):
        point["gain_over_previous"] = gain(tables(runs, after), tables(runs, before))
    beyond = {}
    for number in numbers:
        if number > trained:
            beyond[str(number)] = gain(tables(runs, number), tables(runs, trained))
    return {"steps": points, "beyond_trained": beyond}


def summary(seeds: dict[str, Measured]) -> dict[str, Any]:
    """What is said of a recipe."""
    runs = list(seeds.values())
    first = runs[0]
    result: dict[str, Any] = {
        "seeds": list(seeds),
        "trained_steps": first.trained,
        "parameters": first.run["all_parameters"],
        "training_flops": training_flops(first.config),
        "step_time_s": [run.run["step_time_s"] for run in runs],
        "learning_rate": first.run["learning_rate"],
        "num_instances": len(first.difficulty),
    }
    result |= curve([run.marks for run in runs], first.trained)
    result["larger"] = {
        name: curve([run.larger[name] for run in runs], first.trained) for name in first.larger
    }
    if first.stopping is not None:
        result["settling"] = [run.stopping for run in runs]
    return result


def compare(ours: dict[str, Measured], theirs: dict[str, Measured]) -> dict[str, Any] | None:
    """How much better ours are after the trained steps, over the seeds that both have."""
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return None
    of_ours = tables([ours[seed].marks for seed in seeds], next(iter(ours.values())).trained)
    of_theirs = tables([theirs[seed].marks for seed in seeds], next(iter(theirs.values())).trained)
    return gain(of_ours, of_theirs)


if __name__ == "__main__":
    raise SystemExit(main())
