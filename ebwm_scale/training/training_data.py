"""What the trainer asks of its data: the loader of the training split, and a word for every sample
that is set aside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ebwm_scale.config import resolved
from ebwm_scale.config.batch_ramp import BatchRamp
from ebwm_scale.config.schema import Config
from ebwm_scale.core.world import World
from ebwm_scale.data.format.shards import ShardedSplit
from ebwm_scale.data.loading.batches import BatchLoader
from ebwm_scale.data.loading.mixture import MixedSplit
from ebwm_scale.data.loading.quarantine import BadSample, Quarantine
from ebwm_scale.data.loading.skipped import Ranges
from ebwm_scale.data.loading.streaming import StreamLoader
from ebwm_scale.data.text_stream.loader import TextStreamLoader, joined_states
from ebwm_scale.data.text_stream.strands import TextStream
from ebwm_scale.training.run_folder import RunFolder

Loader = BatchLoader | StreamLoader | TextStreamLoader


def training_loader(
    config: Config,
    split: ShardedSplit | MixedSplit,
    world: World,
    *,
    micro_batch: int,
    first_step: int,
    first_shard: int,
    text_stream: TextStream | None,
    text_place: dict[str, Any] | None,
    known_bad: dict[int, BadSample],
    warn: Callable[[str], None],
    allow_pipe: bool,
    skipped: Ranges = (),
) -> Loader:
    """This rank's micro-batches from `first_step` on.

    first_shard: of a stream of shards (data.stream). text_stream, text_place: of a stream of raw
    text, and where in it to start. known_bad: damaged samples and what stands in for them, where
    there is no stream; skipped: positions of the order that are left out.
    """
    common: dict[str, Any] = {
        "context_length": resolved.context_length(config),
        "global_batch_size": config.train.global_batch_size,
        "micro_batch_size": micro_batch,
        "rank": world.reader,
        "world_size": world.num_readers,
        "first_step": first_step,
    }
    if text_stream is not None:
        return TextStreamLoader(
            text_stream,
            split.manifest,
            num_workers=config.data.num_workers,
            state=text_place,
            **common,
        )
    common["seed"] = config.train.seed
    if config.data.stream:
        return StreamLoader(
            config.data.stream,
            split.manifest,
            buffer=config.data.stream_buffer,
            first_shard=first_shard,
            report=warn,
            allow_pipe=allow_pipe,
            cache_folder=config.data.cache.folder,
            cache_bytes=round(config.data.cache.limit_gib * 2**30),
            **common,
        )
    return BatchLoader(
        split,
        window_shards=config.data.window_shards,
        num_workers=config.data.num_workers,
        known_bad=known_bad,
        skipped=skipped,
        ramp=BatchRamp.of(config.train),
        **common,
    )


def text_place_of(loader: Loader, world: World) -> dict[str, Any] | None:
    """Where a stream of raw text is, on all ranks, for a checkpoint; None for other loaders."""
    if not isinstance(loader, TextStreamLoader):
        return None
    return joined_states(world.all_gather_object(loader.state()))


def notes_of(loader: Loader) -> list[str]:
    """What a stream of raw text has not read since it was asked last, a line each."""
    if not isinstance(loader, TextStreamLoader):
        return []
    notes, loader.notes = loader.notes, []
    return notes


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
