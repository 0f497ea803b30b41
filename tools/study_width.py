"""Does the best learning rate stay when the width grows? Rates at four widths, energy model and
Transformer++, under both parametrizations (docs/width.md).

    python tools/study_width.py data/width-text/manifest.json --output results/width_transfer.jsonl
    python tools/study_width.py data/width-text/manifest.json --output results/width_transfer.jsonl
        --seeds 1 2 --near-best

Models of two layers are trained in memory by the library's model, optimizer, schedule and data
order, without an engine, on one thread. At the base width the two parametrizations are one model,
so it is trained once. --near-best takes only the best rate of each width in the rows that are
there, and its neighbours. A row per run: what is there is not repeated, so kill it and go on.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import ebwm_scale  # noqa: F401 (before torch is loaded: how its threads wait)

# isort: split

import torch

from ebwm_scale.config.load import load_config
from ebwm_scale.config.resolved import context_length
from ebwm_scale.config.schema import Config
from ebwm_scale.core.arguments import ArgumentParser, command
from ebwm_scale.core.numerics import flush_denormals
from ebwm_scale.core.provenance import provenance
from ebwm_scale.data.format.shards import ShardedSplit, open_split
from ebwm_scale.data.loading.batches import BatchLoader, validation_batches
from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.evaluation.width_transfer import BASE, best_rates, read_rows
from ebwm_scale.refinement.noise import EVALUATION_STEP, NoiseSource
from ebwm_scale.training.optimizer import new_optimizer
from ebwm_scale.training.preflight import fill_from_data
from ebwm_scale.training.schedule import learning_rate
from ebwm_scale.world_model import WorldModel

WIDTHS = (32, 64, 128, 256)
HEAD = 32  # dimensions of a head, at every width
RATES = (0.0025, 0.005, 0.01, 0.02, 0.04)
KINDS = ("baseline", "energy")
PARAMETRIZATIONS = ("standard", "width_scaled")
STEPS, BATCH, WARMUP = 120, 8, 12
HELD_OUT = 256  # blocks
KEYS = ("kind", "parametrization", "width", "rate", "seed")


@command
def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("manifest", type=Path, help="of a text dataset")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[33])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument(
        "--parametrizations", nargs="+", default=list(PARAMETRIZATIONS), choices=PARAMETRIZATIONS
    )
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--steps", type=int, default=STEPS, help="default %(default)s")
    parser.add_argument(
        "--near-best", action="store_true", help="the best rates of the rows, and their neighbours"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    flush_denormals()
    about = provenance()
    if not options.output.exists():
        append(options.output, about | {"what": "held-out loss in nats per token by learning rate"})
    for run in planned(options, read_rows(options.output)):
        if is_there(run, read_rows(options.output)):  # another process may add rows meanwhile
            continue
        start = time.process_time()
        row = run | trained(config_of(run, options.manifest, options.steps))
        row |= {"cpu_s": round(time.process_time() - start, 1), "commit": about["commit"]}
        append(options.output, row)
        print(*(row[key] for key in KEYS), row["loss"], f"{row['cpu_s']} s", flush=True)
    return 0


def planned(options, rows: list[dict]) -> Iterator[dict]:
    """The runs, by KEYS; wide models last."""
    best = best_rates(rows) if options.near_best else {}
    for seed in options.seeds:
        for width in options.widths:
            for kind in options.kinds:
                for parametrization in options.parametrizations:
                    if width == BASE and parametrization != "standard":
                        continue
                    rates = options.rates
                    if options.near_best:
                        place = rates.index(best[kind, parametrization, width])
                        rates = rates[max(0, place - 1) : place + 2]
                    for rate in rates:
                        values = (kind, parametrization, width, rate, seed)
                        yield dict(zip(KEYS, values))


def is_there(run: dict, rows: list[dict]) -> bool:
    return any(all(row[key] == run[key] for key in KEYS) for row in rows)


def append(path: Path, row: dict) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def config_of(run: dict, manifest: Path, steps: int) -> Config:
    """The quick start's recipe at a width; its base is the smallest one."""
    overrides = [
        "model.num_layers=2",
        f"model.kind={run['kind']}",
        f"model.width={run['width']}",
        f"model.num_heads={run['width'] // HEAD}",
        f"optimizer.learning_rate={run['rate']}",
        f"schedule.warmup_steps={min(WARMUP, steps)}",
        f"train.max_steps={steps}",
        f"train.global_batch_size={BATCH}",
        f"train.seed={run['seed']}",
        f"data.manifest={manifest}",
    ]
    if run["parametrization"] == "width_scaled":
        overrides += [
            "model.parametrization=width_scaled",
            f"model.base_width={BASE}",
            f"model.base_num_heads={BASE // HEAD}",
        ]
    return load_config("quickstart", overrides)


def trained(config: Config) -> dict:
    """Losses in nats per token after training; None where they are not finite."""
    split = opened(config, "train")
    manifest = split.manifest
    config = fill_from_data(config, manifest)
    torch.manual_seed(config.train.seed)
    model = WorldModel(config).train()
    optimizer = new_optimizer(model, config)
    observe = Observation(manifest, "cpu")
    loader = BatchLoader(
        split,
        context_length=context_length(config),
        global_batch_size=BATCH,
        micro_batch_size=BATCH,
        rank=0,
        world_size=1,
        seed=config.train.seed,
        window_shards=config.data.window_shards,
        num_workers=0,
    )
    recent: list[float] = []
    for step in range(config.train.max_steps):
        batch = next(loader)
        observed, targets = observe(batch.sequences)
        source = NoiseSource(config.train.seed, step)
        loss = model(observed, targets, sample_ids=batch.sample_ids, source=source).loss
        optimizer.zero_grad()
        loss.backward()
        limit = config.optimizer.gradient_clipping
        torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step) * group["rate_scale"]
        optimizer.step()
        recent = [*recent[-19:], loss.item()]
    training_loss = sum(recent) / len(recent)
    held_out = validation_loss(model, config, observe)
    is_finite = math.isfinite(held_out) and math.isfinite(training_loss)
    return {
        "loss": held_out if is_finite else None,
        "training_loss": training_loss if is_finite else None,
    }


def opened(config: Config, split: str) -> ShardedSplit:
    assert config.data.manifest is not None, "the command names it"
    return open_split(config.data.manifest, split, verify="sizes", report=lambda _: None)


@torch.no_grad()
def validation_loss(model: WorldModel, config: Config, observe: Observation) -> float:
    """Nats per token on HELD_OUT blocks, after the last refinement step."""
    split = opened(config, "validation")
    total, count = 0.0, 0
    model.eval()
    for batch in validation_batches(
        split,
        context_length=context_length(config),
        batch_size=64,
        max_samples=HELD_OUT,
        rank=0,
        world_size=1,
    ):
        observed, targets = observe(batch.sequences)
        source = NoiseSource(config.train.seed, EVALUATION_STEP)
        output = model(observed, targets, sample_ids=batch.sample_ids, source=source)
        total += output.loss_per_step[-1].item() * len(observed)
        count += len(observed)
    return total / count


if __name__ == "__main__":
    raise SystemExit(main())
