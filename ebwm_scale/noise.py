"""Every random number of training, addressed instead of drawn: a counter-based generator keyed by what the number is for.

    key = (seed, step)      counter = (0, position, sample, purpose)

so that the noise of a position is the same on whatever process, worker, micro-batch or tile it is generated, and no state has to be
saved or restored. On a CPU the generator is NumPy's Philox4x64, one stream per (sample, position) row, and normal numbers are made of its
bits by the Box-Muller transform: half the time of NumPy's own normals, of which a state over a vocabulary needs tens of millions. On a GPU
it is PyTorch's own Philox, seeded per sample and block of DEVICE_POSITIONS positions by a hash of the same address: independent of processes,
batches and tiles too, but other numbers than a CPU's.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


PARALLEL_SIZE = 2**18  # numbers from which on several threads make them
DEVICE_POSITIONS = 64  # positions that share a generator on a GPU: one launch each


class Purpose(IntEnum):
    """What a random number is for; Langevin noise of refinement step i uses LANGEVIN + i, so it must stay last."""

    INITIAL_STATE = 0
    STEP_SIZE = 1
    NUM_STEPS = 2
    REPLAY = 3
    EVALUATION = 4
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
        """N(0, 1) of shape (B, num_positions, size) for the samples (B,) int64; row (b, t) depends on the address alone."""
        device = torch.device(device)
        if device.type == "cpu":
            rows = np.empty(
                (len(sample_ids), num_positions, size),
                np.float64 if dtype == torch.float64 else np.float32,
            )
            places = [
                (b, t, sample)
                for b, sample in enumerate(sample_ids.tolist())
                for t in range(num_positions)
            ]

            def fill(part: list[tuple[int, int, int]]) -> None:
                stream = _Stream(self.seed, self.step)
                for b, t, sample in part:
                    _normal(stream.at(0, first_position + t, sample, int(purpose)), rows[b, t])

            threads = (
                torch.get_num_threads() if rows.size > PARALLEL_SIZE else 1
            )  # NumPy works without the interpreter's lock
            if threads == 1:
                fill(places)
            else:
                with ThreadPoolExecutor(threads) as pool:
                    list(pool.map(fill, (places[i::threads] for i in range(threads))))
            return torch.from_numpy(rows).to(dtype)
        first, last = (
            first_position // DEVICE_POSITIONS,
            -(-(first_position + num_positions) // DEVICE_POSITIONS),
        )
        result = torch.empty(
            len(sample_ids), (last - first) * DEVICE_POSITIONS, size, device=device, dtype=dtype
        )
        for b, sample in enumerate(sample_ids.tolist()):
            for block in range(first, last):
                generator = torch.Generator(device)
                generator.manual_seed(_hash(self.seed, self.step, purpose, sample, block))
                result[b, (block - first) * DEVICE_POSITIONS :][:DEVICE_POSITIONS].normal_(
                    generator=generator
                )
        return result[:, first_position - first * DEVICE_POSITIONS :][
            :, :num_positions
        ].contiguous()

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
    """One Philox that is moved from address to address: making one per row takes longer than a short row's numbers."""

    def __init__(self, *key: int):
        self.generator = np.random.Philox(key=_words(*key))
        self.state = self.generator.state

    def at(self, *counter: int) -> np.random.Philox:
        """The generator as Philox(key, counter) would be."""
        self.state["state"]["counter"][:] = counter
        self.generator.state = self.state
        return self.generator


def _normal(generator: np.random.Philox, row: np.ndarray) -> None:
    """Fill a row (n,) with N(0, 1): radius sqrt(-2 ln u), u in (0, 1], from the first half of the bits, angle in [-pi, pi] from the second.

    Every operation runs over a whole half, contiguously, so that a number depends on its place in the row alone.
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
