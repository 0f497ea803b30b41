"""How a batch is cut into tiles of rows that are refined one after the other.

Rows, that is (sample, position) pairs, do not see each other's candidates. So memory depends
neither on the batch nor on the vocabulary: a tile's states take at most `tile_bytes`. Rows of one
group do see each other: a group of positions is never cut, however large its states are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from ebwm_scale.config.schema import RefinementConfig

# Of states (float32) in a tile: large enough for efficient products; on a GPU the fewer tiles, the
# fewer launches.
TILE_BYTES = {"cpu": 32 * 2**20, "cuda": 4 * 2**30}
GPU_SHARE = 16  # of a GPU's memory that a tile's states take, up to TILE_BYTES


def tile_bytes(device: torch.device) -> int:
    """Bytes of a tile's states: on a GPU a sixteenth of its memory, at most 4 GiB.

    Not of what is free at the moment: the cut of a batch decides in which order gradients are
    added, and a resumed run has to add them as before.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return TILE_BYTES.get(device.type, TILE_BYTES["cuda"])
    memory = torch.cuda.get_device_properties(device).total_memory
    return min(TILE_BYTES["cuda"], memory // GPU_SHARE)


def tile_rows(
    config: RefinementConfig,
    state_size: int,
    num_positions: int,
    device: torch.device,
    group_size: int = 1,
) -> int:
    """Rows refined at a time: refinement.tile_rows, or what keeps their states in `tile_bytes`.

    At least a group of positions. With refinement.reencode a tile holds whole samples of
    num_positions positions, since a context is made of all of its rows' predictions.
    ValueError where refinement.tile_rows is less than that.
    """
    least = group_size if config.reencode == "none" else num_positions
    rows = config.tile_rows
    if rows is None:
        return max(least, tile_bytes(device) // (4 * state_size))
    if config.reencode != "none" and rows < least:
        raise ValueError(
            f"refinement.tile_rows is {rows} with refinement.reencode {config.reencode}: all "
            f"positions of a sample are refined together, give at least {least}"
        )
    if rows < least:
        raise ValueError(
            f"refinement.tile_rows is {rows}, the groups have {least} "
            "positions: a group is refined together, use at least its size or leave the key out"
        )
    return rows


def tiles_of(
    num_samples: int, num_positions: int, rows: int, group_size: int = 1
) -> Iterator[tuple[slice, list[slice]]]:
    """Cover a batch by tiles: (samples, parts of their positions) each.

    Parts have about the same size, and at most `rows` rows where a sample has more than that.
    With groups all of that counts in whole groups. ValueError where they do not divide a sample.
    """
    if num_positions % group_size:
        raise ValueError(
            f"a sample has {num_positions} positions in groups of {group_size}: "
            "the size must divide their number"
        )
    if group_size > 1:
        of_groups = tiles_of(num_samples, num_positions // group_size, rows // group_size)
        for samples, parts in of_groups:
            yield samples, [_of_positions(part, group_size) for part in parts]
        return
    samples_together = max(1, rows // num_positions)
    num_parts = 1
    if samples_together == 1:
        num_parts = -(-num_positions * min(samples_together, num_samples) // rows)
    parts = _even_slices(num_positions, num_parts)
    for samples in _even_slices(num_samples, -(-num_samples // samples_together)):
        yield samples, parts


def _of_positions(groups: slice, group_size: int) -> slice:
    """The positions of some groups."""
    return slice(groups.start * group_size, groups.stop * group_size)


def _even_slices(length: int, count: int) -> list[slice]:
    """A range in `count` slices whose lengths differ by one at most."""
    edges = [length * i // count for i in range(count + 1)]
    return [slice(*edge) for edge in itertools.pairwise(edges)]
