"""When the fused operations run in Triton, and how their kernels are launched.

A step's norms, activations and rotations move memory and compute next to nothing. In plain PyTorch
each of their passes is ten operations that read and write whole tensors; here it is one that reads
what it needs once. Which path runs depends on the device alone, unless the caller forces one.

No kernel writes where another program writes. Sums over rows are written in parts, of fixed
numbers of rows, and added by PyTorch: results are the same every time, on every GPU of a kind.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from typing import NamedTuple

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "reference")
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_WIDTH = 16384  # of a row that a program holds whole: 16 numbers for each of its threads
ALIGNMENT = 16  # bytes: a load's


class Tile(NamedTuple):
    """rows, columns: of a program's tile, powers of two. warps: of a program."""

    rows: int
    columns: int
    warps: int


def runs_fused(backend: str, like: Tensor, operation: str, width: int = 1) -> bool:
    """Whether an operation on tensors like this one runs in Triton.

    width: of the rows that a program holds whole. Raises ValueError for a backend that is unknown,
    and for "triton" where it cannot run.
    """
    if backend == "auto" and like.device.type != "cuda":
        return False
    return resolve_fused(backend, like.device, like.dtype, operation, width) == "triton"


def resolve_fused(
    backend: str, device: torch.device, dtype: torch.dtype, operation: str, width: int = 1
) -> str:
    """ "triton" or "reference"; as runs_fused."""
    if backend not in BACKENDS:
        raise ValueError(f"{operation}: backend is {backend!r}; allowed: {', '.join(BACKENDS)}")
    if backend == "reference":
        return backend
    obstacle = why_not_fused(device, dtype, width)
    if backend == "auto":
        return "triton" if obstacle is None and device.type == "cuda" else "reference"
    if obstacle is not None:
        raise ValueError(
            f"{operation}: backend triton cannot run {dtype} on {device}: {obstacle}; "
            "use backend auto or reference"
        )
    return backend


def why_not_fused(device: torch.device, dtype: torch.dtype, width: int = 1) -> str | None:
    """What keeps the fused kernels from running such tensors, or None.

    Tensors of the meta device have shapes and no numbers: for them nothing is launched.
    """
    if not TRITON_INSTALLED:
        return "triton is not installed (pip install triton)"
    if width > MAX_WIDTH:
        return f"rows are {width} wide; supported are up to {MAX_WIDTH}"
    if os.environ.get("TRITON_INTERPRET") == "1" or device.type == "meta":
        return None
    if device.type != "cuda" or torch.version.cuda is None:
        return "it needs an NVIDIA GPU (or TRITON_INTERPRET=1)"
    if dtype not in DTYPES:
        return "supported are float16, bfloat16 and float32"
    if _capability(device) < (8, 0):
        return "it needs compute capability 8.0 or newer"
    return None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def ready(x: Tensor) -> Tensor:
    """A tensor whose rows lie one behind the other, where a load can start: itself, or a copy."""
    x = x.contiguous()
    if x.device.type != "meta" and x.data_ptr() % ALIGNMENT:
        return x.clone()
    return x


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """Of sums: float32, and float64 in tests."""
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return torch.float64
    return torch.float32


def launch(
    kernel,
    num_programs: int,
    reads: dict[str, Tensor | None],
    writes: dict[str, Tensor | None],
    *,
    tile: Tile,
    again: tuple[str, ...] = (),
    **constants,
) -> None:
    """Run a kernel; a tensor that is None is neither read nor written.

    again: which tensors it reads twice. planning/step_count.py counts here instead, and
    tools/compile_fused.py compiles.
    """
    named = arguments_of(kernel, reads, writes, tile=tile, **constants)
    device = next(x.device for x in named.values() if isinstance(x, Tensor))
    if num_programs == 0 or device.type == "meta":
        return
    on_its_device = contextlib.nullcontext()
    if device.type == "cuda":
        on_its_device = torch.cuda.device(device)
    with on_its_device:
        kernel[(num_programs,)](**named, num_warps=tile.warps)


def arguments_of(kernel, reads, writes, *, tile: Tile, **constants) -> dict:
    """A kernel's arguments by name: any tensor stands for one that is not there."""
    tensors = {**reads, **writes}
    some = next(x for x in tensors.values() if x is not None)
    named = {name: some if x is None else x for name, x in tensors.items()}
    named |= {"BR": tile.rows, "BC": tile.columns, **constants}
    return {name: value for name, value in named.items() if name in kernel.arg_names}


@functools.cache
def whole_rows(width: int) -> Tile:
    """A tile of whole rows, of about 2048 numbers or one row."""
    columns = next_power_of_two(width)
    rows = max(1, 2048 // columns)
    return Tile(rows, columns, warps_for(rows * columns))


@functools.cache
def parts_of_rows(width: int) -> Tile:
    """A tile of at most 1024 columns of rows."""
    columns = min(1024, next_power_of_two(width))
    rows = max(1, 1024 // columns)
    return Tile(rows, columns, warps_for(rows * columns))


def warps_for(numbers: int) -> int:
    """So that a thread holds at most 16 of a tile's numbers."""
    return min(32, max(4, numbers // (16 * 32)))


def next_power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def num_tiles(count: int, size: int) -> int:
    """How many tiles of `size` cover `count`."""
    return -(-count // size)
