"""The energy's curvature in validation rows: does a refinement step overshoot, while training?"""

from __future__ import annotations

from typing import Any

import torch

from ebwm_scale.config.schema import Config
from ebwm_scale.core.world import World
from ebwm_scale.data.format.shards import ShardedSplit
from ebwm_scale.data.loading.batches import validation_batches
from ebwm_scale.data.loading.mixture import MixedSplit
from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.inference.curvature import energy_curvature
from ebwm_scale.refinement.block_recompute import gathered
from ebwm_scale.refinement.noise import EVALUATION_STEP, NoiseSource
from ebwm_scale.world_model import WorldModel

OVERSHOOTS = 2.0  # alpha times an eigenvalue above which a step ends further away than it began


def measured_curvature(
    model: WorldModel,
    split: ShardedSplit | MixedSplit,
    config: Config,
    world: World,
    observe: Observation,
    *,
    context_length: int,
    step_size_scale: float = 1.0,
) -> dict[str, Any]:
    """Lists with an entry per refinement step, over evaluation.curvature_samples of each rank.

    hessian_eigenvalue: the mean of the largest one of each position (or group). alpha_curvature:
    alpha times that. share_overshoot: of positions where it is above 2. Every rank must call it;
    under ZeRO stage 3 the whole model is gathered meanwhile.
    """
    num_steps = config.refinement.num_steps
    sums = torch.zeros(3, num_steps, dtype=torch.float64)
    count = torch.zeros(1, dtype=torch.float64)
    most = config.evaluation.curvature_samples
    batches = validation_batches(
        split,
        context_length=context_length,
        batch_size=most,
        max_samples=most * world.size,
        rank=world.rank,
        world_size=world.size,
    )
    batch = next(batches, None)
    was_training = model.training
    model.eval()
    with gathered(list(model.parameters())):
        if batch is not None:
            observed, _ = observe(batch.sequences)
            found = energy_curvature(
                model,
                observed,
                sample_ids=batch.sample_ids,
                source=NoiseSource(config.train.seed, EVALUATION_STEP),
                conditions=observe.conditions(batch.conditions),
                step_size_scale=step_size_scale,
            )
            count += found[0].eigenvalue.numel()
            for index, step in enumerate(found):
                sums[0, index] = step.eigenvalue.sum()
                sums[1, index] = step.times_alpha.sum()
                sums[2, index] = (step.times_alpha > OVERSHOOTS).sum()
    model.train(was_training)
    total = world.all_reduce(torch.cat([sums.flatten(), count]).to(world.device)).cpu()
    means = (total[:-1] / total[-1]).view(3, num_steps).tolist()
    names = ("hessian_eigenvalue", "alpha_curvature", "share_overshoot")
    return dict(zip(names, means))
