"""What a training step of the forms of docs/recipes.md costs beside Transformer++'s, on one thread.

    python tools/bench/text_forms.py [--forms NAME ..] [--rounds 3] [--steps 60] [--output FILE]

Each measurement is a process of tools/bench_step.py in which steps of both kinds take turns; the
forms take turns too, so that what else a machine does is shared. `cpu_ratio` is the median of the
rounds. Memory is measured without Transformer++ in the same process. Prints one JSON line per form.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from ebwm_scale.core.arguments import ArgumentParser
from ebwm_scale.core.provenance import provenance

BENCH_STEP = Path(__file__).parents[1] / "bench_step.py"
# the quick start's sizes
SIZES = {"size": "4xs", "sequence": 64, "vocabulary": 2048, "batch": 16, "threads": 1}
BASE = [
    "model.predicted_input=anchored",
    "state.initial=zeros",
    "state.map_scale=10",
    "refinement.update=mirror",
    "refinement.step_size=2",
]
SHALLOW = ["model.predicted_layers=1", "refinement.loss=every"]
DIRECT = [*SHALLOW, "model.energy_head=[direct]", "model.own_keys=false"]
# name: (steps, what is set)
FORMS = {
    "two steps through both layers": (2, ["refinement.graph=full", "refinement.loss=last"]),
    "linear, bilinear": (1, [*SHALLOW, "model.energy_head=[linear,bilinear]"]),
    "linear, bilinear; the context alone": (
        1,
        [*SHALLOW, "model.energy_head=[linear,bilinear]", "model.own_keys=false"],
    ),
    "linear, direct; the context alone": (
        1,
        [*SHALLOW, "model.energy_head=[linear,direct]", "model.own_keys=false"],
    ),
    "direct; the context alone": (1, DIRECT),
    "direct; read twice": (1, [*DIRECT, "model.loops=2"]),
    "direct; read three times": (1, [*DIRECT, "model.loops=3"]),
}


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    forms = {name: FORMS[name] for name in arguments.forms}
    ratios: dict[str, list[float]] = {name: [] for name in forms}
    flops = {}
    for _ in range(arguments.rounds):
        for name, (num_steps, options) in forms.items():
            row = measured(num_steps, options, arguments.steps, "--compare", "baseline")
            ratios[name].append(row["cpu_ratio"])
            flops[name] = row["flops_total"]
    baseline = measured(1, [], arguments.steps, "--model", "baseline")
    result = {"transformer++": {"peak_memory_gib": baseline["peak_memory_gib"]}}
    for name, (num_steps, options) in forms.items():
        alone = measured(num_steps, options, arguments.steps)
        result[name] = {
            "cpu_ratio": statistics.median(ratios[name]),
            "cpu_ratios": ratios[name],
            "flops_ratio": flops[name] / baseline["flops_total"],
            "peak_memory_gib": alone["peak_memory_gib"],
            "set": [*BASE, *options, f"refinement.num_steps={num_steps}"],
        }
        print(json.dumps({"form": name, **result[name]}), flush=True)
    if arguments.output:
        about = provenance() | {"load_average_after": round(os.getloadavg()[0], 1)}
        arguments.output.write_text(json.dumps(about | {"forms": result}, indent=1) + "\n")
    return 0


def measured(num_steps: int, options: list[str], steps: int, *more: str) -> dict:
    """The row that tools/bench_step.py prints, with the sum of its FLOPs."""
    is_baseline = "--model" in more
    sizes = [word for key, value in SIZES.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, str(BENCH_STEP), *sizes, "--steps", str(steps), *more]
    command += ["--num-refinement-steps", str(num_steps)]
    if not is_baseline:
        command += ["--set", *BASE, *options]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    output = subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return json.loads(output.splitlines()[-1])


if __name__ == "__main__":
    raise SystemExit(main())
