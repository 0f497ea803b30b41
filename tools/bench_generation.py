"""Tokens per second of generation: with the cache, recomputing the prefix for every token, and
Transformer++ of the same size.

    python tools/bench_generation.py [--size xs] [--tokens 256] [--vocabulary 32000]
        [--num-steps 2] [--output FILE]

One prompt of one token is continued to --tokens; weights are random, greedy choice. "recomputed"
refines every position of the prefix with training's own loop and reads the last; it is timed at
--samples evenly spaced lengths, each by the median of three, and added up over all lengths by the
trapezoid rule. Peak memory is of the growing process, for --num-steps and four times as many.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from pathlib import Path

import ebwm_scale  # noqa: F401 (before torch is loaded: how its threads wait)

# isort: split

import torch

from ebwm_scale.config.load import load_config
from ebwm_scale.core.arguments import ArgumentParser
from ebwm_scale.core.numerics import flush_denormals
from ebwm_scale.core.provenance import provenance
from ebwm_scale.inference.generation import Session
from ebwm_scale.inference.thinking import ThinkingConfig
from ebwm_scale.refinement.loop import refine
from ebwm_scale.refinement.noise import NoiseSource
from ebwm_scale.refinement.sampling import TrainingNoise
from ebwm_scale.world_model import WorldModel


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="xs")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--num-steps", type=int, default=2)
    parser.add_argument(
        "--samples",
        type=int,
        default=5,
        help="prefix lengths at which recomputing is timed (default %(default)s)",
    )
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    flush_denormals()
    rows = {}
    for kind in ("energy", "baseline"):
        torch.manual_seed(0)
        model = WorldModel(
            load_config(
                None,
                [
                    f"model.kind={kind}",
                    f"model.size={arguments.size}",
                    f"model.vocabulary_size={arguments.vocabulary}",
                    "model.predicted_input=anchored",
                    "refinement.step_size=30",
                    f"data.context_length={arguments.tokens}",
                    f"refinement.num_steps={arguments.num_steps}",
                ],
            )
        ).eval()
        rows[kind] = {
            "cached_tokens_per_s": arguments.tokens
            / cached(model, arguments.tokens, arguments.num_steps)
        }
        if kind == "energy":
            seconds = recomputed(model, arguments.tokens, arguments.samples)
            rows[kind]["recomputed_tokens_per_s"] = arguments.tokens / seconds
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            cached(model, 8, 4 * arguments.num_steps)
            rows[kind]["more_peak_memory_mib_with_four_times_the_steps"] = (
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            ) / 1024
    row = {
        "size": arguments.size,
        "tokens": arguments.tokens,
        "vocabulary": arguments.vocabulary,
        "num_steps": arguments.num_steps,
        "threads": torch.get_num_threads(),
        **rows,
        "cached_over_recomputed": rows["energy"]["cached_tokens_per_s"]
        / rows["energy"]["recomputed_tokens_per_s"],
        "baseline_over_energy": rows["baseline"]["cached_tokens_per_s"]
        / rows["energy"]["cached_tokens_per_s"],
    }
    print(json.dumps(row))
    if arguments.output:
        arguments.output.write_text(json.dumps(provenance() | {"rows": [row]}, indent=1) + "\n")
    return 0


def cached(model, tokens: int, num_steps: int) -> float:
    """Seconds for all tokens, prefill included."""
    config = ThinkingConfig(num_steps=num_steps if model.config.model.kind == "energy" else None)
    start = time.perf_counter()
    session = Session(model, [torch.tensor([1])], config, energies=False)
    for _ in range(tokens - 1):
        session.accept(session.predict().state.argmax(-1))
    session.predict()
    return time.perf_counter() - start


@torch.no_grad()
def recomputed(model, tokens: int, samples: int) -> float:
    config = model.config.refinement
    lengths = sorted({round(1 + (tokens - 1) * i / (samples - 1)) for i in range(samples)})
    seconds = []
    for length in lengths:
        prompt, timed = torch.randint(model.config.model.vocabulary_size, (1, length)), []
        for _ in range(3):
            start = time.perf_counter()
            draws = TrainingNoise(
                NoiseSource(0, 0),
                config,
                torch.tensor([0]),
                (1, length, model.state_size),
                kind="random_noise",
                randomize=False,
            )
            refine(
                model,
                model.embed_observed(prompt),
                None,
                config=config,
                landscapes=model.landscapes(config.num_steps),
                noise=draws,
                training=False,
                keep_state=torch.float32,
            )
            timed.append(time.perf_counter() - start)
        seconds.append(statistics.median(timed))
    return (
        sum((b - a) * (s + t) / 2 for a, b, s, t in zip(lengths, lengths[1:], seconds, seconds[1:]))
        + seconds[0]
    )


if __name__ == "__main__":
    sys.exit(main())
