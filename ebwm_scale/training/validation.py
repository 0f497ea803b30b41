"""Validation: the largest number of steps, the same samples and the same noise each time, no second-order graph."""
from __future__ import annotations

import math
from typing import Any, Callable

import torch

from ..config import Config
from ..data.loader import validation_batches
from ..data.shards import ShardedSplit
from ..model.world_model import WorldModel
from ..noise import NoiseSource
from .distributed import World

EVALUATION_STEP = 2**62         # the noise address of evaluation: no training step has it


def validate(model: WorldModel, split: ShardedSplit, config: Config, world: World, *, context_length: int, batch_size: int,
             step_size_scale: float = 1.0, beat: Callable[[], None] = lambda: None,
             stop_wanted: Callable[[], bool] = lambda: False) -> dict[str, Any] | None:
    """Mean loss per target over the first evaluation.max_samples samples: loss_per_step [N], initial_loss, energy_per_step, perplexity.

    stop_wanted is asked before every batch, by all ranks together; once it says so, nothing more is computed and the result is None.
    """
    source, sums, count = NoiseSource(config.train.seed, EVALUATION_STEP), None, 0
    batches = list(validation_batches(split, context_length=context_length, batch_size=batch_size,
                                      max_samples=config.evaluation.max_samples, rank=world.rank, world_size=world.size))
    # Under ZeRO stage 3 every forward is a collective: all ranks make as many, and what is beyond a rank's own batches does not count.
    rounds = int(world.all_reduce(torch.tensor(len(batches), device=world.device), torch.distributed.ReduceOp.MAX))
    empty = torch.zeros(1, context_length + 1, dtype=torch.int64, device=world.device)
    was_training = model.training
    model.eval()
    try:
        for index in range(rounds):
            beat()
            if stop_wanted():
                return None
            if index >= len(batches):
                if config.deepspeed.zero_stage == 3:
                    model(empty[:, :-1], empty[:, 1:], sample_ids=torch.zeros(1, dtype=torch.int64), source=source, step_size_scale=step_size_scale)
                continue
            batch = batches[index]
            tokens = batch.tokens.to(world.device)
            output = model(tokens[:, :-1], tokens[:, 1:], sample_ids=batch.sample_ids, source=source, step_size_scale=step_size_scale)
            parts = [output.loss_per_step, *(part for part in (output.energy_per_step, output.initial_loss) if part is not None)]
            values = torch.cat([part.detach().double().reshape(-1) for part in parts]) * len(tokens)
            sums, count = values if sums is None else sums + values, count + len(tokens)
    finally:
        model.train(was_training)
    num_steps = config.refinement.num_steps if config.model.kind == "energy" else 1
    size = 2 * num_steps + 1 if config.model.kind == "energy" else 1
    total = torch.zeros(size + 1, dtype=torch.float64, device=world.device)
    if sums is not None:
        total[:-1], total[-1] = sums, count
    *means, samples = world.all_reduce(total).tolist()
    means = [value / samples for value in means]
    losses = means[:num_steps]
    energy = config.model.kind == "energy"
    return {"loss": losses[-1], "loss_per_step": losses, "energy_per_step": means[num_steps:2 * num_steps] if energy else None,
            "initial_loss": means[-1] if energy else None, "perplexity": math.exp(min(losses[-1], 700.0)),
            "num_tokens": int(samples) * context_length, "unigram_entropy": split.manifest.splits["validation"].unigram_entropy}
