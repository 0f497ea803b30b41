#!/usr/bin/env python3
"""Compile the Triton attention kernels for NVIDIA architectures on a machine without a GPU, and
report what the compiler made of them.

    python tools/compile_kernels.py --architecture sm_90 --head-dimension 64 128
        [--kernel _second_key ...] [--tile ROWS,KEYS,WARPS,STAGES[,REGISTERS] ...]
        [--groups] [--first-visible] [--sharing] [--not-causal] [--heads 16] [--heads-first]

The levels of kernels/ebwm_kernels/attention/triton_backend.py run as they do on a GPU, on tiny
tensors, and each kernel is compiled where it would be launched, with the arguments of that launch:
what is reported is what runs. One JSON line per program: registers, bytes spilled, shared memory,
tensor memory (sm_100), tensor-core instructions, seconds. Memory is held against the
architecture's limits here, since the compiler does not check it. Without --tile the tiles are
those of kernels/ebwm_kernels/attention/tuning.py.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import ebwm_scale  # noqa: F401 (before torch is loaded: how its threads wait)

# isort: split
os.environ.pop("TRITON_INTERPRET", None)  # before the kernels are decorated

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from ebwm_kernels.attention import launches, triton_backend
from ebwm_kernels.attention.tensors import Cotangents, Inputs
from ebwm_kernels.attention.tuning import KERNELS, Tile, has_joint_tiles, tile_for
from ebwm_kernels.attention.visibility import Shape
from ebwm_scale.core.arguments import ArgumentParser

# Shared memory per block: CUDA programming guide, compute capabilities. The tiles of sm_86 serve
# 12.x as well (sm_120).
SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
TENSOR_MEMORY_COLUMNS = 512  # sm_100, per multiprocessor
TILES_OF = {"sm_120": "sm_86"}
USES = ("energy", "causal")  # own keys; none, and cotangents on dK and dV
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Work(NamedTuple):
    """One kernel in one use."""

    kernel: str
    architecture: str
    head_dimension: int
    dtype: str
    use: str
    causal: bool
    groups: bool
    first_visible: bool
    sharing: bool
    tile: Tile | None
    heads: int = 16
    heads_first: bool = False
    positions: int = 6
    scale: float = 0.125


class Driver:
    """Triton's driver, as far as it takes part in compiling."""

    def __init__(self, architecture: str):
        self.architecture = architecture

    def get_current_device(self) -> str:
        return self.architecture  # compiled programs are kept per device

    def set_current_device(self, device) -> None:
        pass

    def get_current_stream(self, device=None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(self.architecture.removeprefix("sm_")), 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_use(work: Work) -> list[dict]:
    """The distinct programs that this use launches of one kernel."""
    driver.set_active(Driver(work.architecture))
    rows, seen = [], set()

    def launch(kernel, num_programs, pointers, named, tile) -> None:
        if kernel.__name__ != work.kernel:
            return
        start = time.perf_counter()
        compiled = kernel.run(
            *pointers,
            **named,
            **launches.options_of(tile),
            grid=(num_programs,),
            warmup=True,
        )
        seconds = time.perf_counter() - start
        if compiled.hash in seen:
            return
        seen.add(compiled.hash)
        flags = {
            name.lower(): value
            for name, value in named.items()
            if name in ("OWN", "KEYS", "SECOND", "SHARED", "JOINT")
        }
        rows.append(_report(work, tile, flags, compiled) | {"seconds": round(seconds, 1)})

    tiles = TILES_OF.get(work.architecture, work.architecture)
    launches.architecture = lambda device: tiles
    launches.tile_for = tile_for if work.tile is None else lambda *_, **__: work.tile
    launches.launch = launch
    _run_levels(work)
    return rows


def _run_levels(work: Work) -> None:
    """All levels once. Neither sizes nor the scale matter: one program serves all."""
    group = work.positions if work.groups else 1
    shape = Shape(work.scale, 0, work.causal, group, group)
    dtype = getattr(torch, work.dtype)
    q = _zeros(work, work.heads, dtype)
    k = _zeros(work, work.heads // 2 if work.sharing else work.heads, dtype)
    first_visible = None
    if work.first_visible:
        first_visible = torch.zeros(1, work.positions, dtype=torch.int32)
    own = (q, q) if work.use == "energy" else (None, None)
    keys = (None, None) if work.use == "energy" else (k, k)
    inputs = Inputs(q, k, k, *own, first_visible)
    output = triton_backend.forward(inputs, shape)
    triton_backend.gradient(q, inputs, output, shape, with_keys=True)
    triton_backend.double_backward(Cotangents(q, *keys, *own), q, inputs, output, shape)
    triton_backend.tangent(Cotangents(q, k, k, *own), inputs, output, shape)
    if work.use == "energy" and not work.groups and has_joint_tiles(work.head_dimension, dtype):
        cotangents = Cotangents(q, None, None, *own)
        _, statistics = triton_backend.double_backward_up(cotangents, q, inputs, output, shape)
        triton_backend.double_backward_down(
            cotangents, q, q, statistics, inputs, output, shape, with_keys=True
        )


def _zeros(work: Work, heads: int, dtype: torch.dtype) -> torch.Tensor:
    """(1, heads, positions, head dimension), lying as it is told."""
    if work.heads_first:
        return torch.zeros(1, heads, work.positions, work.head_dimension, dtype=dtype)
    rows = torch.zeros(1, work.positions, heads, work.head_dimension, dtype=dtype)
    return rows.transpose(1, 2)


def usage_of(compiled) -> dict:
    """What a compiled program takes: registers, what it spills, shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = output_of("cuobjdump", "--dump-resource-usage", file.name)
        registers, stack, local = (
            int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK", "LOCAL")
        )
        spills = 0
        if stack + local:
            spills = len(re.findall(r"\b(?:LDL|STL)\b", output_of("nvdisasm", "-c", file.name)))
    return {
        "registers": registers,
        "spilled_bytes": stack + local,
        "spill_instructions": spills,
        "shared_kib": round(compiled.metadata.shared / 1024, 2),
    }


def _report(work: Work, tile: Tile, flags: dict, compiled) -> dict:
    code = compiled.asm["ptx"]
    warpgroup = code.count("wgmma.mma_async.")
    tensor_core = warpgroup + code.count("mma.sync.") + code.count("tcgen05.mma.")
    usage = usage_of(compiled)
    limit = SHARED_KIB[work.architecture]
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    return {
        **work._asdict(),
        "tile": list(tile[:4]),
        "register_limit": tile.registers,
        **flags,
        **usage,
        "shared_limit_kib": limit,
        "tensor_memory_columns": columns,
        "fits": usage["shared_kib"] <= limit and columns <= TENSOR_MEMORY_COLUMNS,
        "tensor_core_instructions": tensor_core,  # of the PTX
        "warpgroup_instructions": warpgroup,
        "program": compiled.hash,
    }


def output_of(program: str, *arguments: str) -> str:
    return subprocess.run(
        [str(TOOLS / program), *arguments], capture_output=True, text=True, check=True
    ).stdout


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--architecture", nargs="+", default=["sm_80", "sm_90"], choices=sorted(SHARED_KIB)
    )
    parser.add_argument("--head-dimension", nargs="+", type=int, default=[64, 128])
    parser.add_argument(
        "--dtype", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"]
    )
    parser.add_argument("--kernel", nargs="+", default=list(KERNELS), choices=KERNELS)
    parser.add_argument(
        "--tile",
        nargs="+",
        default=[None],
        help="ROWS,KEYS,WARPS,STAGES[,REGISTERS] instead of the table's",
    )
    parser.add_argument("--use", nargs="+", default=list(USES), choices=USES)
    parser.add_argument("--not-causal", action="store_true")
    parser.add_argument("--groups", action="store_true", help="own keys and context in groups")
    parser.add_argument("--first-visible", action="store_true", help="a first key per row")
    parser.add_argument("--sharing", action="store_true", help="query heads share key heads")
    parser.add_argument("--heads", type=int, default=16, help="of queries")
    parser.add_argument(
        "--heads-first", action="store_true", help="tensors lie so, and not positions first"
    )
    parser.add_argument("--positions", type=int, default=6, help="of the tensors")
    parser.add_argument("--scale", type=float, default=0.125, help="of the scores")
    arguments = parser.parse_args()
    work = [
        Work(
            kernel,
            architecture,
            head_dimension,
            dtype,
            use,
            not arguments.not_causal,
            arguments.groups,
            arguments.first_visible,
            arguments.sharing,
            None if tile is None else Tile(*map(int, tile.split(","))),
            arguments.heads,
            arguments.heads_first,
            arguments.positions,
            arguments.scale,
        )
        for architecture in arguments.architecture
        for head_dimension in arguments.head_dimension
        for dtype in arguments.dtype
        for kernel in arguments.kernel
        for use in arguments.use
        for tile in arguments.tile
    ]
    bad = 0
    with multiprocessing.get_context("fork").Pool() as pool:
        for rows in pool.imap(compile_use, work):
            for row in rows:
                print(json.dumps(row), flush=True)
                bad += not row["fits"]
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
