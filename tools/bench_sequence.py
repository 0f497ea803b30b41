"""Memory of a process where 1, 2 and 4 processes share each sample (parallel.sequence).

    python tools/bench_sequence.py [--processes 1 2 4] [--positions 1024]
        [--recipe stepwise full_graph by_block baseline] [--output results/sequence_parallel.json]

One forward and backward of a small model on one sample, in fp32 on the CPU, gloo on loopback.
Prints a JSON line per recipe and number of processes; of each figure the largest of its processes:

    live_mib         peak of bytes in live tensors (planning/live_bytes.py): exact, the same on
                     every machine
    weights_mib      of the weights, which every process has whole
    activations_mib  live_mib without weights and gradients, which every process has whole too
    resident_mib     peak of resident memory over that of the process after a small step
    estimated_mib    planning/memory.py's for the same step without an optimizer
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from ebwm_scale.core.arguments import ArgumentParser
from ebwm_scale.core.provenance import provenance

MIB = 2.0**20
RECIPES = {
    "stepwise": {"model": {"conditioning": "time_embed"}},
    "full_graph": {"refinement": {"graph": "full", "loss": "last"}},
    "by_block": {"refinement": {"graph": "full", "loss": "last", "recompute": "block"}},
    "baseline": {"model": {"kind": "baseline"}},
}
FIGURES = ("live_mib", "weights_mib", "activations_mib", "resident_mib")


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--recipe", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        return measure(arguments.recipe, arguments.positions)
    rows = []
    for processes in arguments.processes:
        rows += measured(processes, arguments.recipe, arguments.positions)
    for row in rows:
        print(json.dumps(row), flush=True)
    if arguments.output:
        found = provenance("deepspeed") | {"rows": rows}
        arguments.output.write_text(json.dumps(found, indent=1))
    return 0


def measured(processes: int, recipes: list[str], positions: int) -> list[dict]:
    """The rows of all recipes, from so many processes."""
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    options = ["--recipe", *recipes, "--positions", str(positions)]
    finished = subprocess.run(
        [sys.executable, *command, __file__, *options],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        timeout=900,
        check=True,
    )
    return [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]


def configuration(recipe: str, sequence: int, positions: int):
    from ebwm_scale.config.load import config_from_dict

    sections = RECIPES[recipe]
    return config_from_dict(
        {
            "model": {
                "num_layers": 4,
                "width": 128,
                "num_heads": 4,
                "vocabulary_size": 2048,
                **sections.get("model", {}),
            },
            "refinement": sections.get("refinement", {}),
            "data": {"context_length": positions},
            "train": {"global_batch_size": 2},  # so that gradients are added up
            "parallel": {"sequence": sequence},
        }
    )


def measure(recipes: list[str], positions: int) -> int:
    """A row per recipe, printed by the first process."""
    import torch

    from ebwm_scale.training.distributed import init_distributed

    world = init_distributed()
    world = replace(world, sequence=world.size)
    for recipe in recipes:
        step(configuration(recipe, world.size, 16), world)  # libraries and sockets are there
        gc.collect()
        forget_peak()
        before = resident("VmRSS")
        config = configuration(recipe, world.size, positions)
        step(config, world)
        figures = {"resident_mib": (resident("VmHWM") - before) / MIB}
        figures |= counted(config, world)
        everyone = [None] * world.size
        if world.size > 1:
            torch.distributed.all_gather_object(everyone, figures)
        else:
            everyone = [figures]
        if world.is_main:
            largest = {name: round(max(of[name] for of in everyone), 2) for name in FIGURES}
            row = {"recipe": recipe, "processes": world.size, "positions": positions}
            row |= largest | {"estimated_mib": round(estimated_mib(config, world.size), 2)}
            print(json.dumps(row), flush=True)
    return 0


def counted(config, world) -> dict[str, float]:
    """What a step has alive at its peak, in MiB."""
    from ebwm_scale.planning.live_bytes import LiveBytes

    live = LiveBytes()
    model = step(config, world, live)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "live_mib": live.peak / MIB,
        "weights_mib": weights / MIB,
        "activations_mib": (live.peak - 2 * weights) / MIB,
    }


def step(config, world, live=None):
    """One forward and backward on gradients that are there already; returns the model."""
    import contextlib

    import torch

    from ebwm_scale.refinement.noise import NoiseSource
    from ebwm_scale.training.sequence_groups import sequence_group
    from ebwm_scale.world_model import WorldModel

    torch.manual_seed(0)
    model = WorldModel(config).train()
    model.sequence = GROUPS.setdefault(world.size, sequence_group(world))
    tokens = torch.randint(config.model.vocabulary_size, (1, config.data.context_length + 1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with live or contextlib.nullcontext():
        if live is not None:
            live.see_now(model.parameters())
            live.see_now(p.grad for p in model.parameters())
        output = model(
            tokens[:, :-1],
            tokens[:, 1:],
            sample_ids=torch.arange(1),
            source=NoiseSource(0, 0),
        )
        output.loss.backward()
    return model


GROUPS: dict = {}  # of this process, made once


def estimated_mib(config, world_size: int) -> float:
    from ebwm_scale.planning.memory import memory_estimate

    estimate = memory_estimate(config, world_size=world_size, micro_batch=1)
    return 1024 * (estimate["total"] - estimate["optimizer"])


def forget_peak() -> None:
    """The peak of resident memory (VmHWM) begins anew from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(key: str) -> int:
    """Bytes of resident memory of this process: now (VmRSS) or at most so far (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}")


if __name__ == "__main__":
    sys.exit(main())
