"""Tasks with one right answer: how many are solved, by number of refinement steps and difficulty.

    loss        nats per scored token
    accuracy    share of the scored tokens whose most probable value is the right one
    solved      share of the instances with every scored token right

Each is a mean over instances with a 95 % interval: from a bootstrap over them, of solved by
Wilson's formula. In a text the true
tokens before an answer's token are given. Where every one is the most probable, greedy generation
writes the same answer: solved means the same for texts and grids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ebwm_kernels.vocabulary.softmax_cross_entropy import IGNORE
from ebwm_scale.config import resolved
from ebwm_scale.config.schema import Config
from ebwm_scale.core.errors import UserError
from ebwm_scale.core.progress import Progress, no_progress, tracked
from ebwm_scale.data.format.content import difficulty_of
from ebwm_scale.data.format.manifest import Manifest
from ebwm_scale.data.loading.batches import validation_batches
from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.data.loading.quarantine import BadSample
from ebwm_scale.evaluation.bootstrap import bootstrap_ci, correlation_ci, share_ci
from ebwm_scale.evaluation.step_spectrum import step_spectrum
from ebwm_scale.inference.energy_functions import SequenceEnergy
from ebwm_scale.inference.initial_states import SequenceSampler
from ebwm_scale.inference.thinking import ThinkingConfig, Thought, think

MAX_BINS = 6  # of difficulty


def is_task(manifest: Manifest) -> bool:
    """Whether the samples of a dataset are instances with an answer: marked so, or in groups."""
    return bool(manifest.content.members) or manifest.content.group_size > 1


@dataclass(frozen=True)
class Instances:
    """A batch: sample_ids (B,), observed and targets (B, S) tokens, on the model's device."""

    sample_ids: Tensor
    observed: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Marks:
    """Of each instance, float64 (instances,): mean loss and accuracy of its scored tokens, and 1
    where all are right.
    """

    loss: Tensor
    accuracy: Tensor
    solved: Tensor

    @staticmethod
    def of(logits: Tensor, targets: Tensor) -> Marks:
        """logits (B, S, V); targets (B, S), IGNORE where a position is not scored."""
        scored = targets != IGNORE
        loss = F.cross_entropy(
            logits.float().flatten(0, 1),
            targets.flatten(),
            ignore_index=IGNORE,
            reduction="none",
        ).view(targets.shape)
        right = logits.argmax(-1) == targets  # never where a position is not scored
        count = scored.sum(1).double()
        accuracy = right.sum(1).double() / count
        return Marks(
            (loss.double().sum(1) / count).cpu(),
            accuracy.cpu(),
            (right.sum(1) == scored.sum(1)).double().cpu(),
        )

    @staticmethod
    def joined(parts: Sequence[Marks]) -> Marks:
        return Marks(
            torch.cat([part.loss for part in parts]),
            torch.cat([part.accuracy for part in parts]),
            torch.cat([part.solved for part in parts]),
        )

    def summary(self) -> dict[str, Any]:
        return {
            "loss": bootstrap_ci(self.loss),
            "accuracy": bootstrap_ci(self.accuracy),
            "solved": share_ci(self.solved),
        }

    def gain_over(self, other: Marks) -> dict[str, Any]:
        """How much lower the loss is and how much more is solved, instance by instance: above 0 is
        better than the other.
        """
        return {
            "fall_of_loss": bootstrap_ci(other.loss - self.loss),
            "rise_of_solved": bootstrap_ci(self.solved - other.solved),
        }

    def by_difficulty(self, bins: Sequence[Bin]) -> list[dict[str, Any]]:
        rows = []
        for part in bins:
            marks = Marks(
                self.loss[part.members], self.accuracy[part.members], self.solved[part.members]
            )
            rows.append(part.about() | marks.summary())
        return rows


@dataclass(frozen=True)
class Bin:
    """Instances of difficulties from low to high; members: bool (instances,)."""

    low: int
    high: int
    members: Tensor

    def about(self) -> dict[str, int]:
        return {
            "lowest": self.low,
            "highest": self.high,
            "num_samples": int(self.members.sum()),
        }


@torch.no_grad()
def evaluate_solving(
    model,
    config: Config,
    split,
    *,
    max_samples: int,
    batch_size: int,
    steps: Sequence[int],
    tolerance: float | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """The content of solving.json.

    split: of tasks. steps: numbers of refinement steps; those that were trained are added.
    tolerance: of early stopping; None: a hundredth of the mean fall of energy in the first step.
    A grid may have another size than those trained on: the model then reads groups of that size
    from there on. Raises UserError for groups of another kind.
    """
    manifest = split.manifest
    _fit_groups(model, manifest)
    batches, sample_ids = _read(model, split, max_samples, batch_size)
    result: dict[str, Any] = {
        "task": str(manifest.source.get("generator", manifest.folder.name)),
        "split": split.split,
        "kind": config.model.kind,
        "grid": manifest.content.grid,
        "num_samples": len(sample_ids),
        "num_targets": sum(int((batch.targets != IGNORE).sum()) for batch in batches),
    }
    bins: list[Bin] = []
    difficulty = torch.empty(0)
    if "difficulty" in manifest.content.members:
        difficulty = torch.tensor([difficulty_of(split.read_fields(i)) for i in sample_ids])
        bins = bins_of(difficulty)
    if config.model.kind == "baseline":
        marks = Marks.joined([_baseline_marks(model, batch) for batch in batches])
        point = {"num_steps": 0} | marks.summary() | {"by_difficulty": marks.by_difficulty(bins)}
        return result | {"trained_steps": None, "steps": [point]}
    trained, seed = config.refinement.num_steps, config.train.seed
    after: dict[int, Marks] = {}  # number of steps -> marks
    for num_steps in sorted(set(steps) | {trained}):
        thinking = ThinkingConfig(num_steps=num_steps, seed=seed)
        after[num_steps] = Marks.joined(
            [
                Marks.of(_thought(model, batch, thinking).state, batch.targets)
                for batch in tracked(batches, f"{num_steps} steps", progress)
            ]
        )
    curve = []
    previous = None
    for num_steps, marks in after.items():
        point = {"num_steps": num_steps} | marks.summary()
        point["by_difficulty"] = marks.by_difficulty(bins)
        if previous is not None:
            point["gain_over_previous"] = marks.gain_over(previous)
        if num_steps != trained:
            point["gain_over_trained"] = marks.gain_over(after[trained])
        curve.append(point)
        previous = marks
    result |= {"trained_steps": trained, "steps": curve}
    stopping = _early_stopping(model, batches, difficulty, 4 * trained, tolerance, seed, progress)
    pairs = [(batch.sample_ids, batch.observed) for batch in batches]
    spectrum = step_spectrum(model, pairs, steps=(trained, 4 * trained), seed=seed)
    return result | {"early_stopping": stopping, "step_spectrum": spectrum}


def bins_of(difficulty: Tensor) -> list[Bin]:
    """At most MAX_BINS ranges of difficulty with about as many instances in each; equal
    difficulties stay together.
    """
    values, counts = difficulty.unique(return_counts=True)  # sorted
    wanted = len(difficulty) / MAX_BINS
    bins, low, inside = [], None, 0
    for value, count in zip(values.tolist(), counts.tolist()):
        low = value if low is None else low
        inside += count
        if inside >= wanted or value == values[-1]:
            bins.append(Bin(low, value, (difficulty >= low) & (difficulty <= value)))
            low, inside = None, 0
    return bins


def _fit_groups(model, manifest: Manifest) -> None:
    """Have the model read the groups of a dataset; UserError where it cannot."""
    content = manifest.content
    group_size = resolved.group_size(model.config)
    if content.group_size == group_size and content.grid == resolved.grid(model.config):
        return
    if resolved.grid(model.config) is None or content.grid is None:
        raise UserError(
            f"{manifest.path} has groups of {content.group_size} tokens, the run was "
            f"trained on groups of {group_size}: name a dataset of the run's own kind with --data"
        )
    model.regroup(content.group_size, content.grid)


def _read(model, split, max_samples: int, batch_size: int) -> tuple[list[Instances], list[int]]:
    """(batches, the ids of the samples in them). A damaged one's replacement is named instead."""
    found: list[BadSample] = []
    observe = Observation(split.manifest, next(model.parameters()).device)
    batches: list[Instances] = []
    sample_ids: list[int] = []
    for batch in validation_batches(
        split,
        context_length=split.manifest.context_length,  # answers are whole, whatever was trained
        batch_size=batch_size,
        max_samples=max_samples,
        rank=0,
        world_size=1,
        found=found,
    ):
        batches.append(Instances(batch.sample_ids, *observe(batch.sequences)))
        sample_ids += batch.sample_ids.tolist()
    replaced = {bad.sample_id: bad.replaced_by for bad in found}
    return batches, [replaced.get(sample_id, sample_id) for sample_id in sample_ids]


def _baseline_marks(model, batch: Instances) -> Marks:
    embedded = model.embed_observed(batch.observed)
    logits = model.output(model.network(embedded, model.first_visible(batch.observed)))
    return Marks.of(logits, batch.targets)


def _thought(model, batch: Instances, thinking: ThinkingConfig) -> Thought:
    noise = SequenceSampler(model, thinking.seed, batch.sample_ids, batch.observed.shape[1])
    embedded = model.embed_observed(batch.observed)
    energy_function = SequenceEnergy(model, embedded, model.first_visible(batch.observed))
    return think(model, energy_function, noise.initial(None), thinking, noise=noise)


def _early_stopping(
    model,
    batches: Sequence[Instances],
    difficulty: Tensor,
    max_steps: int,
    tolerance: float | None,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """What early stopping costs, and whether it spends more steps on harder instances.

    The steps of an instance are the mean of those of its scored tokens.
    """
    rules = ThinkingConfig(num_steps=max_steps, accept_only_if_lower=True, seed=seed, tolerance=0.0)
    running_on = []
    falls = []
    for batch in tracked(batches, "running on", progress):
        thought = _thought(model, batch, rules)
        running_on.append(Marks.of(thought.state, batch.targets))
        falls.append((thought.trace[0] - thought.trace[1])[batch.targets != IGNORE].cpu())
    if tolerance is None:
        tolerance = 0.01 * max(float(torch.cat(falls).mean()), 1e-12)
    stopping = dataclasses.replace(rules, tolerance=tolerance)
    stopped, steps = [], []
    for batch in tracked(batches, "stopping early", progress):
        thought = _thought(model, batch, stopping)
        stopped.append(Marks.of(thought.state, batch.targets))
        scored = (batch.targets != IGNORE).double()
        taken = (thought.steps.double() * scored).sum(1) / scored.sum(1)
        steps.append(taken.cpu())
    steps_taken = torch.cat(steps)
    result = {
        "max_steps": max_steps,
        "tolerance": tolerance,
        "mean_steps": bootstrap_ci(steps_taken),
        "running_on": Marks.joined(running_on).summary(),
        "stopped": Marks.joined(stopped).summary(),
    }
    if len(difficulty):
        correlation = correlation_ci(steps_taken[:, None], difficulty[:, None])
        result["rank_correlation_of_steps_with_difficulty"] = correlation
    return result
