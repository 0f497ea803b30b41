"""Validation: the largest number of steps, the same samples and the same noise each time, no
second-order graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from ebwm_kernels.vocabulary.softmax_cross_entropy import IGNORE
from ebwm_scale.config import resolved
from ebwm_scale.config.schema import Config
from ebwm_scale.core.world import World
from ebwm_scale.data.format.shards import ShardedSplit
from ebwm_scale.data.loading.batches import validation_batches
from ebwm_scale.data.loading.mixture import MixedSplit
from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.data.loading.quarantine import BadSample
from ebwm_scale.model.conditions import example_conditions
from ebwm_scale.refinement.noise import EVALUATION_STEP, NoiseSource
from ebwm_scale.world_model import WorldModel


def validate(
    model: WorldModel,
    split: ShardedSplit | MixedSplit,
    config: Config,
    world: World,
    observe: Observation,
    *,
    context_length: int,
    batch_size: int,
    step_size_scale: float = 1.0,
    heartbeat: Callable[[], None] = lambda: None,
    stop_requested: Callable[[], bool] = lambda: False,
    found: list[BadSample] | None = None,
) -> dict[str, Any] | None:
    """Mean loss per target over the first evaluation.max_samples samples: loss_per_step [N], of a
    looped baseline after each loop, initial_loss, energy_per_step; for text the perplexity and the
    unigram entropy, for video the same loss of two predictors that learn nothing: copying the last
    frame (persistence_loss), and going on in a straight line from the last two
    (linear_extrapolation_loss).

    stop_requested is asked before every batch, by all ranks together; once it says so, nothing more
    is computed and the result is None. found: damaged samples are added to it.
    """
    source, sums = NoiseSource(config.train.seed, EVALUATION_STEP), None
    batches = list(
        validation_batches(
            split,
            context_length=context_length,
            batch_size=batch_size,
            found=found,
            max_samples=config.evaluation.max_samples,
            rank=world.reader,
            world_size=world.num_readers,
        )
    )
    # Under ZeRO stage 3 every forward is a collective: all ranks make as many, and what is beyond a
    # rank's own batches does not count.
    rounds = int(
        world.all_reduce(
            torch.tensor(len(batches), device=world.device), torch.distributed.ReduceOp.MAX
        )
    )
    is_text, energy = config.state.kind == "vocabulary", config.model.kind == "energy"
    was_training = model.training
    model.eval()
    try:
        for index in range(rounds):
            heartbeat()
            if stop_requested():
                return None
            if index >= len(batches):
                if config.deepspeed.zero_stage == 3:
                    observed, targets, conditions = _nothing(config, context_length, world.device)
                    model(
                        observed,
                        targets,
                        conditions=conditions,
                        sample_ids=torch.zeros(1, dtype=torch.int64),
                        source=source,
                        step_size_scale=step_size_scale,
                    )
                continue
            batch = batches[index]
            observed, targets = observe(batch.sequences)
            output = model(
                observed,
                targets,
                conditions=observe.conditions(batch.conditions),
                sample_ids=batch.sample_ids,
                source=source,
                step_size_scale=step_size_scale,
            )
            num_positions = targets.shape[0] * targets.shape[1]
            counted = int((targets != IGNORE).sum()) if is_text else num_positions
            scale: float = counted  # what the model's mean losses are over
            if resolved.has_masked_targets(config):
                scale = num_positions * resolved.scored_share(config)
            parts = [output.loss_per_step.detach().double() * scale]
            if output.energy_per_step is not None:
                parts.append(output.energy_per_step.detach().double() * num_positions)
            if output.initial_loss is not None:
                parts.append(output.initial_loss.detach().double() * scale)
            if not is_text:
                untrained = untrained_losses(observed, targets, observe.group_size)
                parts += [loss.double() * scale for loss in untrained]
            values = torch.cat([part.reshape(-1) for part in parts])
            values = torch.cat([values, values.new_tensor([counted, num_positions])])
            sums = values if sums is None else sums + values
    finally:
        model.train(was_training)
    num_steps = resolved.num_predictions(config)
    size = (2 * num_steps + 1 if energy else num_steps) + (0 if is_text else 2)
    total = (
        torch.zeros(size + 2, dtype=torch.float64, device=world.device) if sums is None else sums
    )
    # Processes that share a sample count all of it, each, and their losses are means over an equal
    # share of it.
    *means, counted, num_positions = (world.all_reduce(total) / world.sequence).tolist()
    energies = (
        [value / num_positions for value in means[num_steps : 2 * num_steps]] if energy else None
    )
    means = [value / counted for value in means]
    losses = means[:num_steps]
    row = {
        "loss": losses[-1],
        "loss_per_step": losses,
        "energy_per_step": energies,
        "initial_loss": means[2 * num_steps] if energy else None,
    }
    if is_text:
        return row | {
            "perplexity": math.exp(min(losses[-1], 700.0)),
            "num_tokens": int(counted),
            "unigram_entropy": unigram_entropy(split),
        }
    return row | {
        "persistence_loss": means[-2],
        "linear_extrapolation_loss": means[-1],
        f"num_{resolved.unit(config)}": int(counted),
    }


def untrained_losses(
    observed: torch.Tensor, targets: torch.Tensor, group_size: int
) -> list[torch.Tensor]:
    """Mean SmoothL1 of o_t, and of 2 o_t - o_(t-1), as predictions of the next state; the first
    frame has only itself to copy. group_size: states of a frame.
    """
    first, before, after = observed[:, :group_size], observed[:, :-group_size], observed
    straight = torch.cat([first, 2 * after[:, group_size:] - before], 1)
    return [F.smooth_l1_loss(guess, targets, beta=1.0) for guess in (observed, straight)]


def unigram_entropy(split: ShardedSplit | MixedSplit) -> float:
    """Of the split; of a mixture the mean over its sources, weighted as they are evaluated."""
    if isinstance(split, MixedSplit):
        return sum(
            count * part.info.facts["unigram_entropy"]
            for part, count in zip(split.parts, split.counts)
        ) / sum(split.counts)
    return split.info.facts["unigram_entropy"]


def _nothing(
    config: Config, context_length: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor] | None]:
    if config.state.kind == "vocabulary":
        observed = torch.zeros(1, context_length, dtype=torch.int64, device=device)
    else:
        observed = torch.zeros(1, context_length, resolved.state_dimension(config), device=device)
    num_groups = context_length // resolved.group_size(config)
    return observed, observed, example_conditions(config.data.conditions, 1, num_groups)
