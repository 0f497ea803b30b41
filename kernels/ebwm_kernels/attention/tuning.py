"""Tile sizes of the Triton attention kernels per architecture.

Nothing is timed at import or at a first call: the table is data.

The rows were chosen by what the compiler makes of them (no registers spilled, shared memory that
fits, tensor cores in use), which `tools/compile_kernels.py` shows and
tests/kernels/test_attention_compiled.py holds them to, not by timing; `tools/bench_kernels.py
--tune` times alternatives on a GPU and prints rows for this file.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    rows: int  # query rows of a tile (BM)
    keys: int  # keys of a tile (BN)
    warps: int
    stages: int  # of the software pipeline over the inner loop


KERNELS = (
    "_forward",
    "_gradient_query",
    "_gradient_key",
    "_tangent",
    "_second_own",
    "_second_query",
    "_second_key",
)
OVER_KEYS = ("_gradient_key", "_second_key")  # a program owns keys; the others own query rows

# Head dimensions that kernels compute in, and the columns of one tile: tiles have powers of two of
# them, so 96 and 192 are three.
PADDED = {16: 16, 32: 32, 64: 64, 96: 32, 128: 128, 192: 64, 256: 256}

# Half precision: architecture -> largest padded head dimension -> kernel -> tile, and in KEYS the
# tile where cotangents on dK and dV are given, or own keys come in groups, which always have them.
HALF = {
    "sm_80": {
        64: {
            "_forward": Tile(128, 64, 8, 2),
            "_gradient_query": Tile(128, 64, 8, 2),
            "_gradient_key": Tile(64, 32, 8, 2),
            "_tangent": Tile(64, 32, 4, 2),
            "_second_own": Tile(32, 16, 4, 1),
            "_second_query": Tile(64, 32, 4, 2),
            "_second_key": Tile(64, 32, 8, 2),
        },
        96: {
            "_forward": Tile(64, 64, 4, 2),
            "_gradient_query": Tile(64, 64, 4, 2),
            "_gradient_key": Tile(16, 64, 4, 2),
            "_tangent": Tile(64, 32, 4, 2),
            "_second_own": Tile(32, 16, 8, 1),
            "_second_query": Tile(64, 32, 4, 2),
            "_second_key": Tile(16, 64, 4, 2),
        },
        128: {
            "_forward": Tile(64, 64, 8, 2),
            "_gradient_query": Tile(64, 64, 8, 2),
            "_gradient_key": Tile(64, 32, 8, 2),
            "_tangent": Tile(64, 64, 8, 2),
            "_second_own": Tile(32, 16, 8, 1),
            "_second_query": Tile(64, 64, 8, 2),
            "_second_key": Tile(64, 32, 8, 2),
        },
        256: {
            "_forward": Tile(64, 32, 8, 2),
            "_gradient_query": Tile(32, 32, 8, 2),
            "_gradient_key": Tile(32, 32, 8, 2),
            "_tangent": Tile(32, 32, 4, 2),
            "_second_own": Tile(16, 16, 8, 1),
            "_second_query": Tile(32, 32, 4, 2),
            "_second_key": Tile(32, 32, 8, 2),
        },
    },
    "sm_90": {
        64: {
            "_forward": Tile(64, 64, 4, 2),
            "_gradient_query": Tile(64, 64, 4, 2),
            "_gradient_key": Tile(32, 64, 4, 2),
            "_tangent": Tile(64, 64, 4, 2),
            "_second_own": Tile(32, 16, 4, 1),
            "_second_query": Tile(64, 64, 4, 2),
            "_second_key": Tile(32, 64, 4, 2),
        },
        128: {
            "_forward": Tile(64, 64, 4, 2),
            "_gradient_query": Tile(64, 64, 8, 2),
            "_gradient_key": Tile(32, 128, 8, 2),
            "_tangent": Tile(64, 64, 4, 2),
            "_second_own": Tile(32, 16, 8, 1),
            "_second_query": Tile(64, 32, 4, 2),
            "_second_key": Tile(32, 128, 8, 2),
        },
        256: {
            "_forward": Tile(64, 64, 8, 2),
            "_gradient_query": Tile(32, 32, 8, 2),
            "_gradient_key": Tile(32, 32, 8, 2),
            "_tangent": Tile(32, 32, 4, 2),
            "_second_own": Tile(16, 16, 8, 1),
            "_second_query": Tile(32, 32, 4, 2),
            "_second_key": Tile(32, 32, 8, 2),
        },
    },
}
HALF["sm_86"] = HALF["sm_80"]  # 8.6, 8.9 and 12.x: 99 KiB of shared memory per block
# 10.0 and 10.3 keep sums of products in tensor memory, 512 columns for all programs of a
# multiprocessor: what is wider on Hopper is halved.
HALF["sm_100"] = HALF["sm_90"] | {
    64: HALF["sm_90"][64] | {"_second_query": Tile(64, 64, 8, 2)},
    128: HALF["sm_90"][128] | {"_second_key": Tile(32, 64, 8, 2)},
}
KEYS = {
    "sm_80": {
        64: {},
        96: {"_second_query": Tile(32, 16, 4, 2)},
        128: {"_tangent": Tile(32, 64, 8, 2), "_second_query": Tile(32, 64, 8, 2)},
        256: {
            "_tangent": Tile(16, 32, 4, 2),
            "_second_query": Tile(16, 32, 4, 2),
            "_second_key": Tile(32, 16, 8, 2),
        },
    },
    "sm_90": {
        64: {},
        128: {"_tangent": Tile(64, 32, 4, 2)},
        256: {"_tangent": Tile(16, 32, 4, 2), "_second_query": Tile(16, 32, 4, 2)},
    },
}
# Head dimensions to 32.
SMALL_HEADS = {
    (architecture, kernel): tile
    for architecture in ("sm_80", "sm_86")
    for kernel, tile in (
        ("_gradient_query", Tile(64, 32, 4, 2)),
        ("_second_key", Tile(32, 32, 4, 2)),
    )
}
KEYS["sm_86"] = KEYS["sm_80"]
KEYS["sm_100"] = KEYS["sm_90"]

# float32 in three TF32 passes takes twice the shared memory and more registers: small tiles for all
# architectures, and head dimensions to 128.
SINGLE = Tile(16, 32, 4, 1)
SINGLE_EXCEPT = {
    64: {
        "_gradient_key": Tile(32, 16, 4, 1),
        "_second_query": Tile(16, 32, 8, 1),
        "_second_key": Tile(32, 16, 4, 1),
    },
    128: {
        "_gradient_key": Tile(32, 16, 4, 1),
        "_second_query": Tile(16, 16, 8, 1),
        "_second_key": Tile(16, 16, 8, 1),
    },
}
SINGLE_KEYS = {
    64: {"_tangent": Tile(16, 32, 8, 1), "_second_key": Tile(16, 16, 4, 1)},
    96: {"_tangent": Tile(16, 32, 8, 1), "_second_query": Tile(16, 32, 8, 1)},
    128: {"_tangent": Tile(16, 32, 8, 1)},
}
SINGLE_EXCEPT[96] = SINGLE_EXCEPT[128]
MAX_HEAD_DIMENSION = {
    torch.float16: 256,
    torch.bfloat16: 256,
    torch.float32: 128,
    torch.float64: 256,
}  # float64: the interpreter


def padded_for(head_dimension: int) -> int:
    """The columns that a head of 1 to 256 is computed in, a key of PADDED."""
    return next(size for size in PADDED if head_dimension <= size)


def part_for(architecture: str, padded_d: int, dtype: torch.dtype) -> int:
    """How many of the padded_d columns a kernel holds as one tile."""
    if architecture == "interpreter":  # small, so that tests meet several
        return min(padded_d, 32)
    return min(PADDED[padded_d], 64) if dtype == torch.float32 else PADDED[padded_d]


def tile_for(
    kernel: str, architecture: str, padded_d: int, dtype: torch.dtype, with_keys: bool
) -> Tile:
    """The tile of a kernel: padded_d is a key of PADDED; with_keys where there are cotangents on dK
    and dV, or groups of own keys.
    """
    if architecture == "interpreter":  # small, and rows != keys, so that tests meet many tiles
        return Tile(16, 32, 4, 1) if kernel in OVER_KEYS else Tile(32, 16, 4, 1)
    if dtype == torch.float32:
        bucket = max(padded_d, 64)
        tile = SINGLE_EXCEPT[bucket].get(kernel, SINGLE)
        return SINGLE_KEYS[bucket].get(kernel, tile) if with_keys else tile
    bucket = next(size for size in HALF[architecture] if padded_d <= size)
    tile = HALF[architecture][bucket][kernel]
    if padded_d <= 32:
        tile = SMALL_HEADS.get((architecture, kernel), tile)
    return KEYS[architecture][bucket].get(kernel, tile) if with_keys else tile


def architecture_of(capability: tuple[int, int]) -> str | None:
    """The architecture whose tiles serve a GPU of this compute capability, or None where there are
    none.
    """
    if capability == (8, 0):
        return "sm_80"
    if capability[0] == 9:
        return "sm_90"
    if capability in ((10, 0), (10, 3)):
        return "sm_100"
    if capability[0] in (8, 12):  # 8.6, 8.9, 12.x; 8.7 has more shared memory
        return "sm_86"
    return None
