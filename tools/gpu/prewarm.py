"""Fill Triton's cache with what the other programs here would compile, on any machine, without a
GPU, several at a time.

    TRITON_CACHE_DIR=.triton-cache python tools/gpu/prewarm.py --architecture sm_90
        [--workers 2] [--what smoke|all]

Kernels go through Triton's own launch path with a stub for its driver, so that they are found again
by the launches of a GPU. A cache serves one version of Triton, of Python and of these kernels;
where it does not fit, nothing is wrong, and everything is compiled again.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded
os.environ.pop("TRITON_INTERPRET", None)  # before the kernels are decorated

import torch
import triton
from attention_levels import CORRECT, LARGE, Case, call_of, levels
from triton.runtime import driver

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from compile_kernels import TILES_OF, Driver  # the stub for Triton's driver

from ebwm_kernels.attention import launches, triton_backend
from ebwm_kernels.attention.tuning import MAX_HEAD_DIMENSION
from ebwm_scale.core.arguments import ArgumentParser

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--architecture", default="sm_90", help="such as sm_90 for an H100")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--what", choices=("smoke", "all"), default="all")
    options = parser.parse_args()
    work = [
        (case, dtype, options.architecture)
        for dtype in DTYPES
        for case in CORRECT
        if case.d <= MAX_HEAD_DIMENSION[dtype]
    ]
    if options.what == "all":  # one sample and few rows: sizes are no part of a program
        work += [
            (case._replace(batch=1, rows=256, keys=256), torch.bfloat16, options.architecture)
            for case in LARGE
        ]
    start, failed = time.perf_counter(), 0
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        for problem in pool.imap_unordered(compile_case, work):
            if problem:
                failed += 1
                print(problem, file=sys.stderr, flush=True)
    seconds = time.perf_counter() - start
    print(f"{len(work)} calls in {seconds:.0f} s, {failed} failed; triton {triton.__version__}")
    return int(failed > 0)


def compile_case(work: tuple[Case, torch.dtype, str]) -> str | None:
    """What went wrong, or None."""
    case, dtype, architecture = work
    driver.set_active(Driver(architecture))
    launches.architecture = lambda device: TILES_OF.get(architecture, architecture)

    def compiled(kernel, num_programs, pointers, named, tile) -> None:
        kernel.run(
            *pointers,
            **named,
            **launches.options_of(tile),
            grid=(num_programs,),
            warmup=True,
        )

    launches.launch = compiled
    try:
        levels(triton_backend, call_of(case, dtype, "cpu"))
    except Exception as error:  # noqa: BLE001  a compiler raises anything
        return f"{case}, {dtype}: {type(error).__name__}: {error}"[:600]
    return None


if __name__ == "__main__":
    sys.exit(main())
