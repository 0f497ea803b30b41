#!/usr/bin/env python3
"""Compile the fused pointwise kernels for NVIDIA architectures on a machine without a GPU, and
report what the compiler made of them.

    python tools/compile_fused.py --architecture sm_80 sm_90 --width 384 1024 [--dtype bfloat16]
        [--kernel _norm_second ...]

The operations run as they do on a GPU, on tiny tensors, and each kernel is compiled where it would
be launched. One JSON line per program: registers, bytes spilled, shared memory, seconds. The exit
status is 1 where more than SPILLS bytes of registers are spilled. --width: of the stream; heads
have 64 numbers, the feed-forward is 8/3 as wide. The vocabulary's programs, of 50277 tokens, have
no width; they alone are compiled where --width names none.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import ebwm_scale  # noqa: F401 (before torch is loaded: how its threads wait)

# isort: split
os.environ.pop("TRITON_INTERPRET", None)  # before the kernels are decorated

import torch
from compile_kernels import Driver, usage_of
from triton.runtime import driver

from ebwm_kernels.fused import candidate_kernels, launches, norm, rotation, swiglu, vocabulary
from ebwm_kernels.fused.rotation import HeadCounts
from ebwm_scale.core.arguments import ArgumentParser

DTYPES = ("bfloat16", "float16", "float32")
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
# The compiler may move two numbers out of a loop, so that more programs fit a multiprocessor.
SPILLS = 8
HEAD = 64
VOCABULARY = 50277


def compile_all(
    architecture: str, width: int | None, dtype: torch.dtype, kernels: list[str]
) -> list[dict]:
    """The distinct programs of one architecture, width and dtype; without a width, the
    vocabulary's.
    """
    driver.set_active(Driver(architecture))
    rows, seen = [], set()

    def launch(kernel, num_programs, reads, writes, *, tile, again=(), **constants) -> None:
        if kernels and kernel.__name__ not in kernels:
            return
        named = launches.arguments_of(kernel, reads, writes, tile=tile, **constants)
        start = time.perf_counter()
        compiled = kernel.run(**named, num_warps=tile.warps, grid=(num_programs,), warmup=True)
        if compiled.hash in seen:
            return
        seen.add(compiled.hash)
        flags = {name: value for name, value in constants.items() if value is True}
        rows.append(
            {
                "kernel": kernel.__name__,
                "architecture": architecture,
                "width": width,
                "dtype": str(dtype).removeprefix("torch."),
                "tile": list(tile),
                "flags": sorted(flags),
                **usage_of(compiled),
                "seconds": round(time.perf_counter() - start, 1),
                "program": compiled.hash,
            }
        )

    right = launches.launch
    launches.launch = launch
    try:
        if width is None:
            run_vocabulary(dtype)
        else:
            run_operations(width, dtype)
    finally:
        launches.launch = right
    return rows


def run_operations(width: int, dtype: torch.dtype) -> None:
    """Every pass once. Numbers of rows do not matter: one program serves all."""
    x = torch.zeros(6, width, dtype=dtype)
    w = torch.zeros(width, dtype=dtype)
    norm.forward(x, w, 1e-5)
    norm.forward(x, w, 1e-5, added=x)
    norm.forward(x, w, 1e-5, shift=w, added=x)
    for with_weight in (False, True):
        for of_total in (None, x):
            norm.gradient(x, x, w, 1e-5, with_weight=with_weight, of_total=of_total)
        norm.second(x, x, x, w, 1e-5, with_weight=with_weight)
    norm.gradient(x, x, w, 1e-5, with_weight=True, with_shift=True, of_total=x)

    inner = -(-8 * width // (3 * 128)) * 128
    u, v = swiglu.halves(torch.zeros(6, 2 * inner, dtype=dtype))
    g = torch.zeros(6, inner, dtype=dtype)
    swiglu.forward(u, v)
    swiglu.gradient(g, u, v, u, v)
    swiglu.gradient(g, u, v, u, v, (u, v))
    swiglu.second(u, v, g, u, v, u, v)

    heads = max(1, width // HEAD)
    factors = torch.zeros(6, HEAD // 2, 2)
    for counts in (HeadCounts(heads, heads, heads), HeadCounts(0, heads, heads)):
        rows = torch.zeros(2, 6, sum(counts) * HEAD, dtype=dtype, requires_grad=True)
        split = rotation.split_rotated(rows, factors, counts)
        torch.autograd.grad(split, rows, split)


def run_vocabulary(dtype: torch.dtype) -> None:
    """Every pass over states once: what a step keeps and asks for is part of its program."""
    state = torch.zeros(2, VOCABULARY)
    move = torch.zeros(2, VOCABULARY, dtype=dtype)
    number = torch.zeros(()).expand(2, VOCABULARY)
    target, share, of_loss = torch.zeros(2, dtype=torch.int64), torch.zeros(2), torch.zeros(())
    rounded = None if dtype == torch.float32 else dtype
    wide = {"dtype": torch.float32}
    scored = {"target": target, "share": share, **wide}
    residual = {"residual_dtype": dtype, "scaled": True, **scored}
    everything = vocabulary.Form(change=1.0, state=10.0, soft=30.0, z_weight=1e-4)
    # the next embedded state, of a step and of given states
    vocabulary.softmax_rows(state, None, keep_p=True, residual_dtype=rounded, **wide)
    vocabulary.softmax_rows(move, state, keep_p=True, residual_dtype=rounded, **scored)
    vocabulary.rounded_residual(state, target, dtype)
    # a loss and its gradient: of logits, of steps, through the softmax, within clamps
    vocabulary.softmax_rows(move, None, **residual)
    vocabulary.softmax_rows(move, state, **residual)
    vocabulary.softmax_rows(move, state, keep_state=True, **residual)
    vocabulary.softmax_rows(move, number, through=number, keep_state=True, **residual)
    vocabulary.softmax_rows(move, state, through=state, **residual)
    vocabulary.softmax_rows(move, state, through=state, form=everything, **residual)
    vocabulary.softmax_rows(move, state, keep_state=True, form=everything, **residual)
    # states that carry a graph
    vocabulary.softmax_rows(move, None, keep_state=True, keep_normalizer=True, **scored)
    vocabulary.softmax_rows(state, None, keep_normalizer=True, residual_dtype=dtype, **wide)
    normalizer = torch.zeros(2, 2)
    for of_p, of_x in ((None, state), (state, None)):
        vocabulary.softmax_gradient(state, normalizer, of_embedded=move, of_p=of_p, of_x=of_x)
    for of_x, keep in ((state, False), (None, True)):
        vocabulary.state_gradient(
            state, normalizer, target=target, share=share, of_loss=of_loss, of_x=of_x,
            z_weight=0.0, keep=keep, dtype=dtype,
        )  # fmt: skip
    # the same within clamps, and through the softmax
    kept: dict[str, Any] = {"keep_state": True, "keep_normalizer": True, "form": everything}
    vocabulary.softmax_rows(move, state, **kept, **scored)
    vocabulary.softmax_rows(move, state, through=state, **kept, **scored)
    for through in (None, state):
        vocabulary.step_gradient(
            move, state, through=through, form=everything, normalizer=normalizer, target=target,
            share=share, of_loss=of_loss, of_state=state, keep_start=True,
            keep_p=through is not None, **wide,
        )  # fmt: skip
    # candidates
    vocabulary.softmax_rows(move, None, keep_state=True, **wide)
    candidate_kernels.choose_rows(state, 64)
    candidate_kernels.rest_gradient(state, normalizer, target, share, share, dtype)


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--architecture", nargs="+", default=["sm_80", "sm_90"], choices=ARCHITECTURES
    )
    parser.add_argument("--width", nargs="*", type=int, default=[384, 1024])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=DTYPES)
    parser.add_argument("--kernel", nargs="+", default=[], help="only these")
    arguments = parser.parse_args()
    spills = 0
    for architecture in arguments.architecture:
        for width in (None, *arguments.width):
            for dtype in arguments.dtype:
                found = compile_all(architecture, width, getattr(torch, dtype), arguments.kernel)
                for row in found:
                    print(json.dumps(row), flush=True)
                    spills += row["spilled_bytes"] > SPILLS
    return int(spills > 0)


if __name__ == "__main__":
    sys.exit(main())
