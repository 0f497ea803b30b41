"""What each refinement step is worth in every run of a sweep over recipes: held-out losses after
each step, with paired intervals.

    python tools/study_recipes.py runs/recipes [--max-samples 256] [--steps 8]
        [--against one-step] --output results/recipes.json

Per run: the loss after 0, 1, .. steps (beyond the trained number: thinking on, in the last
landscape), the gain of each step over the one before, and of the last trained step over the run
named by --against, both paired by sample. 95 % intervals from a bootstrap over samples of the
validation split: they say how sure a difference is on these texts, not how it varies over seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import ebwm_scale  # noqa: F401 (before torch is loaded: how its threads wait)

# isort: split

import torch

from ebwm_scale.checkpoint.load import load_checkpoint
from ebwm_scale.core.arguments import ArgumentParser, command
from ebwm_scale.core.numerics import flush_denormals
from ebwm_scale.core.provenance import provenance
from ebwm_scale.data.format.shards import open_split
from ebwm_scale.data.loading.batches import validation_batches
from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.evaluation.bootstrap import bootstrap_ci
from ebwm_scale.evaluation.scaling_laws import read_run
from ebwm_scale.inference.scoring import last_states
from ebwm_scale.inference.thinking import ThinkingConfig
from ebwm_scale.refinement.loop import refine
from ebwm_scale.refinement.noise import EVALUATION_STEP, NoiseSource
from ebwm_scale.refinement.sampling import TrainingNoise


@command
def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--max-samples", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument(
        "--steps", type=int, default=8, help="thinking up to this many (default %(default)s)"
    )
    parser.add_argument("--against", default="one-step", metavar="RECIPE")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    flush_denormals()
    try:
        sweep = json.loads((options.sweep / "sweep.json").read_text())
    except OSError as error:
        print(f"{options.sweep}: no sweep: {error}", file=sys.stderr)
        return 2
    rows, errors, missing = [], {}, []
    for name, labels in zip(sweep["runs"], sweep["labels"]):
        run = read_run(options.sweep / name)
        if run is None:
            missing.append(name)
            continue
        row, per_sample = measure(options.sweep / name, options)
        key = labels["recipe"] + (f", seed {labels['seed']}" if "seed" in labels else "")
        errors[key] = per_sample
        rows.append(
            labels
            | row
            | {
                "parameters": run["parameters"],
                "tokens": run["tokens"],
                "flops": run["flops"],
                "step_time_s": run["step_time_s"],
            }
        )
        print(
            key,
            " -> ".join(
                f"{point['mean']:.4f}" for point in row["losses"][: row["trained_steps"] + 1]
            ),
            flush=True,
        )
    for row in rows:
        seed = f", seed {row['seed']}" if "seed" in row else ""
        base = errors.get(options.against + seed)
        if base is not None and row["recipe"] != options.against:
            row[f"gain_over_{options.against}"] = bootstrap_ci(base - errors[row["recipe"] + seed])
    options.output.write_text(
        json.dumps(
            provenance()
            | {
                "sweep": {key: sweep[key] for key in ("sweep", "file")},
                "missing": missing,
                "rows": rows,
            },
            indent=1,
        )
        + "\n"
    )
    print(
        f"{options.output}: {len(rows)} runs"
        + (f"; not finished: {', '.join(missing)}" if missing else "")
    )
    return 0


@torch.no_grad()
def measure(run: Path, options: argparse.Namespace) -> tuple[dict, torch.Tensor]:
    """(row, loss per sample after the last trained step)."""
    model, config = load_checkpoint(run)
    split = open_split(config.data.manifest, "validation", verify="sizes")
    observe, rules, trained = (
        Observation(split.manifest, "cpu"),
        config.refinement,
        config.refinement.num_steps,
    )
    count = max(options.steps, trained)
    losses: list[list[torch.Tensor]] = []
    for batch in validation_batches(
        split,
        context_length=config.data.context_length,
        batch_size=options.batch_size,
        max_samples=options.max_samples,
        rank=0,
        world_size=1,
    ):
        observed, targets = observe(batch.sequences)
        found: list[torch.Tensor] = []
        score = lambda state: found.append(
            criterion(model, state.view(*observed.shape[:2], -1), targets)
        )
        if config.model.kind == "baseline":
            score(last_states(model, observed, ThinkingConfig()))
        else:
            draws = TrainingNoise(
                NoiseSource(config.train.seed, EVALUATION_STEP),
                rules,
                batch.sample_ids,
                (*observed.shape[:2], model.state_size),
                kind=config.state.initial,
                randomize=False,
                last_observed=observed if config.state.kind == "embedding" else None,
            )
            score(draws.initial_state())
            refine(
                model,
                model.embed_observed(observed),
                None,
                config=rules,
                landscapes=model.landscapes(count),
                noise=draws,
                training=False,
                record=lambda step: score(step.state),
            )
        losses.append(found)
    curve = [torch.cat(parts) for parts in zip(*losses)]
    if config.model.kind == "baseline":
        return {
            "trained_steps": 0,
            "losses": [{"num_steps": 0} | bootstrap_ci(curve[0])],
            "gains": [],
        }, curve[0]
    return {
        "trained_steps": trained,
        "losses": [{"num_steps": n} | bootstrap_ci(values) for n, values in enumerate(curve)],
        "gains": [
            {"step": n + 1} | bootstrap_ci(before - after)
            for n, (before, after) in enumerate(itertools.pairwise(curve))
        ],
    }, curve[trained]


def criterion(model, state: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(B,) mean loss of each sample."""
    if model.config.model.kind == "baseline":
        if model.config.state.kind == "embedding":
            return torch.nn.functional.smooth_l1_loss(state, targets, reduction="none").mean((1, 2))
        return (
            torch.nn.functional.cross_entropy(
                state.flatten(0, 1), targets.flatten(), reduction="none"
            )
            .view(targets.shape)
            .mean(1)
        )
    return model.state_space().loss(state, targets, reduction="none").mean(1)


if __name__ == "__main__":
    raise SystemExit(main())
