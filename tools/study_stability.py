"""What makes refinement steps beyond the trained ones do no harm? One small task, many recipes.

    python tools/study_stability.py [--forms NAME ..] [--seeds 33 1 2] [--output FILE]

A strip of 12 cells has walls and a start; asked is which free cells can be reached, that is the
free cells around the start. All cells are one group under one energy, one layer wide 24. From the
second step on a model with a workspace solves most strips, after one step a quarter: what the steps
hand on matters. Models are trained in memory on fresh strips. Loss (nats per scored cell) and the
share of solved strips are measured on 512 others, up to four times the trained number of steps.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import ebwm_scale  # noqa: F401 (before torch is loaded: how its threads wait)

# isort: split

import torch
from torch import Tensor
from torch.nn import functional as F

from ebwm_kernels.vocabulary.softmax_cross_entropy import IGNORE
from ebwm_scale.config.load import config_from_dict
from ebwm_scale.core.arguments import ArgumentParser
from ebwm_scale.core.numerics import flush_denormals
from ebwm_scale.core.provenance import provenance
from ebwm_scale.evaluation.bootstrap import bootstrap_ci, share_ci
from ebwm_scale.evaluation.step_spectrum import step_spectrum
from ebwm_scale.refinement.loop import refine
from ebwm_scale.refinement.noise import EVALUATION_STEP, NoiseSource
from ebwm_scale.refinement.sampling import TrainingNoise
from ebwm_scale.training.schedule import refinement_point
from ebwm_scale.world_model import WorldModel

CELLS, WALLS, BATCH, WIDTH = 12, 0.25, 24, 24
FREE, WALL, START = 0, 1, 2  # observed; targets are 0 (not reached) and 1

DRAWN = {"num_steps": 8, "min_num_steps": 1, "backprop_steps": 3}
FORMS = {  # name -> refinement section
    "4 steps": {},
    "4 steps, decay 0.3": {"decay": 0.3},
    "4 steps, damping 1": {"damping": 1.0},
    "4 steps, damping 1.5": {"damping": 1.5},
    "4 steps, damping 1, decay 0.3": {"damping": 1.0, "decay": 0.3},
    "drawn 1 to 8, graph through 3": DRAWN,
    "drawn 1 to 8, graph through 3, decay 0.3": DRAWN | {"decay": 0.3},
    "drawn 1 to 8, graph through 3, damping 1": DRAWN | {"damping": 1.0},
}


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--forms", nargs="+", default=list(FORMS), choices=list(FORMS), metavar="FORM"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[33, 1, 2])
    parser.add_argument(
        "--steps", type=int, default=800, help="training steps (default %(default)s)"
    )
    parser.add_argument("--rate", type=float, default=0.004)
    parser.add_argument(
        "--output",
        type=Path,
        default=None,
        help="lines are added to what is there; runs that are there are not repeated",
    )
    options = parser.parse_args()
    flush_denormals()
    for form in options.forms:
        for seed in options.seeds:
            key = {"form": form, "seed": seed, "steps": options.steps, "rate": options.rate}
            if any(key.items() <= row.items() for row in rows_in(options.output)):
                continue
            start = time.process_time()
            model = train(form, seed, options.steps, options.rate)
            row = key | {"training_cpu_s": round(time.process_time() - start, 1)}
            row |= measure(model, seed)
            shown = " ".join(
                f"{p['num_steps']}: {p['loss']['mean']:.3f} ({p['solved']['mean']:.0%})"
                for p in row["after"]
            )
            print(form, seed, shown, f"{row['training_cpu_s']} s", flush=True)
            if options.output:
                rows = [*rows_in(options.output), row]
                options.output.write_text(
                    json.dumps(provenance() | {"rows": rows}, indent=1) + "\n"
                )
    return 0


def rows_in(output: Path | None) -> list[dict]:
    if output is None or not output.exists():
        return []
    return json.loads(output.read_text())["rows"]


def strips(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(observed, targets), (B, CELLS) each; walls are not scored."""
    generator = torch.Generator().manual_seed(seed)
    walls = torch.rand(count, CELLS, generator=generator) < WALLS
    start = torch.randint(CELLS, (count, 1), generator=generator)
    walls.scatter_(1, start, False)
    # A cell is reached where no wall lies between it and the start, nor on it.
    before = walls.long().cumsum(1)
    reached = (before == before.gather(1, start)) & ~walls
    observed = torch.where(walls, WALL, FREE).scatter(1, start, START)
    return observed, torch.where(walls, IGNORE, reached.long())


def model_of(form: str, seed: int, steps: int) -> WorldModel:
    torch.manual_seed(seed)
    sections = {
        "model": {
            "num_layers": 1,
            "width": WIDTH,
            "num_heads": 2,
            "feed_forward_width": 2 * WIDTH,
            "vocabulary_size": 3,
            "predicted_input": "anchored",
            "energy_head": ["linear", "bilinear"],
        },
        "state": {"initial": "zeros", "map_scale": 3.0, "workspace": WIDTH},
        "refinement": {
            "num_steps": 4,
            "step_size": 10.0,
            "workspace_step_size": 10.0,
            "landscapes": "one",
            "graph": "full",
            "loss": "every",
            "update": "mirror",
            **FORMS[form],
        },
        "data": {"context_length": CELLS, "group_size": CELLS},
        "train": {"max_steps": steps, "seed": seed, "global_batch_size": BATCH},
    }
    return WorldModel(config_from_dict(sections))


def train(form: str, seed: int, steps: int, rate: float) -> WorldModel:
    """A model in eval mode."""
    model = model_of(form, seed, steps)
    sizes = {"step_size": model.step_size, "workspace_step_size": model.workspace_step_size}
    rest = [p for name, p in model.named_parameters() if name not in sizes]
    groups = [{"params": rest}]
    for parameter in sizes.values():
        rate_of_size = 3 * parameter.item() * rate
        groups += [{"params": [parameter], "lr": rate_of_size, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1, (k + 1) / 100) * (0.55 + 0.45 * math.cos(math.pi * k / steps))
    )
    for k in range(steps):
        observed, targets = strips(BATCH, seed=10**6 * seed + k)
        source = NoiseSource(seed, k)
        point = refinement_point(model.config, k, source)
        loss = model(
            observed,
            targets,
            sample_ids=torch.arange(BATCH) + k * BATCH,
            source=source,
            num_steps=point.num_steps,
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


@torch.no_grad()
def measure(model: WorldModel, seed: int, samples: int = 512) -> dict:
    """Loss and share of solved strips after 1, 2, 3, 4, 8, .. steps, up to four times the trained
    ones; differences to the trained number of steps are paired by strip.
    """
    observed, targets = strips(samples, seed=7)
    config = model.config.refinement
    trained = config.num_steps
    scored = targets != IGNORE
    losses, solved = [], []

    def score(state: Tensor) -> None:
        logits = state.view(*targets.shape, -1)
        loss = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none"
        )
        losses.append(loss.view(targets.shape).double().sum(1) / scored.sum(1))
        solved.append(((logits.argmax(-1) == targets) | ~scored).all(1).double())

    draws = TrainingNoise(
        NoiseSource(seed, EVALUATION_STEP),
        config,
        torch.arange(samples),
        (samples, CELLS, model.state_size),
        kind="zeros",
        randomize=False,
        workspace=model.config.state.workspace,
    )
    refine(
        model,
        model.embed_observed(observed),
        None,
        config=config,
        landscapes=model.landscapes(4 * trained),
        noise=draws,
        training=False,
        record=lambda step: score(step.state),
    )
    after = []
    for number in sorted({1, 2, 3, 4, 8, 16, 32, 64, trained, 4 * trained}):
        if number > 4 * trained:
            continue
        point = {
            "num_steps": number,
            "loss": bootstrap_ci(losses[number - 1]),
            "solved": share_ci(solved[number - 1]),
        }
        if number != trained:
            fall = losses[trained - 1] - losses[number - 1]
            rise = solved[number - 1] - solved[trained - 1]
            point["fall_of_loss_from_trained"] = bootstrap_ci(fall)
            point["rise_of_solved_from_trained"] = bootstrap_ci(rise)
        after.append(point)
    batches = [(torch.arange(samples), observed)]
    spectrum = step_spectrum(model, batches, steps=(trained, 4 * trained), seed=seed)
    return {"trained_steps": trained, "after": after, "step_spectrum": spectrum}


if __name__ == "__main__":
    raise SystemExit(main())
