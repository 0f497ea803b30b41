"""The replay buffer: half of a batch restarts from final states of earlier steps, with the context
they belong to.

Samples of a global batch come in pairs (2 i, 2 i + 1). The even one is always fresh; the odd one is
replaced by an entry of the pair's own queue once there is one. After the step both final states
enter the queue, and the oldest leave. So what is replayed depends on the step's place in the order
of data alone: not on the number of processes or micro-batches, as long as a pair stays on one rank.
Which entry of a queue is drawn is addressed by (seed, step, pair).

Memory: `capacity` samples over all ranks, each S x size numbers in bfloat16 (8 bits of mantissa: a
state restarts within 0.4 % of where it ended), its sequence and its conditions.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebwm_scale.data.loading.batches import Batch
from ebwm_scale.refinement.noise import NoiseSource, Purpose


class Entry(NamedTuple):
    """A sample as stored, and the states (S, size) that its refinement ended with."""

    sequence: Tensor
    state: Tensor
    conditions: dict[str, Tensor]


class ReplayBuffer:
    VERSION = 1
    DTYPE = torch.bfloat16  # of stored states

    def __init__(self, *, capacity: int, global_batch_size: int):
        self.num_pairs = global_batch_size // 2
        self.per_pair = max(1, capacity // self.num_pairs)
        self.queues: dict[int, deque[Entry]] = {}

    def restart(
        self, batch: Batch, source: NoiseSource
    ) -> tuple[Batch, tuple[Tensor, Tensor] | None]:
        """Put stored samples in the odd places of a batch, with their conditions.

        Returns the batch, and (rows (n,) int64, states (n, S, size)) to restart from, or None
        while there is nothing stored.
        """
        rows = []
        states = []
        sequences = batch.sequences.clone()
        conditions = {name: values.clone() for name, values in batch.conditions.items()}
        for row, pair in self._rows(batch.positions, odd=True):
            queue = self.queues.get(pair)
            if queue:
                entry = queue[source.integer(0, len(queue) - 1, purpose=Purpose.REPLAY, index=pair)]
                sequences[row] = entry.sequence
                for name, values in conditions.items():
                    values[row] = entry.conditions[name]
                rows.append(row)
                states.append(entry.state)
        replayed = replace(batch, sequences=sequences, conditions=conditions)
        return replayed, ((torch.tensor(rows), torch.stack(states)) if rows else None)

    def store(self, batch: Batch, states: Tensor) -> None:
        """Remember the final states (b, S, size) of a batch."""
        stored = states.detach().to("cpu", self.DTYPE)
        for odd in (False, True):
            for row, pair in self._rows(batch.positions, odd=odd):
                entry = Entry(
                    batch.sequences[row].cpu().clone(),
                    stored[row].clone(),
                    {name: values[row].cpu().clone() for name, values in batch.conditions.items()},
                )
                self.queues.setdefault(pair, deque(maxlen=self.per_pair)).append(entry)

    def state_dict(self) -> dict[str, Any]:
        """Plain values; an entry without conditions is (sequence, state), as it always was."""
        queues = {}
        for pair, queue in self.queues.items():
            queues[pair] = [tuple(entry if entry.conditions else entry[:2]) for entry in queue]
        return {"version": self.VERSION, "num_pairs": self.num_pairs, "queues": queues}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        if values["version"] != self.VERSION or values["num_pairs"] != self.num_pairs:
            raise ValueError(
                f"replay buffer of version {values['version']} with {values['num_pairs']} pairs; "
                f"expected {self.VERSION}, {self.num_pairs}"
            )
        self.queues = {}
        for pair, stored in values["queues"].items():
            self.queues[pair] = deque(maxlen=self.per_pair)
            for sequence, state, *conditions in stored:
                self.queues[pair].append(Entry(sequence, state, *conditions or [{}]))

    def _rows(self, positions: Tensor, *, odd: bool) -> list[tuple[int, int]]:
        """(row, pair) of the batch's even or odd samples."""
        slots = (positions % (2 * self.num_pairs)).tolist()
        return [(row, slot // 2) for row, slot in enumerate(slots) if slot % 2 == odd]
