"""Every random number of training, addressed instead of drawn.

The generator is counter-based and keyed by what the number is for:

    key = (seed, step)      counter = (0, position, sample, purpose)

so that the noise of a position is the same on whatever process, worker, micro-batch or tile it is
generated, and no state has to be saved or restored.

On a CPU the generator is NumPy's Philox4x64, one stream per (sample, position) row. Normal
numbers are made of its bits by the Box-Muller transform: half the time of NumPy's own normals, of
which a state over a vocabulary needs tens of millions.

On a GPU it is PyTorch's own Philox, seeded per sample and block of DEVICE_POSITIONS positions by a
hash of the same address. It is independent of processes, batches and tiles too, but gives other
numbers than a CPU's.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

EVALUATION_STEP = 2**62  # the noise address of evaluation: no training step has it
PARALLEL_SIZE = 2**18  # numbers from which on several threads make them
DEVICE_POSITIONS = 64  # positions that share a generator on a GPU: one launch each


class Purpose(IntEnum):
    """What a random number is for.

    Langevin noise of refinement step i uses LANGEVIN + i, so it must stay last.
    """

    INITIAL_STATE = 0
    STEP_SIZE = 1
    NUM_STEPS = 2
    REPLAY = 3
    WORKSPACE = 4
    LANGEVIN = 16


@dataclass(frozen=True)
class NoiseSource:
    """The random numbers of one training step (or of evaluation, where step is fixed)."""

    seed: int
    step: int

    def normal(
        self,
        sample_ids: Tensor,
        num_positions: int,
        size: int,
        *,
        purpose: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        first_position: int = 0,
    ) -> Tensor:
        """N(0, 1) of shape (B, num_positions, size) for the samples (B,) int64.

        Row (b, t) depends on its address alone.
        """
        device = torch.device(device)
        if device.type == "cpu":
            rows = self._normal_rows(
                sample_ids, num_positions, size, purpose, dtype, first_position
            )
            return torch.from_numpy(rows).to(dtype)
        first = first_position // DEVICE_POSITIONS
        last = -(-(first_position + num_positions) // DEVICE_POSITIONS)
        num_padded = (last - first) * DEVICE_POSITIONS
        result = torch.empty(len(sample_ids), num_padded, size, device=device, dtype=dtype)
        for b, sample in enumerate(sample_ids.tolist()):
            for block in range(first, last):
                generator = torch.Generator(device)
                generator.manual_seed(_hash(self.seed, self.step, purpose, sample, block))
                start = (block - first) * DEVICE_POSITIONS
                rows = result[b, start : start + DEVICE_POSITIONS]
                rows.normal_(generator=generator)
        start = first_position - first * DEVICE_POSITIONS
        return result[:, start : start + num_positions].contiguous()

    def _normal_rows(
        self,
        sample_ids: Tensor,
        num_positions: int,
        size: int,
        purpose: int,
        dtype: torch.dtype,
        first_position: int,
    ) -> np.ndarray:
        """N(0, 1) on a CPU, (B, num_positions, size) float32 or float64."""
        number = np.float64 if dtype == torch.float64 else np.float32
        rows = np.empty((len(sample_ids), num_positions, size), number)
        places = []
        for b, sample in enumerate(sample_ids.tolist()):
            places.extend((b, t, sample) for t in range(num_positions))

        def fill(part: list[tuple[int, int, int]]) -> None:
            stream = _Stream(self.seed, self.step)
            for b, t, sample in part:
                generator = stream.seek(0, first_position + t, sample, int(purpose))
                _normal(generator, rows[b, t])

        threads = 1
        if rows.size > PARALLEL_SIZE:  # NumPy works without the interpreter's lock
            threads = torch.get_num_threads()
        if threads == 1:
            fill(places)
            return rows
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, (places[i::threads] for i in range(threads))))
        return rows

    def uniform(
        self,
        sample_ids: Tensor,
        num_positions: int,
        *,
        purpose: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """U[0, 1) of shape (B, num_positions, 1); the same numbers on every device."""
        rows = [
            self._generator(purpose, sample, 0).random(num_positions)
            for sample in sample_ids.tolist()
        ]
        return torch.from_numpy(np.stack(rows)[..., None]).to(device=device, dtype=dtype)

    def integer(self, low: int, high: int, *, purpose: int, index: int = 0) -> int:
        """One integer of low..high, both included; the same on every rank."""
        return int(self._generator(purpose, index, 0).integers(low, high + 1))

    def _generator(self, purpose: int, sample: int, position: int) -> np.random.Generator:
        return np.random.Generator(
            np.random.Philox(
                key=_words(self.seed, self.step), counter=_words(0, position, sample, int(purpose))
            )
        )


class _Stream:
    """One Philox that is moved from address to address.

    Making one per row takes longer than a short row's numbers.
    """

    def __init__(self, *key: int):
        self.generator = np.random.Philox(key=_words(*key))
        self.state = self.generator.state

    def seek(self, *counter: int) -> np.random.Philox:
        """The generator as Philox(key, counter) would be."""
        self.state["state"]["counter"][:] = counter
        self.generator.state = self.state
        return self.generator


def _normal(generator: np.random.Philox, row: np.ndarray) -> None:
    """Fill a row (n,) with N(0, 1) by the Box-Muller transform.

    radius = sqrt(-2 ln u), u in (0, 1], from the first half of the bits; an angle in [-pi, pi]
    from the second. Every operation runs over a whole half, contiguously, so that a
    number depends on its place in the row alone.
    """
    half = (len(row) + 1) // 2
    if row.dtype == np.float64:
        bits = generator.random_raw(2 * half)
        radius = (bits[:half] >> np.uint64(11)).astype(np.float64)
        angle, width = (bits[half:] >> np.uint64(11)).astype(np.float64), 2.0**-53
        angle -= 2.0**52
    else:
        bits = generator.random_raw(half).view(np.uint32)
        radius, angle, width = (
            bits[:half].astype(np.float32),
            bits[half:].view(np.int32).astype(np.float32),
            2.0**-32,
        )
    radius += radius.dtype.type(0.5)
    radius *= radius.dtype.type(width)
    np.log(radius, out=radius)
    radius *= radius.dtype.type(-2)
    np.sqrt(radius, out=radius)
    angle *= angle.dtype.type(2 * np.pi * width)
    sine = np.sin(angle)
    np.cos(angle, out=angle)
    np.multiply(radius, angle, out=row[:half])
    np.multiply(radius[: len(row) - half], sine[: len(row) - half], out=row[half:])


def _words(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


def _hash(*values: int) -> int:
    """63 bits of an address, for generators that take a seed only."""
    digest = hashlib.blake2b(
        b"".join(int(v).to_bytes(8, "little") for v in values), digest_size=8
    ).digest()
    return int.from_bytes(digest, "little") >> 1
