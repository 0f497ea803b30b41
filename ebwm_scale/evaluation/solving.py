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
from ebwm_scale.data.tokenizer import open_tokenizer
from ebwm_scale.evaluation.answers import (
    Instances,
    numbers_of_steps,
    see_answers,
    thought_of,
    trained_steps,
)
from ebwm_scale.evaluation.bootstrap import bootstrap_ci, correlation_ci, share_ci
from ebwm_scale.evaluation.solving_examples import (
    MAX_POSITIONS,
    Shown,
    numbers_shown,
)
from ebwm_scale.evaluation.step_spectrum import step_spectrum
from ebwm_scale.inference.thinking import ThinkingConfig
from ebwm_scale.refinement.exits import exit_summary

MAX_BINS = 6  # of difficulty
SETTLED = 0.1  # the largest change of a probability in an answer that has settled


def is_task(manifest: Manifest) -> bool:
    """Whether the samples of a dataset are instances with an answer: marked so, or in groups."""
    if manifest.modality != "text":
        return False  # the patches of a frame are groups too
    return bool(manifest.content.members) or manifest.content.group_size > 1


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
        return [part.about() | self.of_part(part).summary() for part in bins]

    def of_part(self, part: Bin) -> Marks:
        """Of the instances of one range of difficulty."""
        chosen = part.members
        return Marks(self.loss[chosen], self.accuracy[chosen], self.solved[chosen])


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


@dataclass(frozen=True)
class Other:
    """A model to compare with on the same instances; name: where it was loaded from."""

    model: Any
    config: Config
    name: str


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
    settled: float = SETTLED,
    other: Other | None = None,
    num_examples: int = 4,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """The content of solving.json.

    split: of tasks. steps: numbers of refinement steps, of a looped baseline of loops; the trained
    number is added, and each below it if they are few. tolerance: of early stopping; None: a
    hundredth of the mean fall of energy in the first step. settled: of stopping when the answer
    settles, see ThinkingConfig. other: what it is compared with, after
    its own trained number of steps. num_examples: instances that are shown whole, unless a group
    has more than MAX_POSITIONS cells.
    A grid may have another size than those trained on: the models then read groups of that size
    from there on. Raises UserError for groups of another kind.
    """
    manifest = split.manifest
    fit_groups(model, manifest)
    batches, sample_ids = read_instances(model, split, max_samples, batch_size)
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
    trained = trained_steps(config)
    numbers = numbers_of_steps(config, steps)
    after = marks_after(model, batches, numbers, progress)
    result |= {"trained_steps": trained, "steps": _curve(after, trained, bins)}
    if trained is not None and 1 in after and trained > 1:
        result["gain_of_later_steps"] = _gain(after[trained], after[1], bins)
    if config.model.kind == "energy":
        result["early_stopping"] = _early_stopping(
            model, batches, difficulty, bins, 4 * config.refinement.num_steps, tolerance, progress
        )
        result["settling"] = settling(
            model, batches, difficulty, bins, after[config.refinement.num_steps], settled, progress
        )
        if model.exit_logits is not None:
            result["exits"] = exit_summary(model.exit_logits)
        trained_number = config.refinement.num_steps
        result["step_spectrum"] = step_spectrum(
            model,
            [(batch.sample_ids, batch.observed) for batch in batches],
            steps=(trained_number, 4 * trained_number),
            seed=config.train.seed,
        )
    if other is not None:
        fit_groups(other.model, manifest)
        result["against"] = _against(other, after[trained or 1], batches, bins, progress)
    if num_examples and manifest.content.group_size <= MAX_POSITIONS:
        everything = torch.ones(len(sample_ids), dtype=torch.bool)
        shown = Shown.choose(
            batches,
            [part.members for part in bins] or [everything],
            num_examples,
            difficulty if len(difficulty) else None,
            open_tokenizer(manifest.content.tokenizer_path, eos_id=manifest.content.eos_id),
            is_grid=manifest.content.grid is not None,
        )
        result["examples"] = shown.to_dict(
            model,
            numbers_shown(numbers, trained),
            None if other is None else other.model,
            None if other is None else trained_steps(other.config) or 1,
        )
    return result


@torch.no_grad()
def solved_by_steps(
    model,
    config: Config,
    batches: Sequence[Instances],
    numbers: Sequence[int],
    other: Other | None = None,
) -> dict[str, Any]:
    """Of the content of solving.json what is solved after each of these numbers of steps, the
    trained one among them, and what the other model solves.
    """
    trained = trained_steps(config)
    after = marks_after(model, batches, numbers)
    result: dict[str, Any] = {"kind": config.model.kind, "trained_steps": trained}
    result["steps"] = _curve(after, trained, [])
    if other is not None:
        result["against"] = _against(other, after[trained or 1], batches, [], no_progress)
    return result


def _gain(ours: Marks, theirs: Marks, bins: Sequence[Bin]) -> dict[str, Any]:
    """How much better ours are, over all instances and by difficulty."""
    by_difficulty = [
        part.about() | ours.of_part(part).gain_over(theirs.of_part(part)) for part in bins
    ]
    return ours.gain_over(theirs) | {"by_difficulty": by_difficulty}


def _against(
    other: Other, ours: Marks, batches: Sequence[Instances], bins: Sequence[Bin], progress: Progress
) -> dict[str, Any]:
    """What another model solves, and how far we are above it, paired by instance."""
    trained = trained_steps(other.config)
    (theirs,) = marks_after(other.model, batches, [trained or 1], progress).values()
    about = {"name": other.name, "kind": other.config.model.kind, "trained_steps": trained}
    about |= theirs.summary() | {"by_difficulty": theirs.by_difficulty(bins)}
    return about | {"gain_over_it": _gain(ours, theirs, bins)}


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


def fit_groups(model, manifest: Manifest) -> None:
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


def read_instances(
    model, split, max_samples: int, batch_size: int
) -> tuple[list[Instances], list[int]]:
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


def _curve(
    after: dict[int, Marks], trained: int | None, bins: Sequence[Bin]
) -> list[dict[str, Any]]:
    """What is said of each number of steps, fewest first; 0 steps where there is but one answer."""
    curve = []
    previous = None
    for num_steps, marks in after.items():
        point = {"num_steps": 0 if trained is None else num_steps} | marks.summary()
        point["by_difficulty"] = marks.by_difficulty(bins)
        if previous is not None:
            point["gain_over_previous"] = marks.gain_over(previous)
        if trained is not None and num_steps != trained:
            point["gain_over_trained"] = marks.gain_over(after[trained])
        curve.append(point)
        previous = marks
    return curve


def marks_after(
    model,
    batches: Sequence[Instances],
    numbers: Sequence[int],
    progress: Progress = no_progress,
) -> dict[int, Marks]:
    """After each of these numbers of steps, fewest first."""
    parts: dict[int, list[Marks]] = {number: [] for number in numbers}
    for batch in tracked(batches, f"up to {numbers[-1]} steps", progress):

        def see(num_steps: int, logits: Tensor, targets: Tensor = batch.targets) -> None:
            parts[num_steps].append(Marks.of(logits, targets))

        see_answers(model, batch, numbers, see)
    return {number: Marks.joined(marks) for number, marks in parts.items()}


def _early_stopping(
    model,
    batches: Sequence[Instances],
    difficulty: Tensor,
    bins: Sequence[Bin],
    max_steps: int,
    tolerance: float | None,
    progress: Progress,
) -> dict[str, Any]:
    """What early stopping costs, and whether it spends more steps on harder instances; of a model
    of energies.
    """
    seed = model.config.train.seed
    rules = ThinkingConfig(num_steps=max_steps, accept_only_if_lower=True, seed=seed, tolerance=0.0)
    running_on = []
    falls = []
    for batch in tracked(batches, "running on", progress):
        thought = thought_of(model, batch, rules)
        running_on.append(Marks.of(thought.state, batch.targets))
        falls.append((thought.trace[0] - thought.trace[1])[batch.targets != IGNORE].cpu())
    if tolerance is None:
        tolerance = 0.01 * max(float(torch.cat(falls).mean()), 1e-12)
    stopped, steps = _stopped(
        model, batches, dataclasses.replace(rules, tolerance=tolerance), progress
    )
    marks_on = Marks.joined(running_on)
    return {
        "max_steps": max_steps,
        "tolerance": tolerance,
        "running_on": marks_on.summary(),
        "gain_over_running_on": stopped.gain_over(marks_on),
    } | _of_steps(stopped, steps, difficulty, bins)


def settling(
    model,
    batches: Sequence[Instances],
    difficulty: Tensor,
    bins: Sequence[Bin],
    as_trained: Marks,
    settled: float = SETTLED,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Stopping when an answer settles: at most twice the trained steps, so that hard instances can
    take more of them, against the trained number for all.
    """
    max_steps = 2 * model.config.refinement.num_steps
    seed = model.config.train.seed
    rules = ThinkingConfig(num_steps=max_steps, settled=settled, seed=seed)
    stopped, steps = _stopped(model, batches, rules, progress)
    return {
        "max_steps": max_steps,
        "largest_change": settled,
        "gain_over_trained": stopped.gain_over(as_trained),
    } | _of_steps(stopped, steps, difficulty, bins)


def _stopped(
    model, batches: Sequence[Instances], rules: ThinkingConfig, progress: Progress
) -> tuple[Marks, Tensor]:
    """Where thinking by these rules stops, and the steps of each instance: the mean of those of its
    scored tokens.
    """
    marks, steps = [], []
    for batch in tracked(batches, "stopping early", progress):
        thought = thought_of(model, batch, rules)
        marks.append(Marks.of(thought.state, batch.targets))
        scored = (batch.targets != IGNORE).double()
        taken = (thought.steps.double() * scored).sum(1) / scored.sum(1)
        steps.append(taken.cpu())
    return Marks.joined(marks), torch.cat(steps)


def _of_steps(
    stopped: Marks, steps: Tensor, difficulty: Tensor, bins: Sequence[Bin]
) -> dict[str, Any]:
    """What two ways to stop have in common."""
    result = {
        "mean_steps": bootstrap_ci(steps),
        "stopped": stopped.summary(),
        "by_difficulty": [
            part.about() | {"mean_steps": bootstrap_ci(steps[part.members])} for part in bins
        ],
    }
    if len(difficulty):
        correlation = correlation_ci(steps[:, None], difficulty[:, None])
        result["rank_correlation_of_steps_with_difficulty"] = correlation
    return result
