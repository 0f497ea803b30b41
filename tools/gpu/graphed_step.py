"""Training steps replayed as CUDA graphs beside eager ones: the same gradients, and how long each
takes.

    python tools/gpu/graphed_step.py [--output graphed_step.jsonl] [--size xxs small medium]

One JSON line per size, written as it is known: batches that were replayed, the largest difference
of a gradient over its largest number, and medians of milliseconds of a step without its optimizer.
Exit code 1 where nothing was replayed, or gradients differ. Not run yet: there was no GPU.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded

import torch
from json_lines import JsonLines

from ebwm_scale.config.load import load_config
from ebwm_scale.core.arguments import ArgumentParser
from ebwm_scale.refinement.graphed import GraphedRefinement
from ebwm_scale.refinement.noise import NoiseSource
from ebwm_scale.world_model import WorldModel

LIMIT = 0.02  # of bf16: sums whose order a GPU may choose, rounded once
BATCHES = 8


def compared(
    options: list[str],
    batch: int,
    device: str,
    dtype: torch.dtype,
    graphs: Callable[[Callable[[str], None]], GraphedRefinement],
) -> dict:
    """A row of a configuration; graphs: makes the recordings, given what they may say."""
    said: list[str] = []
    models = {}
    for name, setting in (("eager", "false"), ("graphed", "true")):
        torch.manual_seed(0)
        config = load_config(None, [*options, f"refinement.cuda_graph={setting}"])
        models[name] = WorldModel(config).to(device, dtype)
    models["graphed"].graphs = graphs(said.append)
    milliseconds: dict[str, list[float]] = {"eager": [], "graphed": []}
    worst = 0.0
    for number in range(BATCHES):
        gradients = {}
        for name, model in models.items():
            milliseconds[name].append(timed_step(model, number, batch, device))
            gradients[name] = [p.grad for p in model.parameters()]
            model.zero_grad(set_to_none=True)
        worst = max(worst, largest_difference(gradients["graphed"], gradients["eager"]))
    recorded = models["graphed"].graphs
    row = {"replays": recorded.replays, "said": said, "difference": worst}
    row["ok"] = recorded.replays > 0 and worst <= LIMIT
    for name, times in milliseconds.items():
        row[f"{name}_ms"] = statistics.median(times[-recorded.replays :])
    return row


def timed_step(model: WorldModel, number: int, batch: int, device: str) -> float:
    """Milliseconds of one forward and backward; gradients are left in the parameters."""
    length = model.config.data.context_length
    assert length is not None and model.config.model.vocabulary_size is not None
    generator = torch.Generator().manual_seed(number)
    shape = (batch, length + 1)
    stream = torch.randint(model.config.model.vocabulary_size, shape, generator=generator)
    stream = stream.to(device)
    wait(device)
    start = time.perf_counter()
    output = model(
        stream[:, :-1],
        stream[:, 1:],
        sample_ids=torch.arange(batch),
        source=NoiseSource(0, number),
    )
    output.loss.backward()
    wait(device)
    return 1e3 * (time.perf_counter() - start)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def largest_difference(found, expected) -> float:
    worst = 0.0
    for a, b in zip(found, expected):
        scale = b.abs().max().clamp(min=1e-30)
        worst = max(worst, float((a - b).abs().max() / scale))
    return worst


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--size", nargs="+", default=["xxs", "small", "medium"])
    options = parser.parse_args()
    failed = False
    with JsonLines(options.output) as lines:
        for size in options.size:
            given = [
                f"model.size={size}",
                "model.vocabulary_size=50277",
                "data.context_length=1024",
            ]
            row = compared(given, 8, "cuda", torch.bfloat16, lambda say: GraphedRefinement(say=say))
            lines.write({"size": size, "batch": 8, "sequence": 1024, **row})
            failed = failed or not row["ok"]
            torch.cuda.empty_cache()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
