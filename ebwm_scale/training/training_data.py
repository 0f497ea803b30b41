"""What the trainer asks of its data: the loader of the training split, and a word for every sample
that is set aside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ebwm_scale.config import resolved
from ebwm_scale.config.schema import Config
from ebwm_scale.core.world import World
from ebwm_scale.data.format.shards import ShardedSplit
from ebwm_scale.data.loading.batches import BatchLoader
from ebwm_scale.data.loading.mixture import MixedSplit
from ebwm_scale.data.loading.quarantine import BadSample, Quarantine
from ebwm_scale.data.loading.streaming import StreamLoader
from ebwm_scale.training.run_folder import RunFolder


def training_loader(
    config: Config,
    split: ShardedSplit | MixedSplit,
    world: World,
    *,
    micro_batch: int,
    first_step: int,
    first_shard: int,
    known_bad: dict[int, BadSample],
    warn: Callable[[str], None],
    allow_pipe: bool,
) -> BatchLoader | StreamLoader:
    """This rank's micro-batches from `first_step` on.

    first_shard: of a stream (data.stream). known_bad: damaged samples and what stands in for them,
    where there is no stream.
    """
    common: dict[str, Any] = {
        "context_length": resolved.context_length(config),
        "global_batch_size": config.train.global_batch_size,
        "micro_batch_size": micro_batch,
        "rank": world.rank,
        "world_size": world.size,
        "seed": config.train.seed,
        "first_step": first_step,
    }
    if config.data.stream:
        return StreamLoader(
            config.data.stream,
            split.manifest,
            buffer=config.data.stream_buffer,
            first_shard=first_shard,
            report=warn,
            allow_pipe=allow_pipe,
            **common,
        )
    return BatchLoader(
        split,
        window_shards=config.data.window_shards,
        num_workers=config.data.num_workers,
        known_bad=known_bad,
        **common,
    )


def record_damaged(
    found: list[BadSample], quarantine: Quarantine, run_folder: RunFolder, step: int
) -> bool:
    """Put damaged samples on the common list, and each new one into the run folder; whether there
    are more than data.max_quarantined, which is said.
    """
    for bad in quarantine.add(found):
        run_folder.event(
            "quarantine",
            step=step,
            split=bad.split,
            sample_id=bad.sample_id,
            shard=bad.shard,
            key=bad.key,
            offset=bad.offset,
        )
        run_folder.warn(
            f"{bad.shard}: sample {bad.key or '(all)'}: {bad.reason}; sample "
            f"{bad.replaced_by} stands in for {bad.sample_id}",
            step=step,
        )
    if quarantine.exceeded:
        run_folder.warn(
            f"stopped: {len(quarantine.bad)} damaged samples, data.max_quarantined is "
            f"{quarantine.limit}; see {quarantine.path}, check the dataset with "
            "tools/verify_shards.py, copy it again, and go on with --resume",
            step=step,
        )
    return quarantine.exceeded
