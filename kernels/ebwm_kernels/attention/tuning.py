"""Tile sizes of the Triton attention kernels per architecture.

Nothing is timed at import or at a first call: the table is data.

The rows were chosen by what the compiler makes of them (no want of registers, shared memory that
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
    # Of a thread, at most: where the compiler takes a few more than it needs, and one program fewer
    # fits a multiprocessor.
    registers: int | None = None


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
            "_forward": Tile(128, 64, 8, 3),
            "_gradient_query": Tile(128, 64, 8, 3),
            "_gradient_key": Tile(64, 32, 8, 3),
            "_tangent": Tile(64, 32, 4, 3, 168),
            "_second_own": Tile(32, 16, 4, 1),
            "_second_query": Tile(64, 32, 8, 3),
            "_second_key": Tile(64, 32, 8, 3),
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
            "_forward": Tile(64, 64, 8, 3),
            "_gradient_query": Tile(64, 64, 8, 3),
            "_gradient_key": Tile(64, 32, 8, 2, 128),
            "_tangent": Tile(64, 64, 8, 3),
            "_second_own": Tile(32, 16, 8, 1),
            "_second_query": Tile(64, 64, 8, 3),
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
            "_forward": Tile(64, 64, 4, 3),
            "_gradient_query": Tile(64, 64, 4, 3),
            "_gradient_key": Tile(32, 64, 4, 3),
            "_tangent": Tile(64, 64, 4, 3),
            "_second_own": Tile(32, 16, 4, 1),
            "_second_query": Tile(64, 64, 4, 3, 168),
            "_second_key": Tile(32, 64, 4, 3, 168),
        },
        128: {
            "_forward": Tile(64, 64, 4, 3),
            "_gradient_query": Tile(64, 64, 8, 3),
            "_gradient_key": Tile(32, 128, 8, 3),
            "_tangent": Tile(64, 32, 4, 2),
            "_second_own": Tile(32, 16, 8, 1),
            "_second_query": Tile(64, 32, 4, 3),
            "_second_key": Tile(32, 128, 8, 3),
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


def _two_stages(tiles: dict[int, dict[str, Tile]]) -> dict[int, dict[str, Tile]]:
    """The same tiles where memory, or what is known of the registers, is not enough for more."""
    return {
        size: {
            kernel: tile._replace(stages=min(tile.stages, 2), registers=None)
            for kernel, tile in of_kernel.items()
        }
        for size, of_kernel in tiles.items()
    }


# 8.6, 8.9 and 12.x: 99 KiB of shared memory per block.
HALF["sm_86"] = _two_stages(HALF["sm_80"])
HALF["sm_86"][128]["_forward"] = Tile(32, 64, 4, 2)
# 10.0 and 10.3 keep sums of products in tensor memory, 512 columns for all programs of a
# multiprocessor: what is wider on Hopper is halved.
HALF["sm_100"] = _two_stages(HALF["sm_90"])
HALF["sm_100"][64]["_second_query"] = Tile(64, 64, 8, 2)
HALF["sm_100"][128] |= {
    "_gradient_query": Tile(64, 64, 4, 2),
    "_tangent": Tile(64, 64, 4, 2),
    "_second_query": Tile(64, 32, 8, 2),
    "_second_key": Tile(32, 64, 8, 2),
}
KEYS = {
    "sm_80": {
        64: {"_tangent": Tile(64, 32, 4, 2, 168), "_second_key": Tile(64, 32, 8, 2)},
        96: {"_second_query": Tile(32, 16, 4, 2)},
        128: {"_tangent": Tile(32, 64, 8, 2), "_second_query": Tile(32, 64, 8, 2)},
        192: {
            "_tangent": Tile(16, 32, 8, 2),
            "_second_query": Tile(16, 32, 8, 2),
            "_second_key": Tile(16, 32, 8, 2),
        },
        256: {
            "_tangent": Tile(16, 32, 4, 2),
            "_second_query": Tile(16, 32, 4, 2),
            "_second_key": Tile(32, 16, 8, 2),
        },
    },
    "sm_90": {
        64: {"_second_query": Tile(64, 64, 4, 2), "_second_key": Tile(32, 64, 4, 3)},
        128: {
            "_tangent": Tile(64, 32, 4, 2),
            "_second_query": Tile(64, 32, 4, 2),
            "_second_key": Tile(32, 128, 8, 2),
        },
        192: {"_tangent": Tile(16, 32, 8, 2), "_second_query": Tile(16, 32, 4, 2)},
        256: {"_tangent": Tile(16, 32, 4, 2), "_second_query": Tile(16, 32, 4, 2)},
    },
}
# Head dimensions to 32.
SMALL_HEADS = {
    (architecture, kernel): tile
    for architecture in ("sm_80", "sm_86")
    for kernel, tile in (
        ("_gradient_query", Tile(64, 32, 4, 2)),
        ("_second_key", Tile(32, 32, 8, 2)),
    )
}
KEYS["sm_86"] = _two_stages(KEYS["sm_80"])
KEYS["sm_86"][256]["_second_query"] = Tile(16, 32, 8, 2)
KEYS["sm_100"] = KEYS["sm_90"] | {64: {}, 128: {"_tangent": Tile(64, 32, 4, 2)}}
# Query heads that share a key head are one more loop of a kernel over keys, around the others: its
# registers need smaller tiles, or no limit. (architecture, padded head dimension, kernel) -> tile.
SHARING = {
    ("sm_80", 128, "_second_key"): Tile(32, 32, 8, 2),
    ("sm_86", 128, "_second_key"): Tile(32, 32, 8, 2),
    ("sm_90", 64, "_second_key"): Tile(32, 64, 4, 3),
    ("sm_90", 96, "_second_key"): Tile(16, 64, 8, 2),
    ("sm_90", 128, "_gradient_key"): Tile(32, 64, 8, 2),
    ("sm_90", 128, "_second_key"): Tile(32, 32, 8, 2),
}

# With the ordinary backward (joint.py), to 128 padded columns: beyond them Q, A, G and gO leave the
# loops no registers.
JOINT = {
    "sm_80": {
        32: {"_second_query": Tile(64, 32, 8, 2), "_second_key": Tile(32, 32, 8, 2)},
        64: {"_second_query": Tile(64, 32, 8, 2), "_second_key": Tile(64, 32, 8, 2)},
        96: {"_second_query": Tile(64, 32, 8, 2), "_second_key": Tile(16, 64, 8, 2)},
        128: {"_second_query": Tile(64, 32, 8, 2), "_second_key": Tile(32, 32, 8, 2)},
    },
    "sm_90": {
        64: {"_second_query": Tile(64, 64, 4, 3, 232), "_second_key": Tile(32, 64, 4, 3)},
        96: {"_second_query": Tile(64, 32, 8, 2), "_second_key": Tile(16, 64, 8, 2)},
        128: {"_second_query": Tile(64, 32, 8, 2), "_second_key": Tile(32, 32, 8, 2)},
    },
}
JOINT["sm_86"] = _two_stages(JOINT["sm_80"])
JOINT["sm_86"][128]["_second_query"] = Tile(32, 32, 4, 2)
JOINT["sm_100"] = _two_stages(JOINT["sm_90"])
LARGEST_JOINT = 128

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
# Where those spill more than 16 bytes. Further stages leave the compiler registers: what it loads
# ahead waits in shared memory. (padded head dimension, with keys, kernel) -> tile. For three of
# them no tile was found: _second_query at 96 (10.x, 12.x) and 128, and _tangent at 128. A
# program's 16 rows of Q, A and G, the fewest that tensor cores take, fill its registers.
SINGLE_ON = {
    "sm_80": {
        (32, True, "_second_key"): Tile(32, 16, 4, 1),
        (64, True, "_forward"): Tile(16, 32, 4, 2),
        (64, True, "_second_query"): Tile(16, 32, 8, 2),
        (128, True, "_tangent"): Tile(16, 32, 8, 2),
    },
    "sm_86": {
        (16, False, "_gradient_key"): Tile(16, 32, 4, 2),
        (16, True, "_gradient_key"): Tile(16, 32, 4, 2),
        (16, True, "_second_query"): Tile(16, 32, 8, 2),
        (64, False, "_forward"): Tile(16, 32, 4, 2),
        (64, True, "_forward"): Tile(16, 32, 4, 2),
        (64, False, "_tangent"): Tile(16, 32, 8, 2),
        (64, True, "_tangent"): Tile(16, 32, 8, 2),
        (64, False, "_gradient_key"): Tile(32, 32, 8, 1),
        (64, True, "_gradient_key"): Tile(32, 32, 8, 1),
        (64, True, "_second_query"): Tile(16, 16, 8, 1),
        (96, True, "_second_query"): Tile(16, 16, 8, 3),
        (96, True, "_tangent"): Tile(16, 32, 8, 2),
        (128, True, "_forward"): Tile(16, 32, 8, 1),
        (128, False, "_gradient_key"): Tile(32, 16, 8, 1),
        (128, True, "_gradient_key"): Tile(32, 16, 8, 1),
        (128, False, "_gradient_query"): Tile(16, 16, 4, 1),
        (128, True, "_gradient_query"): Tile(16, 16, 4, 1),
        (128, True, "_tangent"): Tile(16, 16, 4, 2),
    },
    "sm_90": {
        (64, True, "_second_query"): Tile(16, 32, 8, 2),
        (96, True, "_second_query"): Tile(16, 16, 8, 2),
        (96, True, "_tangent"): Tile(16, 32, 8, 2),
        (128, True, "_second_query"): Tile(16, 16, 8, 2),
        (128, True, "_tangent"): Tile(16, 32, 8, 3),
    },
    "sm_100": {
        (64, True, "_second_query"): Tile(16, 16, 8, 1),
        (96, True, "_second_query"): Tile(16, 16, 8, 2),
        (96, True, "_second_key"): Tile(16, 16, 4, 2),
        (96, True, "_tangent"): Tile(16, 16, 8, 1),
        (128, False, "_gradient_key"): Tile(32, 16, 8, 1),
        (128, True, "_gradient_key"): Tile(32, 16, 8, 1),
        (128, False, "_second_query"): Tile(16, 32, 8, 2),
        (128, True, "_second_query"): Tile(16, 16, 8, 2),
        (128, False, "_tangent"): Tile(16, 32, 8, 2),
        (128, True, "_tangent"): Tile(16, 32, 8, 3),
    },
}
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


def sum_columns_for(architecture: str, dtype: torch.dtype) -> int:
    """Columns of the product that sums rows, as few as the tensor cores in use take; 1 where rows
    are summed without one (row_tiles.add_sums).
    """
    if dtype == torch.float32:
        return 1
    return 16 if architecture == "sm_100" else 8


def has_joint_tiles(d: int, dtype: torch.dtype) -> bool:
    """Whether the second half of a double backward can take the ordinary backward with it: in half
    precision, and where every size is known to the interpreter (float64).
    """
    is_half = dtype in (torch.float16, torch.bfloat16)
    return dtype == torch.float64 or (is_half and d <= LARGEST_JOINT)


def tile_for(
    kernel: str,
    architecture: str,
    padded_d: int,
    dtype: torch.dtype,
    with_keys: bool,
    *,
    sharing: bool = False,
    joint: bool = False,
) -> Tile:
    """The tile of a kernel: padded_d is a key of PADDED; with_keys where there are cotangents on dK
    and dV, or groups of own keys; sharing where a program serves several query heads; joint where
    the ordinary backward is part of it (has_joint_tiles).
    """
    if architecture == "interpreter":  # small, and rows != keys, so that tests meet many tiles
        return Tile(16, 32, 4, 1) if kernel in OVER_KEYS else Tile(32, 16, 4, 1)
    if joint:
        of_joint = _for_size(JOINT[architecture], padded_d)
        if kernel in of_joint:
            return of_joint[kernel]
    if dtype == torch.float32:
        found = SINGLE_ON[architecture].get((padded_d, with_keys, kernel))
        if found is not None:
            return found
        bucket = max(padded_d, 64)
        tile = SINGLE_EXCEPT[bucket].get(kernel, SINGLE)
        return SINGLE_KEYS[bucket].get(kernel, tile) if with_keys else tile
    if sharing and (architecture, padded_d, kernel) in SHARING:
        return SHARING[architecture, padded_d, kernel]
    tile = _for_size(HALF[architecture], padded_d)[kernel]
    if padded_d <= 32:
        tile = SMALL_HEADS.get((architecture, kernel), tile)
    if with_keys:
        tile = _for_size(KEYS[architecture], padded_d).get(kernel, tile)
    return tile


def _for_size(tiles: dict[int, dict[str, Tile]], padded_d: int) -> dict[str, Tile]:
    """The tiles of the smallest size that a table has for padded_d."""
    return next(of_kernel for size, of_kernel in tiles.items() if padded_d <= size)


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
