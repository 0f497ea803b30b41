"""What waiting threads cost: an energy model trained with OpenMP threads that spin for a moment and
then sleep (passive: what ebwm_scale sets), that sleep at once (sleeping) and that spin (active,
near to the usual default), alone and beside other work.

    python tools/bench_waiting.py data/sample-64/manifest.json --output results/waiting_threads.json
        [--config configs/quickstart.yaml] [--steps 40] [--threads 2] [--others 2] [--rounds 3]
        [--spins 1000 20000 ..] [--set model.size=xxs ..]

--spins adds threads that spin longer or shorter than ebwm_scale's before they sleep. The others
are processes of this tool that only count; start with an otherwise idle machine. Runs take turns:
passive, sleeping, active, and so on, `--rounds` times alone, then beside the others. Seconds are
those of whole runs, start and end included, by the clock and of CPU. All runs have the same losses,
or the tool says which have not.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ebwm_scale
from ebwm_scale.core.arguments import ArgumentParser, command
from ebwm_scale.core.errors import UserError
from ebwm_scale.core.provenance import provenance
from ebwm_scale.core.rows import Rows

ROOT = Path(__file__).resolve().parent.parent
POLICIES = {
    "passive": {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": ebwm_scale.SPINS},
    "sleeping": {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"},
    "active": {"OMP_WAIT_POLICY": "active"},
}
COUNT = "while True: pass"


@command
def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("manifest", type=Path)
    parser.add_argument(
        "--config", type=Path, default=ROOT / "configs" / "quickstart.yaml", help="what is trained"
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2, help="OMP_NUM_THREADS of a run")
    parser.add_argument("--others", type=int, default=2, help="processes beside it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--spins", type=int, nargs="+", default=[], help="further spin counts")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="SECTION.KEY=VALUE", help="further configuration"
    )
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.policies = dict(POLICIES)
    for spins in options.spins:
        policy = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": str(spins)}
        options.policies[f"spins_{spins}"] = policy
    result: dict[str, Any] = {
        key: getattr(options, key) for key in ("steps", "threads", "others", "rounds", "set")
    }
    result["config"] = options.config.name
    result["spins"] = ebwm_scale.SPINS
    losses: dict[str, list[float]] = {}
    for place, num_others in (("alone", 0), ("beside", options.others)):
        with busy_processes(num_others):
            measured = rounds(options, place, losses)
        result[place] = medians(measured)
    if len({tuple(values) for values in losses.values()}) > 1:
        raise UserError(f"the losses of these runs differ, nothing is written: {losses}")
    text = json.dumps(provenance() | result, indent=1) + "\n"
    options.output.write_text(text, encoding="utf-8")
    print(text, end="")
    return 0


@contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """So many processes that never wait, until the block ends."""
    others = [subprocess.Popen([sys.executable, "-c", COUNT]) for _ in range(number)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def rounds(
    options: argparse.Namespace, place: str, losses: dict[str, list[float]]
) -> dict[str, list[dict[str, float]]]:
    """Seconds of each run by policy, in turns; `losses` gets those of every run."""
    measured: dict[str, list[dict[str, float]]] = {policy: [] for policy in options.policies}
    for number in range(options.rounds):
        for policy in options.policies:
            seconds, of_run = train(options, policy)
            measured[policy].append(seconds)
            losses[f"{place}, {policy}, round {number}"] = of_run
    return measured


def train(options: argparse.Namespace, policy: str) -> tuple[dict[str, float], list[float]]:
    """({"wall_s", "cpu_s"} of a whole run, its training losses)."""
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    environment.pop("GOMP_SPINCOUNT", None)  # ours, where this tool itself has it
    environment |= options.policies[policy]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = [sys.executable, str(ROOT / "ebwm_scale" / "train.py")]
        words += ["--config", str(options.config), "--run-dir", str(run)]
        words += ["--set", f"data.manifest={options.manifest}", "logging.every_steps=1"]
        words += options.set
        words += [f"train.max_steps={options.steps}", f"evaluation.every_steps={options.steps}"]
        words += ["checkpoint.every_steps=0"]
        start, cpu = time.monotonic(), cpu_of_children()
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        seconds = {"wall_s": time.monotonic() - start, "cpu_s": cpu_of_children() - cpu}
        if done.returncode:
            raise UserError(
                f"a run ended with exit code {done.returncode}: {done.stderr.strip()[-300:]}"
            )
        rows = [row for row in Rows(run / "metrics.jsonl") if row.get("split") is None]
    return seconds, [row["loss"] for row in rows]


def cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def medians(measured: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """By policy, and how many times as much as `passive` the others take, paired by round."""
    result: dict[str, Any] = {
        policy: {key: statistics.median(run[key] for run in runs) for key in ("wall_s", "cpu_s")}
        for policy, runs in measured.items()
    }
    for policy in measured.keys() - {"passive"}:
        pairs = list(zip(measured[policy], measured["passive"]))
        result[f"{policy}_over_passive"] = {
            key: statistics.median(other[key] / ours[key] for other, ours in pairs)
            for key in ("wall_s", "cpu_s")
        }
    return result


if __name__ == "__main__":
    raise SystemExit(main())
