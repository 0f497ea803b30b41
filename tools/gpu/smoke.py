"""The first minute on a GPU: every attention kernel held against the reference in float64.

    python tools/gpu/smoke.py [--quick] [--output smoke.jsonl]

One JSON line per case and precision, written as it is known. What is allocated next is full of
NaN, so that what no kernel writes shows; each case runs twice and must give the same bits. A case
that fails is a line too, and the next one goes on. Exit code 1 if any failed.
On a CPU under TRITON_INTERPRET=1 it runs in float16 alone, to test this file.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded

import torch
from attention_levels import CORRECT, Case, call_of, levels
from json_lines import JsonLines

from ebwm_kernels.attention import reference, second_reference, triton_backend
from ebwm_kernels.attention.tuning import MAX_HEAD_DIMENSION
from ebwm_scale.core.arguments import ArgumentParser

REFERENCE = SimpleNamespace(
    forward=reference.forward,
    gradient=reference.gradient,
    double_backward=second_reference.double_backward,
    tangent=second_reference.tangent,
)
# Relative errors of a whole tensor. Half precisions round every product's operands.
LIMITS = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 2e-5}


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first three cases, bfloat16")
    parser.add_argument("--output", type=Path, default=None, metavar="FILE")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    dtypes = list(LIMITS) if on_gpu else [torch.float16]
    cases = CORRECT
    if options.quick:
        cases, dtypes = CORRECT[:3], dtypes[:1]
    failed = 0
    with JsonLines(options.output) as lines:
        for dtype in dtypes:
            for case in cases:
                if case.d > MAX_HEAD_DIMENSION[dtype]:
                    continue
                row = check(case, dtype, "cuda" if on_gpu else "cpu")
                failed += not row["right"]
                lines.write(row)
        lines.write({"what": "smoke", "failed": failed, "right": failed == 0})
    return int(failed > 0)


def check(case: Case, dtype: torch.dtype, device: str, backend: ModuleType = triton_backend):
    """A line about one case."""
    row = {"case": case._asdict(), "dtype": str(dtype).removeprefix("torch.")}
    start = time.perf_counter()
    try:
        call = call_of(case, dtype, device)
        exact = levels(REFERENCE, call.double())
        poison(call.grad)
        ours = levels(backend, call)
        again = levels(backend, call)
    except Exception as error:  # noqa: BLE001  what does not compile or launch is a result
        return row | {"right": False, "failed": f"{type(error).__name__}: {error}"[:600]}
    errors = {name: relative_error(ours[name], exact[name]) for name in exact}
    wrong = [name for name, error in errors.items() if not error < LIMITS[dtype]]
    unsteady = [name for name in ours if not torch.equal(ours[name], again[name])]
    worst = max(errors, key=lambda name: errors[name])
    return row | {
        "right": not wrong and not unsteady,
        "worst": worst,
        "error": errors[worst],
        "wrong": wrong,
        "not_the_same_twice": unsteady,
        "seconds": round(time.perf_counter() - start, 2),
    }


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """NaN where there is a NaN, so that no limit lets it pass."""
    return float((ours.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def poison(like: torch.Tensor) -> None:
    """Freed memory full of NaN, which the allocator hands out next."""
    held = [torch.full_like(like, torch.nan) for _ in range(16)]
    del held


if __name__ == "__main__":
    sys.exit(main())
