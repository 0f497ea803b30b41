"""Batches: what one rank trains on at one step.

    stream position     0 ............ G | G ............ 2G | ...   step s: s G .. (s + 1) G
    inside a step       [ rank 0 ][ rank 1 ] ... [ rank R-1 ]         contiguous slices
    inside a rank       [ micro batch ][ micro batch ] ...            slices of micro_batch_size

The main process asks the split's order which samples these are; workers are stateless and only read
them. So the same step has the same global batch for every world size, accumulation, number of
workers and resume. A run's position in the data is its step; DataState, and the list of quarantined
samples (data/loading/quarantine.py), is all there is to save.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ebwm_scale.config.batch_ramp import BatchRamp
from ebwm_scale.core.errors import CheckpointError, DataError, UserError
from ebwm_scale.core.forking import parents_objects_kept
from ebwm_scale.data.format.content import Sample
from ebwm_scale.data.format.manifest import Manifest
from ebwm_scale.data.format.shards import ShardedSplit
from ebwm_scale.data.loading.mixture import MixedOrder, MixedSplit
from ebwm_scale.data.loading.quarantine import BadSample, read_or_replace
from ebwm_scale.data.loading.skipped import Ranges, positions_of
from ebwm_scale.data.order import SampleOrder

STATE_VERSION = 1
JOB_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2}


@dataclass(frozen=True)
class Batch:
    """b samples of S + 1 states as stored.

    These are token ids (b, S + group_size) int64, marked where they are not scored
    (data/format/scored.py), embeddings (b, S + 1, dimension) float32, or frames
    (b, S + 1, height, width, 3) uint8.

    conditions: per name as stored, of the F - 1 steps between the frames of a clip: float32
    (b, F - 1, width), int64 where discrete; none where the dataset has none.
    """

    sequences: torch.Tensor
    sample_ids: torch.Tensor  # (b,) int64, index in the split
    positions: torch.Tensor  # (b,) int64, global stream positions (in validation: the sample ids)
    conditions: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class DataState:
    """Where a run is in its data; `step` is the next optimizer step."""

    fingerprint: str
    seed: int
    step: int
    version: int = STATE_VERSION

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def load_state_dict(cls, values: dict[str, Any], *, fingerprint: str, seed: int) -> DataState:
        """The saved state, if it belongs to this data and seed; CheckpointError that names both
        otherwise.
        """
        try:
            state = cls(
                fingerprint=str(values["fingerprint"]),
                seed=int(values["seed"]),
                step=int(values["step"]),
                version=values["version"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint's data state is damaged ({type(error).__name__}: {error}); resume "
                "from an earlier checkpoint"
            ) from None
        if state.version != STATE_VERSION:
            raise CheckpointError(
                f"the checkpoint's data state has version {state.version!r}, this release reads "
                f"{STATE_VERSION}; resume with the release that wrote it"
            )
        if state.fingerprint != fingerprint:
            raise CheckpointError(
                f"the checkpoint was trained on the dataset with fingerprint {state.fingerprint}, "
                f"data.manifest has {fingerprint}; resume with the same dataset, or start a new run"
            )
        if state.seed != seed:
            raise CheckpointError(
                f"the checkpoint was trained with train.seed {state.seed}, the configuration says "
                f"{seed}; resume with train.seed={state.seed}, or start a new run"
            )
        return state


class BatchLoader:
    """An endless iterator over this rank's micro batches, from the first one of optimizer step
    `first_step` on.

    split: as opened by open_sources.  context_length: observed tokens per sample, at most what the
    shards were packed for.  seed, window_shards: of SampleOrder.  num_workers: reading processes;
    with any number the batches are the same. known_bad: quarantined samples by id; what is found
    while reading is added to `found`. skipped: positions that are left out;
    ramp: batches before they have global_batch_size samples. Raises DataError at
    construction if the blocks are too short, and from next() if nothing readable is near a damaged
    sample; ValueError if global_batch_size does not divide over the ranks and micro batches.
    """

    def __init__(
        self,
        split: ShardedSplit | MixedSplit,
        *,
        context_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        window_shards: int,
        num_workers: int,
        first_step: int = 0,
        known_bad: dict[int, BadSample] | None = None,
        skipped: Ranges = (),
        ramp: BatchRamp | None = None,
    ):
        check_context(split.manifest, context_length)
        if not 0 <= rank < world_size or first_step < 0 or num_workers < 0:
            raise ValueError(
                f"rank {rank} of {world_size}, first_step {first_step}, num_workers "
                f"{num_workers}: out of range"
            )
        if (
            global_batch_size < 1
            or micro_batch_size < 1
            or global_batch_size % (world_size * micro_batch_size)
        ):
            raise ValueError(
                f"global_batch_size {global_batch_size} is not a multiple of {world_size} ranks x "
                f"micro_batch_size {micro_batch_size}"
            )
        ramp = ramp or BatchRamp((), global_batch_size)
        self.micro_batches_per_step = ramp.final // world_size // micro_batch_size  # of a full one
        order = split.order(seed=seed, window_shards=window_shards)
        split.keep(window_shards=window_shards)
        self.found: list[BadSample] = []
        requests = _Requests(
            order,
            ramp=ramp,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
            first_step=first_step,
            skipped=skipped,
        )
        options: dict[str, Any] = {}
        if num_workers:
            # fork: no second import of torch per worker, and workers touch neither CUDA nor any
            # thread of the parent
            options = {
                "multiprocessing_context": multiprocessing.get_context("fork"),
                "persistent_workers": True,
                "prefetch_factor": 4,
                "worker_init_fn": stay_until_the_parent_ends_it,
            }
        # The loader draws a base seed; without a generator of its own it would take it from the
        # global one.
        self._loader: DataLoader | None = DataLoader(
            _Reader(split, context_length, known_bad or {}),
            batch_size=None,
            sampler=requests,
            num_workers=num_workers,
            collate_fn=_same,
            generator=torch.Generator().manual_seed(0),
            **options,
        )
        self._iterator: Iterator | None = None

    def __iter__(self) -> BatchLoader:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._started()
        batch, found = _batch(*next(self._iterator))
        self.found += found
        return batch

    def _started(self) -> Iterator:
        if self._loader is None:
            raise RuntimeError("the loader is closed")
        # Workers inherit the mask: see stay_until_the_parent_ends_it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
        try:
            with parents_objects_kept():
                return iter(self._loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def close(self) -> None:
        """Stop the workers; the loader cannot be used afterwards."""
        self._iterator = None
        self._loader = None


def validation_batches(
    split: ShardedSplit | MixedSplit,
    *,
    context_length: int,
    batch_size: int,
    max_samples: int,
    rank: int,
    world_size: int,
    found: list[BadSample] | None = None,
) -> Iterator[Batch]:
    """This rank's part of the samples that evaluation takes, in their order: ranks take contiguous
    slices of equal size (+-1).

    The last batch can be smaller, and a rank can have none when there are fewer samples than ranks.
    Damaged samples are replaced and added to `found`. Raises DataError.
    """
    check_context(split.manifest, context_length)
    if not 0 <= rank < world_size or batch_size < 1 or max_samples < 1:
        raise ValueError(
            f"rank {rank} of {world_size}, batch_size {batch_size}, max_samples {max_samples}: "
            "out of range"
        )
    reader, ids = _Reader(split, context_length, {}), split.evaluated(max_samples)
    first, end = len(ids) * rank // world_size, len(ids) * (rank + 1) // world_size
    for start in range(first, end, batch_size):
        part = ids[start : min(start + batch_size, end)]
        batch, bad = _batch(*reader[(part, part)])
        if found is not None:
            found += bad
        yield batch


class _Requests:
    """(sample ids, positions) of each micro batch of a rank, without end: what the sampler is to a
    DataLoader.
    """

    def __init__(
        self,
        order: SampleOrder | MixedOrder,
        *,
        ramp: BatchRamp,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        first_step: int,
        skipped: Ranges = (),
    ):
        self.order = order
        self.skipped = skipped
        self.ramp = ramp
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.first_step = first_step

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        step = self.first_step
        while True:
            per_rank = self.ramp.size(step) // self.world_size
            start = self.ramp.samples_before(step) + self.rank * per_rank
            for first in range(start, start + per_rank, self.micro_batch_size):
                positions = positions_of(first, self.micro_batch_size, self.skipped)
                yield self._samples(positions), positions
            step += 1

    def _samples(self, positions: np.ndarray) -> np.ndarray:
        """Of rising positions, a run of neighbours at a time."""
        ends = np.flatnonzero(np.diff(positions) != 1) + 1
        runs = np.split(positions, ends)
        return np.concatenate([self.order.samples(int(run[0]), len(run)) for run in runs])


class _Reader(Dataset):
    """Reads requests.

    Errors come back as values: a raised one would reach the user as a worker's traceback.
    """

    def __init__(
        self, split: ShardedSplit | MixedSplit, context_length: int, known_bad: dict[int, BadSample]
    ):
        self.split = split
        self.context_length = context_length
        self.known_bad = dict(known_bad)

    def __getitem__(self, request: tuple[np.ndarray, np.ndarray]):
        sample_ids, positions = request
        before = dict(self.known_bad)
        content = self.split.manifest.content
        length = self.context_length + content.group_size
        conditions: dict[str, np.ndarray] = {}
        try:
            samples = [
                content.first(read_or_replace(self.split, int(i), self.known_bad), length)
                for i in sample_ids
            ]
            sequences, conditions = stacked(samples)
            problem = content.problem(sequences)
            if problem is not None:  # checksums are right, so the dataset was made wrong
                raise DataError(
                    f"{self.split.manifest.path}: one of the samples {sample_ids.tolist()} "
                    f"{problem}; find it with tools/verify_shards.py"
                )
        except UserError as error:
            sequences = error
        return (
            sequences,
            conditions,
            sample_ids,
            positions,
            [bad for i, bad in self.known_bad.items() if before.get(i) != bad],
        )


def _batch(
    sequences: np.ndarray | UserError,
    conditions: dict[str, np.ndarray],
    sample_ids: np.ndarray,
    positions: np.ndarray,
    found: list[BadSample],
) -> tuple[Batch, list[BadSample]]:
    if isinstance(sequences, UserError):
        raise sequences
    return Batch(
        sequences=to_tensor(sequences),
        sample_ids=torch.from_numpy(sample_ids),
        positions=torch.from_numpy(positions),
        conditions=to_tensors(conditions),
    ), found


def stacked(samples: Sequence[Sample]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(the states of samples, their conditions), a batch of each."""
    names = samples[0].conditions
    return (
        np.stack([sample.states for sample in samples]),
        {name: np.stack([sample.conditions[name] for sample in samples]) for name in names},
    )


def to_tensors(conditions: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Continuous conditions as float32, values of discrete ones as int64."""
    return {name: to_tensor(values) for name, values in conditions.items()}


def to_tensor(sequences: np.ndarray) -> torch.Tensor:
    """Token ids as int64, embeddings as float32; frames stay bytes: their encoder takes them so."""
    if sequences.dtype != np.uint8 or sequences.ndim == 2:
        sequences = sequences.astype(np.float32 if sequences.dtype.kind == "f" else np.int64)
    return torch.from_numpy(sequences)


def _same(item: Sequence) -> Sequence:
    """No collation: numpy arrays travel through the pipe; tensors would need shared memory, which
    containers often lack.
    """
    return item


def check_context(manifest: Manifest, context_length: int) -> None:
    """DataError if the samples of a dataset are shorter than the context, or it cuts a group or an
    instance of a task.
    """
    packed, group_size = manifest.context_length, manifest.content.group_size
    if getattr(manifest.content, "is_padded", False) and context_length != packed:
        raise DataError(
            f"data.context_length is {context_length}: the blocks of {manifest.path} have {packed} "
            "observed tokens, packed by best fit, and are not cut; leave the key out, or pack again"
        )
    if manifest.content.members and context_length != packed:
        raise DataError(
            f"data.context_length is {context_length}: the instances of {manifest.path} have "
            f"{packed} observed tokens each, and are not cut; leave the key out"
        )
    if context_length % group_size:
        raise DataError(
            f"data.context_length is {context_length}: the samples of {manifest.path} are groups "
            f"of {group_size} {manifest.content.unit}; use a multiple of it, up to {packed}, or "
            "leave the key out"
        )
    if not 1 <= context_length <= packed:
        tool = f"tools/make_{manifest.modality}_shards.py"
        raise DataError(
            f"data.context_length is {context_length}: the shards of {manifest.path} were packed "
            f"for {packed}; use 1 to {packed}, or pack again with {tool} --context-length "
            f"{context_length}"
        )


def stay_until_the_parent_ends_it(worker: int) -> None:
    """A scheduler signals every process of a job; the rank saves and leaves on its own, so its
    workers must outlive the signal.

    Workers start with the job's signals blocked. SIGTERM is still obeyed when it comes from the
    parent, which ends its workers that way; and a worker whose parent is gone leaves by itself.
    """
    parent = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
