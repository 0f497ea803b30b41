"""What further steps that move a few tokens cost, and what they lose: models trained side by side
on the same batches.

    python tools/study_candidates.py data/sample-64/manifest.json [--candidates 64 256 1024]
        [--steps 100] [--batch-size 8] --output results/candidates.json

Transformer++, one step, two steps of all tokens and two of K candidates each: shallow, with a
bilinear term, from the uniform distribution, mirror descent, both steps scored and the graph
through both. All take turns on every batch, in one process: `cpu_ratio` is the median over batches
of the CPU seconds of a form's training step over Transformer++'s on the same batch, `flops_ratio`
that of FLOPs. Held-out losses after each refinement step, in nats per token, come with 95 %
intervals over samples; `gain` is what the first steps' loss loses by the second, paired.
--vocabulary V instead of a manifest: random tokens, for the cost alone.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import ebwm_scale  # noqa: F401 (before torch is loaded: how its threads wait)

# isort: split

import torch
from torch import Tensor

from ebwm_scale.config.load import load_config
from ebwm_scale.core.arguments import ArgumentParser, command
from ebwm_scale.core.numerics import flush_denormals
from ebwm_scale.core.provenance import provenance
from ebwm_scale.data.format.shards import open_split
from ebwm_scale.data.loading.batches import validation_batches
from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.evaluation.bootstrap import bootstrap_ci
from ebwm_scale.planning.flops import step_flops
from ebwm_scale.refinement.noise import NoiseSource
from ebwm_scale.training.optimizer import parameter_groups
from ebwm_scale.training.schedule import learning_rate
from ebwm_scale.world_model import WorldModel

FORM = (
    "model.predicted_layers=1",
    "model.predicted_input=anchored",
    "model.energy_head=[linear, bilinear]",
    "state.initial=zeros",
    "state.map_scale=10",
    "refinement.update=mirror",
    "refinement.step_size=2",
    "refinement.learning_rate_multiplier=6",
    "refinement.graph=full",
)
WARM_UP = 40


@command
def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("manifest", type=Path, nargs="?", help="of a text dataset")
    parser.add_argument("--vocabulary", type=int, default=None, help="random tokens, cost alone")
    parser.add_argument("--candidates", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--size", default="4xs")
    parser.add_argument("--context-length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100, help="training steps")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-samples", type=int, default=128, help="held out")
    parser.add_argument("--seed", type=int, default=33)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if (options.manifest is None) == (options.vocabulary is None):
        parser.error("give a manifest, or --vocabulary for the cost alone")
    flush_denormals()
    torch.set_num_threads(1)
    origin = provenance()  # of the code that runs, whatever is committed meanwhile
    forms = {
        "transformer++": ("model.kind=baseline",),
        "one step": ("refinement.num_steps=1",),
        "two steps, all tokens": (),
    }
    for count in options.candidates:
        forms[f"two steps, {count} candidates"] = (f"refinement.candidates={count}",)
    batches, held_out, vocabulary = data_of(options)
    runs = {name: Run(form, vocabulary, options) for name, form in forms.items()}
    rows: list[dict] = []
    for step, (observed, targets) in enumerate(batches):
        for run in runs.values():
            run.train(step, observed, targets)
        if (step + 1) % 10 == 0 or step + 1 == options.steps:
            rows = rows_of(runs, held_out if step + 1 == options.steps else [])
            result = origin | {"steps": step + 1, "threads": 1, "forms": rows}
            options.output.write_text(json.dumps(result, indent=1) + "\n")
            print(f"{step + 1} steps", flush=True)
    for row in rows:
        losses = " -> ".join(f"{loss['mean']:.3f}" for loss in row.get("losses", []))
        print(f"{row['form']}: {row['cpu_ratio']:.2f} {losses}")
    return 0


def data_of(options) -> tuple[list, list, int]:
    """(training batches, held-out ones, V): (observed, targets) (B, S) each."""
    if options.manifest is None:
        generator = torch.Generator().manual_seed(options.seed)
        shape = (options.batch_size, options.context_length + 1)
        batches = []
        for _ in range(options.steps):
            tokens = torch.randint(options.vocabulary, shape, generator=generator)
            batches.append((tokens[:, :-1], tokens[:, 1:]))
        return batches, [], options.vocabulary
    found = []
    vocabulary = 0
    for name, count in (
        ("train", options.steps * options.batch_size),
        ("validation", options.max_samples),
    ):
        split = open_split(str(options.manifest), name, verify="sizes")
        observe = Observation(split.manifest, "cpu")
        batches = validation_batches(
            split,
            context_length=options.context_length,
            batch_size=options.batch_size,
            max_samples=count,
            rank=0,
            world_size=1,
        )
        found.append([observe(batch.sequences) for batch in batches])
        vocabulary = split.manifest.content.size
    return found[0], found[1], vocabulary


class Run:
    """One form: its model, its optimizer and the CPU seconds of its steps."""

    def __init__(self, form: tuple[str, ...], vocabulary: int, options):
        energy = () if "model.kind=baseline" in form else FORM
        self.config = load_config(
            None,
            [
                f"model.size={options.size}",
                f"model.vocabulary_size={vocabulary}",
                f"data.context_length={options.context_length}",
                f"train.global_batch_size={options.batch_size}",
                f"train.max_steps={options.steps}",
                f"train.seed={options.seed}",
                "optimizer.learning_rate=0.006",
                f"schedule.warmup_steps={min(WARM_UP, options.steps)}",
                *energy,
                *form,
            ],
        )
        torch.manual_seed(options.seed)
        self.model = WorldModel(self.config)
        optimizer = self.config.optimizer
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, self.config),
            betas=(optimizer.beta1, optimizer.beta2),
            fused=True,
        )
        self.seconds: list[float] = []
        self.last: list[float] = []  # training losses of the newest step

    def train(self, step: int, observed: Tensor, targets: Tensor) -> None:
        start = time.process_time()
        rate = learning_rate(self.config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate_scale"]
        output = self._forward(observed, targets, step)
        output.loss.backward()
        clipping = self.config.optimizer.gradient_clipping
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), clipping)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.process_time() - start)
        self.last = output.loss_per_step.tolist()

    @torch.no_grad()
    def held_out_losses(self, batches: list) -> Tensor:
        """(samples, steps) mean losses."""
        self.model.eval()
        rows = []
        for observed, targets in batches:
            for sample in range(len(observed)):
                part = slice(sample, sample + 1)
                rows.append(self._forward(observed[part], targets[part], 0).loss_per_step)
        self.model.train()
        return torch.stack(rows)

    def _forward(self, observed: Tensor, targets: Tensor, step: int):
        ids = torch.arange(len(observed))
        source = NoiseSource(self.config.train.seed, step)
        return self.model(observed, targets, sample_ids=ids, source=source)


def rows_of(runs: dict[str, Run], held_out: list) -> list[dict]:
    """What is known of each form."""
    base = runs["transformer++"]
    base_flops = sum(step_flops(base.config, samples=1).values())
    rows = []
    for name, run in runs.items():
        ratios = [ours / theirs for ours, theirs in zip(run.seconds, base.seconds)]
        row = {
            "form": name,
            "cpu_s": statistics.median(run.seconds),
            "cpu_ratio": statistics.median(ratios),
            "flops_ratio": sum(step_flops(run.config, samples=1).values()) / base_flops,
            "training_loss_per_step": run.last,
        }
        if held_out:
            losses = run.held_out_losses(held_out)
            row["losses"] = [bootstrap_ci(column) for column in losses.double().unbind(1)]
            if losses.shape[1] > 1:
                row["gain"] = bootstrap_ci((losses[:, -2] - losses[:, -1]).double())
        rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(main())
