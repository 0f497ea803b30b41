"""Time, registers and spills of every attention kernel at the sizes of training.

    python tools/gpu/kernel_times.py [--output kernels.jsonl] [--repeats 20]
        [--tiles ROWS,KEYS,WARPS,STAGES ..]

Device time between events around each launch, the median over repeats; memory that was just
written is in the cache where it fits, as it is in a training step. One line per case and kernel,
"joint" those with the ordinary backward in them.
With --tiles each kernel is timed with each of them in place of the table's, where it compiles.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded

import torch
from attention_levels import LARGE, Case, call_of, levels
from json_lines import JsonLines

from ebwm_kernels.attention import launches, triton_backend
from ebwm_kernels.attention.tuning import Tile, tile_for
from ebwm_scale.core.arguments import ArgumentParser

Marks = list[tuple[str, Tile, torch.cuda.Event, torch.cuda.Event]]


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=None, metavar="FILE")
    parser.add_argument("--repeats", type=int, default=20, help="of each case")
    parser.add_argument("--tiles", nargs="+", default=[None], metavar="ROWS,KEYS,WARPS,STAGES")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: there is nothing to time", file=sys.stderr)
        return 1
    with JsonLines(options.output) as lines:
        for case in LARGE:
            for text in options.tiles:
                tile = None if text is None else Tile(*map(int, text.split(",")))
                for row in measure(case, tile, options.repeats):
                    lines.write(row)
    return 0


def measure(case: Case, tile: Tile | None, repeats: int) -> Iterator[dict]:
    about = {"case": case._asdict(), "dtype": "bfloat16", "asked_tile": tile}
    marks: Marks = []
    try:
        call = call_of(case, torch.bfloat16, "cuda")
        with marked(marks, tile):
            for _ in range(3):
                levels(triton_backend, call)
            torch.cuda.synchronize()
            marks.clear()
            for _ in range(repeats):
                levels(triton_backend, call)
            torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001  such as a tile that takes too much memory
        yield about | {"failed": f"{type(error).__name__}: {error}"[:600]}
        return
    for kernel in sorted({name for name, *_ in marks}):
        times = [start.elapsed_time(end) for name, _, start, end in marks if name == kernel]
        tiles = {used for name, used, _, _ in marks if name == kernel}
        yield about | {
            "kernel": kernel,
            "tiles": sorted(tiles),
            "launches": len(times) // repeats,
            "median_ms": statistics.median(times),
            "fastest_ms": min(times),
            "ms_per_call": sum(times) / repeats,
        }


@contextmanager
def marked(marks: Marks, tile: Tile | None) -> Iterator[None]:
    """Each launch leaves its name and two events; with a tile in place of the table's."""
    launch, table = launches.launch, launches.tile_for

    def timed(kernel, num_programs, pointers, named, used) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch(kernel, num_programs, pointers, named, used)
        end.record()
        joint = " joint" if named.get("JOINT") else ""
        marks.append((kernel.__name__ + joint, used, start, end))

    launches.launch = timed
    launches.tile_for = tile_for if tile is None else lambda *_, **__: tile
    try:
        yield
    finally:
        launches.launch, launches.tile_for = launch, table


if __name__ == "__main__":
    sys.exit(main())
