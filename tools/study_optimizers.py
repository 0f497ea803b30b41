"""Is Muon better than AdamW on the quick start? Both model kinds, rates tuned alike, paired seeds.

    python tools/study_optimizers.py data/sample-64/manifest.json --output results/muon.jsonl
        [--kinds energy baseline] [--optimizers adamw muon] [--steps 300] [--runs runs/optimizers]

For each kind and optimizer:

    tuning    half of the steps, seed 0, at four rates a factor of 2 apart; while the best is the
              lowest or the highest of those tried, one more beyond it
    parts     Muon alone: the same for the rate of what AdamW keeps, at the best rate of Muon's
              matrices; from half of that rate on
    seeds     all steps at the best rate, three seeds; Muon with one rate and with two
    cost      CPU and wall seconds of a training step, the optimizers' steps in turns

Everything but optimizer, rate and number of steps is configs/quickstart.yaml's, or its baseline's;
the cosine ends with the steps. Losses are nats per token at the end: of tuning on the validation
blocks of the configuration, of seeds on the whole split. At first one rate serves Muon's matrices
and the parameters that AdamW keeps beside them, as in arXiv 2502.16982: Muon's update is scaled to
the size of AdamW's.

A line is added to the output for each run, and a run that is there is not repeated; so parts of a
study may run side by side. What is complete is summarised beside it (.json): means, and the
difference that Muon makes, paired by seed, with a 95 % interval of Student's t over the seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ebwm_scale  # noqa: F401 (before torch is loaded: how its threads wait)

# isort: split

import torch

from ebwm_scale.config.load import load_config
from ebwm_scale.config.schema import Config
from ebwm_scale.core.arguments import ArgumentParser, command
from ebwm_scale.core.errors import EXIT_RUN_AGAIN, UserError
from ebwm_scale.core.numerics import flush_denormals
from ebwm_scale.core.provenance import provenance
from ebwm_scale.core.rows import Rows
from ebwm_scale.evaluation.seed_interval import STUDENT_T, seed_interval
from ebwm_scale.refinement.noise import NoiseSource
from ebwm_scale.training.optimizer import new_optimizer
from ebwm_scale.world_model import WorldModel

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {"energy": "quickstart.yaml", "baseline": "quickstart_baseline.yaml"}
TITLES = {"energy": "energy model", "baseline": "Transformer++"}
OPTIMIZERS = ("adamw", "muon")
TWO_RATES = "muon, two rates"
NAMES = {"adamw": "AdamW", "muon": "Muon", TWO_RATES: "Muon, two rates"}
RATES = (0.003, 0.006, 0.012, 0.024)
SHARE = 2  # tuning runs have half of the steps
SEEDS = (0, 1, 2)
ALL_SAMPLES = 10**6  # more than any validation split of a quick start

Row = dict[str, Any]


@command
def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--runs", type=Path, default=Path("runs/optimizers"))
    parser.add_argument("--steps", type=int, default=None, help="default: the configuration's")
    parser.add_argument(
        "--most-runs",
        type=int,
        default=None,
        help="leave with exit code 75 before further ones; repeat the command",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--timed-steps", type=int, default=30)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if len(options.seeds) not in STUDENT_T:
        raise UserError(
            f"--seeds: {len(options.seeds)} seeds; an interval is made of "
            f"{min(STUDENT_T)} to {max(STUDENT_T)}"
        )
    study = Study(options.output, options.manifest, options.runs, options.most_runs)
    try:
        follow(study, options)
    except EnoughRuns:
        return EXIT_RUN_AGAIN
    found = summary(study.rows)
    text = json.dumps(provenance() | found, indent=1) + "\n"
    options.output.with_suffix(".json").write_text(text, encoding="utf-8")
    print("\n".join(table(found)))
    return 0


def follow(study: Study, options: argparse.Namespace) -> None:
    """Every run that is asked for and is not there."""
    for kind in options.kinds:
        steps = options.steps or load_config(ROOT / "configs" / CONFIGS[kind]).train.max_steps
        for optimizer in options.optimizers:
            best = study.tune(kind, optimizer, max(1, steps // SHARE))
            for seed in options.seeds:
                study.run("seeds", kind, optimizer, best, seed, steps)
            if optimizer == "muon":
                of_adamw = study.tune_parts(kind, best, max(1, steps // SHARE))
                for seed in options.seeds:
                    study.run("seeds", kind, optimizer, of_adamw, seed, steps, best)
        if set(options.optimizers) == set(OPTIMIZERS):
            study.time_steps(kind, options.timed_steps)


class EnoughRuns(Exception):
    """So many runs as --most-runs says have been made."""


class Study:
    """The rows of a result file, and what adds to them."""

    def __init__(self, output: Path, manifest: Path, runs: Path, most_runs: int | None = None):
        self.output = output
        self.manifest = manifest
        self.runs = runs
        self.runs_left = math.inf if most_runs is None else most_runs

    @property
    def rows(self) -> list[Row]:
        return list(Rows(self.output))

    def tune(self, kind: str, optimizer: str, steps: int) -> float:
        """The best rate of seed 0: between two that were tried and are worse."""
        return self._best(RATES, lambda rate: self.run("tuning", kind, optimizer, rate, 0, steps))

    def tune_parts(self, kind: str, muon_rate: float, steps: int) -> float:
        """The best rate of what AdamW keeps, at this rate of Muon's matrices."""

        def run(rate: float) -> Row:
            if rate == muon_rate:
                return self.run("tuning", kind, "muon", rate, 0, steps)
            return self.run("parts", kind, "muon", rate, 0, steps, muon_rate)

        return self._best([muon_rate / 2, muon_rate, muon_rate * 2], run)

    def _best(self, start: Sequence[float], run: Callable[[float], Row]) -> float:
        rates = list(start)
        while True:
            losses = {rate: run(rate)["validation_loss"] for rate in rates}
            best = min(losses, key=lambda rate: losses[rate])
            if best == min(rates):
                rates.append(best / 2)
            elif best == max(rates):
                rates.append(best * 2)
            else:
                return best

    def run(
        self,
        phase: str,
        kind: str,
        optimizer: str,
        rate: float,
        seed: int,
        steps: int,
        muon_rate: float | None = None,
    ) -> Row:
        """The row of a training run, which is made if it is not there.

        muon_rate: of Muon's matrices, where `rate` is of what AdamW keeps alone.
        """
        key: Row = {
            "phase": phase,
            "kind": kind,
            "optimizer": optimizer,
            "learning_rate": rate,
            "seed": seed,
            "steps": steps,
            "muon_learning_rate": muon_rate,
        }
        for row in self.rows:
            if all(row.get(name) == value for name, value in key.items()):
                return row
        if self.runs_left <= 0:
            raise EnoughRuns
        self.runs_left -= 1
        return self._add(key | self._train(key))

    def _train(self, key: Row) -> Row:
        folder = self.runs / "-".join(str(value) for value in key.values())
        shutil.rmtree(folder, ignore_errors=True)  # of a study that was ended within it
        settings = [
            f"data.manifest={self.manifest}",
            f"optimizer.name={key['optimizer']}",
            f"optimizer.learning_rate={key['learning_rate']}",
            f"optimizer.muon_learning_rate={key['muon_learning_rate'] or 'null'}",
            f"train.seed={key['seed']}",
            f"train.max_steps={key['steps']}",
            f"evaluation.every_steps={key['steps']}",
            "checkpoint.every_steps=0",
        ]
        if key["phase"] == "seeds":
            settings.append(f"evaluation.max_samples={ALL_SAMPLES}")
        config = ROOT / "configs" / CONFIGS[key["kind"]]
        words = [str(ROOT / "ebwm_scale" / "train.py"), "--config", str(config)]
        words += ["--run-dir", str(folder), "--set", *settings]
        start, cpu = time.monotonic(), _cpu_of_children()
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
        if done.returncode:
            raise UserError(
                f"{folder}: the run ended with exit code {done.returncode}: "
                f"{(done.stderr or done.stdout).strip()[-300:]}; mend it and repeat the command"
            )
        rows = list(Rows(folder / "metrics.jsonl"))
        (validation,) = [row for row in rows if row.get("split") == "validation"]
        return {
            "validation_loss": validation["loss"],
            "validation_loss_per_step": validation["loss_per_step"],
            "num_tokens": validation["num_tokens"],
            "process_cpu_s": round(_cpu_of_children() - cpu, 1),
            "process_wall_s": round(time.monotonic() - start, 1),
            "threads": os.environ.get("OMP_NUM_THREADS"),
        }

    def time_steps(self, kind: str, count: int) -> Row:
        """The row of what a step of each optimizer takes, on random tokens."""
        for row in self.rows:
            if row["phase"] == "cost" and row["kind"] == kind:
                return row
        flush_denormals()
        steppers = {name: Stepper(kind, name) for name in OPTIMIZERS}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in OPTIMIZERS}
        for stepper in steppers.values():
            stepper.step()
        for _ in range(count):
            for name, stepper in steppers.items():
                cpu, wall = time.process_time(), time.perf_counter()
                stepper.step()
                times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
        medians = {
            name: {
                "cpu_s": statistics.median(cpu for cpu, _ in pairs),
                "wall_s": statistics.median(wall for _, wall in pairs),
            }
            for name, pairs in times.items()
        }
        pairs = zip(times["muon"], times["adamw"])
        ratio = statistics.median(muon[0] / adamw[0] for muon, adamw in pairs)
        row = {"phase": "cost", "kind": kind, "timed_steps": count, "per_step": medians}
        return self._add(row | {"cpu_ratio": ratio, "threads": torch.get_num_threads()})

    def _add(self, row: Row) -> Row:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        whole = row | provenance()
        with self.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(whole) + "\n")
        shown = {key: value for key, value in row.items() if not isinstance(value, list)}
        print(json.dumps(shown), flush=True)
        return whole


class Stepper:
    """The quick start's model with an optimizer, and a fixed batch of random tokens."""

    VOCABULARY = 2048
    CONTEXT = 64

    def __init__(self, kind: str, optimizer: str):
        sizes = [f"model.vocabulary_size={self.VOCABULARY}", f"data.context_length={self.CONTEXT}"]
        config: Config = load_config(
            ROOT / "configs" / CONFIGS[kind],
            [*sizes, f"optimizer.name={optimizer}", "optimizer.muon_learning_rate=null"],
        )
        torch.manual_seed(0)
        self.model = WorldModel(config)
        self.optimizer = new_optimizer(self.model, config)
        self.clip = config.optimizer.gradient_clipping
        shape = (config.train.global_batch_size, self.CONTEXT + 1)
        self.tokens = torch.randint(self.VOCABULARY, shape)
        self.sample_ids = torch.arange(shape[0])
        self.count = 0

    def step(self) -> None:
        output = self.model(
            self.tokens[:, :-1],
            self.tokens[:, 1:],
            sample_ids=self.sample_ids,
            source=NoiseSource(0, self.count),
        )
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.count += 1


def summary(rows: Sequence[Row]) -> Row:
    """By kind: what is complete of rates, seeds and cost, and the difference that Muon makes."""
    result: Row = {}
    for kind in CONFIGS:
        of_kind = [row for row in rows if row["kind"] == kind]
        optimizers = {}
        for name in NAMES:
            mine = [row for row in of_kind if _name_of(row) == name]
            tuning = {
                str(row["learning_rate"]): row["validation_loss"]
                for row in sorted(mine, key=lambda row: row["learning_rate"])
                if row["phase"] in ("tuning", "parts")
            }
            seeds = {row["seed"]: row for row in mine if row["phase"] == "seeds"}
            if seeds:
                first = next(iter(seeds.values()))
                losses = {str(seed): row["validation_loss"] for seed, row in sorted(seeds.items())}
                optimizers[name] = {
                    "tuning": tuning,
                    "learning_rate": first["learning_rate"],
                    "muon_learning_rate": first.get("muon_learning_rate"),
                    "seeds": losses,
                    "mean": statistics.fmean(losses.values()),
                }
        if set(OPTIMIZERS) <= set(optimizers):
            result[kind] = dict(optimizers)
            for name in optimizers.keys() - {"adamw"}:
                mine, adamw = (optimizers[of]["seeds"] for of in (name, "adamw"))
                gain = seed_interval([mine[seed] - adamw[seed] for seed in mine if seed in adamw])
                result[kind][name] |= {"minus_adamw": gain}
            for row in of_kind:
                if row["phase"] == "cost":
                    result[kind]["cost"] = {key: row[key] for key in ("per_step", "cpu_ratio")}
    return result


def table(found: Row) -> list[str]:
    """The summary as lines of Markdown, for docs/recipes.md."""
    lines = [
        "| | best rate | losses of the seeds | mean | Muon's minus AdamW's, 95 % | CPU ms a step |",
        "|---|---|---|---|---|---|",
    ]
    for kind, of_kind in found.items():
        for name in NAMES:
            if name not in of_kind:
                continue
            mine = of_kind[name]
            gain = ""
            if name != "adamw":
                numbers = mine["minus_adamw"]
                mean, low, high = (f"{numbers[key]:+.3f}" for key in ("mean", "low", "high"))
                gain = f"{mean} [{low}, {high}]"
            cost = ""
            if "cost" in of_kind and name in OPTIMIZERS:
                cost = f"{1000 * of_kind['cost']['per_step'][name]['cpu_s']:.0f}"
            losses = " / ".join(f"{loss:.3f}" for loss in mine["seeds"].values())
            title = f"{TITLES[kind]}, {NAMES[name]}"
            rate = f"{mine['learning_rate']:g}"
            if mine["muon_learning_rate"] is not None:
                rate = f"{mine['muon_learning_rate']:g}, {rate}"
            cells = (title, rate, losses, f"{mine['mean']:.3f}", gain, cost)
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _name_of(row: Row) -> str | None:
    """Which of NAMES a row is of; None of a row of cost."""
    return TWO_RATES if row.get("muon_learning_rate") is not None else row.get("optimizer")


def _cpu_of_children() -> float:
    """User and system seconds of the processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    sys.exit(main())
