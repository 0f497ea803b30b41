"""The planner beside what was measured: every step time in results/bench_step_*.json.

    python tools/check_planner.py [--output results/planner.json]

Each row: the measured seconds of a step on two CPU cores, and what ebwm_scale/planning/planner.py
predicts for the machine that the file names.
"""

from __future__ import annotations

import json
import shlex
import statistics
from pathlib import Path

from ebwm_scale.config.load import load_config
from ebwm_scale.core.arguments import ArgumentParser
from ebwm_scale.core.provenance import provenance
from ebwm_scale.planning.hardware import MACHINES
from ebwm_scale.planning.planner import compute_seconds

RESULTS = Path(__file__).resolve().parents[1] / "results"


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    rows = checked()
    ratios = [row["seconds_predicted"] / row["seconds_measured"] for row in rows]
    summary = {
        "rows": len(ratios),
        "median": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }
    for row in rows:
        print(json.dumps(row))
    print(json.dumps({"predicted over measured": summary}))
    if options.output:
        options.output.write_text(
            json.dumps(provenance() | {"predicted_over_measured": summary, "rows": rows}, indent=1)
            + "\n"
        )
    return 0


def checked() -> list[dict]:
    """One row per measured step."""
    rows = []
    for path in sorted(RESULTS.glob("bench_step_*.json")):
        content = json.loads(path.read_text())
        machine = MACHINES["cpu-epyc" if "EPYC" in content["machine"] else "cpu-xeon"]
        for run in content["runs"]:
            result, command = run["result"], shlex.split(run["command"])
            overrides = command[command.index("--set") + 1 :] if "--set" in command else []
            config = load_config(
                None,
                [
                    f"model.kind={result['model']}",
                    f"model.size={result['size']}",
                    f"model.vocabulary_size={result['vocabulary']}",
                    f"model.conditioning={result['conditioning']}",
                    f"data.context_length={result['sequence']}",
                    f"train.global_batch_size={result['batch']}",
                    f"train.precision={result['precision']}",
                    f"refinement.num_steps={result['num_refinement_steps']}",
                    *overrides,
                ],
            )
            rows.append(
                {
                    "file": path.name,
                    "machine": machine.name,
                    "command": run["command"],
                    "seconds_measured": result["wall_s"],
                    "seconds_predicted": compute_seconds(config, machine, samples=result["batch"]),
                }
            )
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
