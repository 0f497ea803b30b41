#!/usr/bin/env python3
"""Compile the Triton attention kernels for NVIDIA architectures on a machine without a GPU, and
report what the compiler made of them.

    python tools/compile_kernels.py --architecture sm_90 --head-dimension 64 128
        [--kernel _second_key ...] [--tile ROWS,KEYS,WARPS,STAGES ...]

One JSON line per kernel and tile: registers, bytes spilled, shared memory, tensor-core
instructions, seconds. Shared memory is held against the architecture's limit here, since the
compiler does not check it. Without --tile the tiles are those of
kernels/ebwm_kernels/attention/tuning.py.
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

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded
os.environ.pop("TRITON_INTERPRET", None)  # before the kernels are decorated

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ebwm_kernels.attention import triton_kernels as attention_triton
from ebwm_kernels.attention.tuning import KERNELS, Tile, padded_for, part_for, tile_for
from ebwm_scale.core.arguments import ArgumentParser

SHARED_KIB = {
    "sm_80": 163,
    "sm_86": 99,
    "sm_90": 227,
}  # per block; CUDA programming guide, compute capabilities
STATISTICS = {"L", "DELTA", "MU", "PHI", "Z", "DS", "MEAN"}
SIZES = ("S", "C", "offset", "group")
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def compile_kernel(
    name: str,
    architecture: str,
    head_dimension: int,
    dtype: torch.dtype,
    *,
    own: bool,
    with_keys: bool,
    causal: bool = True,
    ones: bool = False,
    tile: Tile | None = None,
) -> dict:
    """Compile one kernel (KERNELS) and read its machine code; see the module's docstring.

    ones: sizes that are 1, which a launch makes constants.
    """
    kernel = getattr(attention_triton, name)
    padded = padded_for(head_dimension)
    tile = tile or tile_for(name, architecture, padded, dtype, with_keys)
    values = {
        "scale": head_dimension**-0.5,
        "D": head_dimension,
        "DP": padded,
        "PART": part_for(architecture, padded, dtype),
        "CAUSAL": causal,
        "OWN": own,
        "KEYS": with_keys,
        "ACC": tl.float32,
        "PRECISION": "tf32x3" if dtype == torch.float32 else "ieee",
        "BM": tile.rows,
        "BN": tile.keys,
    }
    constants = {n: values[n] for n in kernel.arg_names if n in values}
    if ones:
        constants |= {n: 1 for n in kernel.arg_names if n in SIZES}
    signature, attributes = {}, {}
    for position, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in SIZES:
            signature[argument] = "i32"
        else:
            signature[argument] = "*fp32" if argument in STATISTICS else POINTERS[dtype]
            attributes[(position,)] = [
                ["tt.divisibility", 16]
            ]  # as at a launch; without it loads are not vectorised
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(n),): v for n, v in constants.items()},
        attrs=attributes,
    )
    start = time.perf_counter()
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )
    seconds = time.perf_counter() - start
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output("cuobjdump", "--dump-resource-usage", file.name)
        code = _output("nvdisasm", "-c", file.name)
    registers, stack, local = (
        int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK", "LOCAL")
    )
    count = {
        what: len(re.findall(rf"\b{what}\b", code)) for what in ("HGMMA", "HMMA", "LDL", "STL")
    }
    shared = compiled.metadata.shared / 1024
    return {
        "kernel": name,
        "architecture": architecture,
        "head_dimension": head_dimension,
        "dtype": str(dtype).removeprefix("torch."),
        "own": own,
        "with_keys": with_keys,
        "causal": causal,
        "tile": list(tile),
        "registers": registers,
        "spilled_bytes": stack + local,
        "spill_instructions": count["LDL"] + count["STL"],
        "shared_kib": round(shared, 2),
        "shared_limit_kib": SHARED_KIB[architecture],
        "fits": shared <= SHARED_KIB[architecture],
        "tensor_core_instructions": count["HGMMA"] + count["HMMA"],
        "warpgroup_instructions": count["HGMMA"],
        "seconds": round(seconds, 1),
    }


def variants(name: str) -> list[dict]:
    """The two operations' uses of a kernel: energy_attention, and causal_attention with cotangents
    on dK and dV where it takes them.
    """
    names = getattr(attention_triton, name).arg_names
    if name == "_second_own":
        return [{"own": True, "with_keys": False}]
    if "OWN" not in names and "KEYS" not in names:
        return [{"own": False, "with_keys": False}]
    return [{"own": True, "with_keys": False}, {"own": False, "with_keys": "KEYS" in names}]


def _output(program: str, *arguments: str) -> str:
    return subprocess.run(
        [str(TOOLS / program), *arguments], capture_output=True, text=True, check=True
    ).stdout


def _compile(work: tuple) -> dict:
    *what, options = work
    return compile_kernel(*what, **options)


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
        "--tile", nargs="+", default=[None], help="ROWS,KEYS,WARPS,STAGES instead of the table's"
    )
    parser.add_argument("--not-causal", action="store_true")
    parser.add_argument(
        "--ones", action="store_true", help="sizes of one, which Triton makes constants"
    )
    parser.add_argument(
        "--variant",
        nargs="+",
        type=int,
        default=[0, 1],
        help="0: energy_attention, 1: causal_attention",
    )
    arguments = parser.parse_args()
    work = [
        (
            name,
            architecture,
            d,
            getattr(torch, dtype),
            dict(
                variant,
                causal=not arguments.not_causal,
                ones=arguments.ones,
                tile=None if tile is None else Tile(*map(int, tile.split(","))),
            ),
        )
        for architecture in arguments.architecture
        for d in arguments.head_dimension
        for dtype in arguments.dtype
        for name in arguments.kernel
        for index, variant in enumerate(variants(name))
        if index in arguments.variant
        for tile in arguments.tile
    ]
    bad = 0
    with multiprocessing.get_context("fork").Pool() as pool:
        for row in pool.imap(_compile, work):
            print(json.dumps(row), flush=True)
            bad += not row["fits"]
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
