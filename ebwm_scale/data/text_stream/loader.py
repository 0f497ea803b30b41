"""Batches of a stream of raw text, tokenised and packed by workers while the model trains.

    workers: lanes of this rank -> blocks of one optimizer step, with the lanes' cursors behind it
    main:    steps in turn      -> micro batches;  state() at a step's boundary

The blocks of a lane follow from its cursor alone, so batches depend neither on the number of
workers, nor on accumulation, nor on the number of processes.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ebwm_scale.core.errors import CheckpointError, UserError
from ebwm_scale.core.forking import parents_objects_kept
from ebwm_scale.data.format.content import TextContent
from ebwm_scale.data.format.manifest import Manifest
from ebwm_scale.data.loading.batches import (
    JOB_SIGNALS,
    Batch,
    check_context,
    stay_until_the_parent_ends_it,
    to_tensor,
)
from ebwm_scale.data.loading.quarantine import BadSample
from ebwm_scale.data.text_stream.lane import Cursor, Lane
from ebwm_scale.data.text_stream.strands import TextStream
from ebwm_scale.data.tokenizer import open_tokenizer

STATE_VERSION = 1
_LANE_BITS = 40  # of a sample id, for the number of a block in its lane
_MOST_NOTES = 100


class TextStreamLoader:
    """An endless iterator over this rank's micro batches, with BatchLoader's interface.

    stream: as open_text_stream gives it. manifest: whose tokenizer is used. state: what an earlier
    loader's state() gave, of all ranks; absent at the start. found, notes: damage, and what else
    was not read, since they were last cleared. Raises CheckpointError for a state of other files,
    DataError from next() when nothing can be read.
    """

    def __init__(
        self,
        stream: TextStream,
        manifest: Manifest,
        *,
        context_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        num_workers: int,
        first_step: int = 0,
        state: dict[str, Any] | None = None,
    ):
        check_context(manifest, context_length)
        per_rank = stream.num_lanes // world_size
        self.stream = stream
        self.lanes = range(rank * per_rank, (rank + 1) * per_rank)
        self.micro_batch_size = micro_batch_size
        self.micro_batches_per_step = global_batch_size // world_size // micro_batch_size
        self.global_batch_size = global_batch_size
        self.first_position = rank * (global_batch_size // world_size)
        self.step = first_step
        self.micro = 0
        self.found: list[BadSample] = []
        self.notes: list[str] = []
        self._num_notes = 0
        self._cursors = cursors_of(state, stream)
        self._rows: list[tuple[int, np.ndarray]] = []  # (sample id, block) of the step begun
        self._behind: dict[int, Cursor] = {}
        reading = _Reading(
            stream,
            manifest,
            context_length,
            blocks_per_lane=global_batch_size // stream.num_lanes,
            cursors={lane: self._cursors[lane] for lane in self.lanes},
        )
        self.num_workers = min(num_workers, len(self.lanes))
        options: dict[str, Any] = {}
        if self.num_workers:
            options = {
                "multiprocessing_context": multiprocessing.get_context("fork"),
                "prefetch_factor": 4,
                "worker_init_fn": stay_until_the_parent_ends_it,
            }
        self._loader: DataLoader | None = DataLoader(
            reading,
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=_same,
            generator=torch.Generator().manual_seed(0),
            **options,
        )
        self._iterator: Iterator | None = None

    def __iter__(self) -> TextStreamLoader:
        return self

    def __next__(self) -> Batch:
        if self.micro == 0:
            self._take_step()
        first = self.micro * self.micro_batch_size
        rows = self._rows[first : first + self.micro_batch_size]
        position = self.step * self.global_batch_size + self.first_position + first
        self.micro += 1
        if self.micro == self.micro_batches_per_step:
            self._cursors.update(self._behind)
            self.step, self.micro = self.step + 1, 0
        return Batch(
            sequences=to_tensor(np.stack([block for _, block in rows])),
            sample_ids=torch.tensor([sample_id for sample_id, _ in rows]),
            positions=torch.arange(position, position + self.micro_batch_size),
        )

    def state(self) -> dict[str, Any]:
        """The place before the step that is next, or was not given out to its end; JSON.

        Of this rank's lanes; a checkpoint holds those of all ranks (joined_states).
        """
        return {
            "version": STATE_VERSION,
            "fingerprint": self.stream.fingerprint,
            "num_lanes": self.stream.num_lanes,
            "lanes": {str(lane): self._cursors[lane].to_json() for lane in self.lanes},
        }

    def close(self) -> None:
        """Stop the workers; the loader cannot be used afterwards."""
        self._iterator = None
        self._loader = None

    def _take_step(self) -> None:
        """The blocks of the next step, of all workers, in the order of the lanes."""
        if self._iterator is None:
            self._iterator = self._started()
        blocks: dict[int, tuple[int, list[np.ndarray]]] = {}
        for _ in range(max(self.num_workers, 1)):
            outcome = next(self._iterator)
            if isinstance(outcome, UserError):
                raise outcome
            of_worker, cursors, found, notes = outcome
            blocks.update(of_worker)
            self._behind.update(cursors)
            self.found += found
            self._note(notes)
        self._rows = []
        for lane in self.lanes:
            first, of_lane = blocks[lane]
            sample_id = (lane << _LANE_BITS) + first
            self._rows += [(sample_id + i, block) for i, block in enumerate(of_lane)]

    def _note(self, lines: list[str]) -> None:
        room = max(_MOST_NOTES - self._num_notes, 0)
        self.notes += lines[:room]
        if self._num_notes <= _MOST_NOTES < self._num_notes + len(lines):
            self.notes.append(f"data.stream: more than {_MOST_NOTES} lines of this kind")
        self._num_notes += len(lines)

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


class _Reading(IterableDataset):
    """Endless steps of the lanes that a worker has; errors come back as values, as in BatchLoader.

    An item: ({lane: (number of its first block, blocks)}, {lane: cursor behind}, found, notes).
    """

    def __init__(
        self,
        stream: TextStream,
        manifest: Manifest,
        context_length: int,
        *,
        blocks_per_lane: int,
        cursors: dict[int, Cursor],
    ):
        self.stream = stream
        self.manifest = manifest
        self.context_length = context_length
        self.blocks_per_lane = blocks_per_lane
        self.cursors = cursors

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        mine = list(self.cursors)
        if worker is not None:
            mine = mine[worker.id :: worker.num_workers]
        try:
            lanes = self._lanes(mine)
            while True:
                blocks = {}
                for lane in lanes:
                    first = lane.cursor.num_blocks
                    blocks[lane.number] = (
                        first,
                        [lane.block() for _ in range(self.blocks_per_lane)],
                    )
                found = [bad for lane in lanes for bad in lane.found]
                notes = [line for lane in lanes for line in lane.notes]
                for lane in lanes:
                    lane.found, lane.notes = [], []
                yield blocks, {lane.number: lane.cursor for lane in lanes}, found, notes
        except UserError as error:
            while True:  # however often it is asked
                yield error

    def _lanes(self, numbers: list[int]) -> list[Lane]:
        content = self.manifest.content
        assert isinstance(content, TextContent), "open_text_stream has refused other datasets"
        tokenizer = open_tokenizer(content.tokenizer_path, eos_id=content.eos_id)
        return [
            Lane(
                self.stream,
                number,
                tokenizer,
                context_length=self.context_length,
                cursor=self.cursors[number],
            )
            for number in numbers
        ]


def joined_states(states: list[dict[str, Any]]) -> dict[str, Any]:
    """One state of those of all ranks."""
    lanes = {lane: cursor for state in states for lane, cursor in state["lanes"].items()}
    return {**states[0], "lanes": lanes}


def cursors_of(state: dict[str, Any] | None, stream: TextStream) -> dict[int, Cursor]:
    """The cursor of every lane; CheckpointError for a state that is not of this stream."""
    if state is None:
        return {lane: Cursor() for lane in range(stream.num_lanes)}
    try:
        version, fingerprint = state["version"], state["fingerprint"]
        cursors = {int(lane): Cursor.from_json(v) for lane, v in state["lanes"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"the checkpoint's place in data.stream is damaged ({type(error).__name__}: {error}); "
            "resume from an earlier checkpoint"
        ) from None
    if version != STATE_VERSION:
        raise CheckpointError(
            f"the checkpoint's place in data.stream has version {version!r}, this release reads "
            f"{STATE_VERSION}; resume with the release that wrote it"
        )
    if fingerprint != stream.fingerprint or cursors.keys() != set(range(stream.num_lanes)):
        raise CheckpointError(
            f"the checkpoint's place is one in other files than data.stream names now (names and "
            f"sizes, data.stream_buffer and data.stream_lanes {len(cursors)} then, "
            f"{stream.num_lanes} now): put the same files back, or start a new run"
        )
    return cursors


def _same(item: Any) -> Any:
    """No collation: numpy arrays travel through the pipe."""
    return item
