"""Does a trained energy model know what cannot be known? Sequences whose unpredictability is known
exactly, of text and of states.

    python tools/study_uncertainty.py [--steps 600] [--starts 8] [--output results/uncertainty.json]

text     a Markov chain over 96 tokens: token t is followed by one of 2^(t mod 6) tokens, all
         equally likely. True entropy: (t mod 6) ln 2 nats.
states   a point on a circle that moves on by a fixed angle plus Gaussian noise of deviation 0, 0.3,
         1 or 3 radians; which one is announced in the state, in turn.

A small energy model learns each (in memory, no engine), of two forms: as released (one candidate
from noise) and anchored. Then, on sequences it has not seen, every position is predicted
from several initial states, and what the model offers as uncertainty is compared with the truth by
rank correlation, with bootstrap intervals over sequences:

    energy           of the final state, of the first start
    energy spread    its standard deviation over starts
    state spread     how far apart the final states are: of text, the deviation of the predicted
                     probabilities over starts; of states, of the coordinates
    entropy          text only: of the predicted distribution (what Transformer++ offers too)
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

from ebwm_scale.config.load import config_from_dict
from ebwm_scale.core.arguments import ArgumentParser
from ebwm_scale.core.numerics import flush_denormals
from ebwm_scale.core.provenance import provenance
from ebwm_scale.evaluation.bootstrap import correlation_ci
from ebwm_scale.inference.energy_functions import SequenceEnergy
from ebwm_scale.inference.initial_states import SequenceSampler
from ebwm_scale.inference.thinking import ThinkingConfig, think
from ebwm_scale.refinement.noise import NoiseSource
from ebwm_scale.world_model import WorldModel

TOKENS, BRANCHES, LENGTH, BATCH = 96, 6, 32, 16
DEVIATIONS = (0.0, 0.3, 1.0, 3.0)  # radians
TURN = 0.7
FORMS = {"released": "state", "anchored": "anchored"}  # model.predicted_input


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--steps", type=int, default=600, help="training steps of each model (default %(default)s)"
    )
    parser.add_argument(
        "--starts", type=int, default=8, help="initial states per prediction (default %(default)s)"
    )
    parser.add_argument(
        "--samples", type=int, default=64, help="sequences to evaluate on (default %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    flush_denormals()
    rows = []
    for world, draw in (("text", chain), ("states", circle)):
        for form, predicted_input in FORMS.items():
            start = time.perf_counter()
            model = train(model_of(world, predicted_input), draw, options.steps)
            row = {
                "world": world,
                "form": form,
                "steps": options.steps,
                "training_s": round(time.perf_counter() - start, 1),
            } | measure(model, draw, options.samples, options.starts)
            rows.append(row)
            print(json.dumps(row), flush=True)
    if options.output:
        options.output.write_text(json.dumps(provenance() | {"rows": rows}, indent=1) + "\n")
    return 0


def chain(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """(tokens (B, LENGTH + 1), true entropy (B, LENGTH) in nats of the token after each)."""
    fixed, most = torch.Generator().manual_seed(0), 2 ** (BRANCHES - 1)
    successors = torch.stack(
        [
            (token + 1 + TOKENS // most * torch.randperm(most, generator=fixed)) % TOKENS
            for token in range(TOKENS)
        ]
    )
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(TOKENS, (samples, 1), generator=generator)
    for _ in range(LENGTH):
        last = tokens[:, -1]
        branch = (torch.rand(samples, generator=generator) * 2 ** (last % BRANCHES)).long()
        tokens = torch.cat([tokens, successors[last, branch][:, None]], 1)
    return tokens, (tokens[:, :-1] % BRANCHES) * math.log(2)


def circle(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """(states (B, LENGTH + 1, 6), true deviation (B, LENGTH) of the angle that comes next)."""
    generator = torch.Generator().manual_seed(seed)
    angle = torch.rand(samples, generator=generator) * 2 * math.pi
    level = torch.randint(len(DEVIATIONS), (samples,), generator=generator)
    states, truth = [], []
    for _ in range(LENGTH + 1):
        announced = torch.nn.functional.one_hot(level, len(DEVIATIONS)).float()
        states.append(torch.cat([angle.cos()[:, None], angle.sin()[:, None], announced], 1))
        deviation = torch.tensor(DEVIATIONS)[level]
        truth.append(deviation)
        angle, level = (
            angle + TURN + deviation * torch.randn(samples, generator=generator),
            (level + 1) % len(DEVIATIONS),
        )
    return torch.stack(states, 1), torch.stack(truth, 1)[:, :-1]


def model_of(world: str, predicted_input: str) -> WorldModel:
    torch.manual_seed(33)
    text = world == "text"
    return WorldModel(
        config_from_dict(
            {
                "model": {
                    "num_layers": 2,
                    "width": 64,
                    "num_heads": 2,
                    "predicted_input": predicted_input,
                    **({"vocabulary_size": TOKENS} if text else {}),
                },
                "state": {"kind": "vocabulary"}
                if text
                else {"kind": "embedding", "dimension": 2 + len(DEVIATIONS)},
                "refinement": {"step_size": 30.0 if text else 10.0},
                "data": {"context_length": LENGTH},
            }
        )
    )


def train(model: WorldModel, draw, steps: int, rate: float = 0.004) -> WorldModel:
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for name, p in model.named_parameters() if name != "step_size"]},
            {"params": [model.step_size], "lr": 30 * rate, "weight_decay": 0},
        ],
        lr=rate,
        weight_decay=0.01,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1, (k + 1) / 30) * (0.55 + 0.45 * math.cos(math.pi * k / steps))
    )
    for k in range(steps):
        sequences, _ = draw(BATCH, seed=1000 + k)
        loss = model(
            sequences[:, :-1],
            sequences[:, 1:],
            sample_ids=torch.arange(BATCH) + k * BATCH,
            source=NoiseSource(33, k),
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), optimizer.zero_grad(), schedule.step()
    return model.eval()


@torch.no_grad()
def measure(model: WorldModel, draw, samples: int, starts: int) -> dict:
    sequences, truth = draw(samples, seed=1)
    observed, targets = sequences[:, :-1], sequences[:, 1:]
    config, score = (
        ThinkingConfig(num_starts=starts),
        SequenceEnergy(model, model.embed_observed(observed)),
    )
    energies, states = [], []
    for start in range(starts):
        noise = SequenceSampler(model, config.seed, torch.arange(samples), LENGTH, start)
        thought = think(model, score, noise.initial(observed), config, noise=noise)
        energies.append(thought.energy), states.append(thought.state)
    energies, states = torch.stack(energies), torch.stack(states)
    is_text = model.config.state.kind == "vocabulary"
    loss = model.state_space().loss(states[0], targets, reduction="none")
    points = states.softmax(-1) if is_text else states
    offered = {
        "energy": energies[0],
        "energy_spread": energies.std(0),
        "state_spread": points.std(0).norm(dim=-1),
    }
    if is_text:
        offered["entropy"] = -(points[0] * points[0].clamp(min=1e-30).log()).sum(-1)
    levels = truth.unique()
    row: dict = {"loss": float(loss.mean())} | (
        {"true_entropy": float(truth.mean())} if is_text else {}
    )
    row["by_level"] = [
        {
            "truth": float(level),
            "positions": int((truth == level).sum()),
            "loss": float(loss[truth == level].mean()),
            **{name: float(value[truth == level].mean()) for name, value in offered.items()},
        }
        for level in levels
    ]
    row["rank_correlation_with_truth"] = {
        name: correlation_ci(value, truth) for name, value in offered.items()
    }
    return row


if __name__ == "__main__":
    raise SystemExit(main())
