"""What the closed-form gradient of a candidate is worth beside autograd on the same cached keys.

    python tools/bench/closed_form.py [--size xs] [--positions 64 256] [--output FILE]

One refinement step of one candidate (energy and dE/d candidate), given a prefilled cache:
`closed_form` is model/closed_form.py; `autograd` runs the training blocks on the same keys and
values and asks torch.autograd.grad. Median seconds of interleaved repetitions in one process;
weights are random. Prints one JSON line per number of positions.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import ebwm_scale  # noqa: F401 (before torch is loaded: how its threads wait)

# isort: split

import torch

from ebwm_scale.config.load import load_config
from ebwm_scale.core.arguments import ArgumentParser
from ebwm_scale.core.numerics import flush_denormals
from ebwm_scale.core.provenance import provenance
from ebwm_scale.model.kv_cache import KVCache
from ebwm_scale.world_model import WorldModel


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="xs")
    parser.add_argument("--positions", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    flush_denormals()
    rows = []
    for positions in arguments.positions:
        rows.append(compare(arguments.size, positions, arguments.repetitions))
        print(json.dumps(rows[-1]), flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(provenance() | {"rows": rows}, indent=1) + "\n")
    return 0


def compare(size: str, positions: int, repetitions: int) -> dict:
    """Median seconds of both ways at the end of `positions` observed positions."""
    torch.manual_seed(0)
    overrides = [f"model.size={size}", "model.vocabulary_size=64"]
    overrides.append(f"data.context_length={positions}")
    model = WorldModel(load_config(None, overrides)).eval()
    network = model.network
    observed = torch.randn(1, positions, model.config.model.width)
    candidate = torch.randn(1, 1, model.config.model.width)

    cache = KVCache(network, positions)
    cache.prefill(observed, torch.tensor([positions]))
    context = network.encode_context(observed.detach())
    context = context.map(lambda tensor: tensor.detach())
    # The last position's candidate sees all keys.
    context = context.visible_to(slice(positions - 1, positions))

    def closed_form() -> torch.Tensor:
        return cache.get(0).energy_and_gradient(candidate, 0)[1]

    def autograd() -> torch.Tensor:
        leaf = candidate.clone().requires_grad_()
        energy = network.energy(leaf, context, 0)
        return torch.autograd.grad(energy.sum(), leaf)[0]

    difference = (closed_form() - autograd()).norm() / autograd().norm()
    seconds = {"closed_form": [], "autograd": []}
    for _ in range(repetitions):
        for name, run in (("closed_form", closed_form), ("autograd", autograd)):
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "size": size,
        "positions": positions,
        "threads": torch.get_num_threads(),
        "relative_difference": float(difference),
        **{f"{name}_s": value for name, value in medians.items()},
        "autograd_over_closed_form": medians["autograd"] / medians["closed_form"],
    }


if __name__ == "__main__":
    raise SystemExit(main())
