"""Tile sizes of the Triton attention kernels per architecture. Nothing is timed at import or at a first call: the table is data.

The rows below were chosen by ahead-of-time compilation (registers, spills, shared memory: tests/kernels/test_attention_compiled.py), not by
timing; `tools/bench_kernels.py --tune` times alternatives on a GPU and prints rows for this file.
"""
from __future__ import annotations

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    rows: int           # query rows of a tile (BM)
    keys: int           # keys of a tile (BN)
    warps: int
    stages: int         # of the software pipeline over the inner loop


ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "interpreter")
OVER_KEYS = ("_gradient_key", "_second_key")
KERNELS = ("_forward", "_gradient_query", "_gradient_key", "_tangent", "_second_own", "_second_query", "_second_key")


def tile_for(kernel: str, architecture: str, padded_d: int, dtype: torch.dtype, with_keys: bool) -> Tile:
    """The tile of a kernel: padded_d is a power of two from 16 to 256; with_keys where there are cotangents on dK and dV."""
    if architecture == "interpreter":       # small, and rows != keys, so that tests meet many tiles
        return Tile(16, 32, 4, 1) if kernel in OVER_KEYS else Tile(32, 16, 4, 1)
    return Tile(64, 64, 4, 2)
