"""Do refinement steps replace depth? Chains of look-ups whose length is known, solved by
Transformer++ of several depths and by energy models of several numbers of steps.

    python tools/study_hops.py [--hops 1,2 1,2,3] [--seeds 33 1 2] [--output results/hops.json]

A sequence names a random permutation f of 8 nodes as pairs a f(a) in random order, then asks for
f(f(..x)) of the nodes in random order: x answer x answer ... Only answers are targets. One hop is
an induction head, two layers; each further hop needs the result of the one before. So a predictor
with too little depth cannot answer, and here, unlike in text at toy scale, computing longer has
something to gain. With several numbers of hops (1,2,3) every question says how many it asks for,
drawn evenly, so that easy and hard ones stand side by side. Models are trained in memory on fresh
sequences, two layers deep unless said; the loss is in nats per answer (chance: ln 8 = 2.079),
accuracy that of the most probable token, after every refinement step, also beyond those that were
trained, over all questions and by number of hops.
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

from ebwm_kernels.vocabulary.softmax_cross_entropy import IGNORE
from ebwm_scale.config.load import config_from_dict
from ebwm_scale.core.arguments import ArgumentParser
from ebwm_scale.core.numerics import flush_denormals
from ebwm_scale.core.provenance import provenance
from ebwm_scale.evaluation.bootstrap import bootstrap_ci
from ebwm_scale.refinement.loop import refine
from ebwm_scale.refinement.noise import EVALUATION_STEP, NoiseSource
from ebwm_scale.refinement.sampling import TrainingNoise
from ebwm_scale.world_model import WorldModel

NODES, BATCH = 8, 32
MORE = 4  # steps beyond the trained ones

FORMS = {  # name -> (layers, refinement section or None for Transformer++)
    "transformer++, 2 layers": (2, None),
    "transformer++, 3 layers": (3, None),
    "transformer++, 4 layers": (4, None),
    "1 step": (2, {"num_steps": 1}),
    "1 step, 3 layers": (3, {"num_steps": 1}),
    "2 steps, last": (2, {"num_steps": 2}),
    "3 steps, last": (2, {"num_steps": 3}),
    "2 steps, every": (2, {"num_steps": 2, "loss": "every"}),
    "2 steps, last, truncated": (2, {"num_steps": 2, "graph": "truncate"}),
    "2 steps, every, detached": (2, {"num_steps": 2, "loss": "every", "graph": "detach"}),
}


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--hops",
        type=hops_of,
        nargs="+",
        default=[(1, 2)],
        metavar="N[,N]",
        help="worlds (default 1,2)",
    )
    parser.add_argument(
        "--forms", nargs="+", default=list(FORMS), choices=list(FORMS), metavar="FORM"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[33])
    parser.add_argument(
        "--steps", type=int, default=2000, help="training steps (default %(default)s)"
    )
    parser.add_argument("--rate", type=float, default=0.002)
    parser.add_argument(
        "--output",
        type=Path,
        default=None,
        help="lines are added to what is there; runs that are there are not repeated",
    )
    options = parser.parse_args()
    flush_denormals()
    rows = (
        json.loads(options.output.read_text())["rows"]
        if options.output and options.output.exists()
        else []
    )
    for hops in options.hops:
        for form in options.forms:
            for seed in options.seeds:
                key = {
                    "hops": list(hops),
                    "form": form,
                    "seed": seed,
                    "steps": options.steps,
                    "rate": options.rate,
                }
                if any(key.items() <= row.items() for row in rows):
                    continue
                start = time.process_time()
                model, history = train(form, hops, seed, options.steps, options.rate)
                row = (
                    key
                    | {"training_cpu_s": round(time.process_time() - start, 1), "history": history}
                    | measure(model, hops, seed)
                )
                rows.append(row)
                print(
                    ",".join(map(str, hops)),
                    form,
                    seed,
                    " -> ".join(
                        f"{p['loss']['mean']:.3f} ({p['accuracy']['mean']:.0%})"
                        for p in row["after"]
                    ),
                    f"{row['training_cpu_s']} s",
                    flush=True,
                )
                if options.output:
                    options.output.write_text(
                        json.dumps(provenance() | {"rows": rows}, indent=1) + "\n"
                    )
    return 0


def hops_of(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def vocabulary_of(hops: tuple[int, ...]) -> int:
    """A node as the name of a pair, as what it points to or an answer, and as a question of each
    kind.
    """
    return (2 + len(hops)) * NODES


def sequences(count: int, hops: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(observed (B, S), targets (B, S), asked hops (B, NODES)): tokens; answers where there is one
    to give; how many hops each of them takes.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = lambda: torch.rand(count, NODES, generator=generator).argsort(1)
    points_to, order, asked = shuffled(), shuffled(), shuffled()
    kind = (
        torch.randint(len(hops), asked.shape, generator=generator)
        if len(hops) > 1
        else torch.zeros_like(asked)
    )
    asked_hops, answer = torch.tensor(hops)[kind], asked
    for hop in range(max(hops)):
        answer = torch.where(asked_hops > hop, points_to.gather(1, answer), answer)
    pairs = torch.stack([order, NODES + points_to.gather(1, order)], 2).flatten(1)
    questions = torch.stack([(2 + kind) * NODES + asked, NODES + answer], 2).flatten(1)
    tokens = torch.cat([pairs, questions], 1)
    targets = torch.full_like(tokens, IGNORE)
    targets[:, 2 * NODES :: 2] = NODES + answer
    return tokens[:, :-1], targets[:, :-1], asked_hops


def model_of(form: str, hops: tuple[int, ...], seed: int) -> WorldModel:
    layers, refinement = FORMS[form]
    torch.manual_seed(seed)
    return WorldModel(
        config_from_dict(
            {
                "model": {
                    "kind": "baseline" if refinement is None else "energy",
                    "num_layers": layers,
                    "width": 64,
                    "num_heads": 2,
                    "vocabulary_size": vocabulary_of(hops),
                    "predicted_input": "anchored",
                },
                "state": {"initial": "zeros", "map_scale": 10.0},
                "refinement": {
                    "graph": "full",
                    "loss": "last",
                    "update": "mirror",
                    "step_size": 2.0,
                    "learning_rate_multiplier": 6.0,
                    **(refinement or {}),
                },
                "data": {"context_length": 4 * NODES - 1},
            }
        )
    )


def train(
    form: str, hops: tuple[int, ...], seed: int, steps: int, rate: float
) -> tuple[WorldModel, list]:
    """(model, [[step, loss], ...])."""
    model, history = model_of(form, hops, seed), []
    groups = [{"params": [p for name, p in model.named_parameters() if name != "step_size"]}]
    if model.config.model.kind == "energy":
        groups.append({"params": [model.step_size], "lr": 6 * rate, "weight_decay": 0})
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1, (k + 1) / 100) * (0.55 + 0.45 * math.cos(math.pi * k / steps))
    )
    for k in range(steps):
        observed, targets, _ = sequences(BATCH, hops, seed=10**6 * seed + k)
        loss = model(
            observed,
            targets,
            sample_ids=torch.arange(BATCH) + k * BATCH,
            source=NoiseSource(seed, k),
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), optimizer.zero_grad(), schedule.step()
        if (k + 1) % (steps // 20 or 1) == 0:
            history.append([k + 1, round(loss.item(), 4)])
    return model.eval(), history


@torch.no_grad()
def measure(model: WorldModel, hops: tuple[int, ...], seed: int, samples: int = 256) -> dict:
    """Loss and accuracy per answer after each refinement step (Transformer++: once), on sequences
    of its own.
    """
    observed, targets, asked_hops = sequences(samples, hops, seed=7)
    asked, found = targets[0] != IGNORE, []

    def score(logits: Tensor) -> None:
        logits, right = logits.view(*targets.shape, -1)[:, asked], targets[:, asked]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), right.flatten(), reduction="none"
        ).view(right.shape)
        correct = (logits.argmax(-1) == right).double()
        by_hops = {
            number: {
                "loss": float(loss[asked_hops == number].mean()),
                "accuracy": float(correct[asked_hops == number].mean()),
            }
            for number in hops
        }
        found.append(
            {
                "loss": bootstrap_ci(loss.mean(1)),
                "accuracy": bootstrap_ci(correct.mean(1)),
                "by_hops": by_hops,
            }
        )

    embedded, config = model.embed_observed(observed), model.config.refinement
    if model.config.model.kind == "baseline":
        score(model.output(model.network(embedded)))
        return {"trained_steps": 0, "after": found}
    draws = TrainingNoise(
        NoiseSource(seed, EVALUATION_STEP),
        config,
        torch.arange(samples),
        (*observed.shape, vocabulary_of(hops)),
        kind="zeros",
        randomize=False,
    )
    refine(
        model,
        embedded,
        None,
        config=config,
        landscapes=model.landscapes(config.num_steps + MORE),
        noise=draws,
        training=False,
        record=lambda step: score(step.state),
    )
    return {"trained_steps": config.num_steps, "after": found}


if __name__ == "__main__":
    raise SystemExit(main())
