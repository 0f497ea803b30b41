"""What this GPU reaches without us, to hold our kernels against: a large matrix product, a copy of
memory, and PyTorch's own attention, forward and backward, at the sizes of training.

    python tools/gpu/yardsticks.py [--output yardsticks.jsonl]

Each part is tried by itself: where one cannot run here, its line says why.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded

import torch
from attention_levels import LARGE, Case
from json_lines import JsonLines
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ebwm_kernels import causal_attention
from ebwm_scale.core.arguments import ArgumentParser

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=None, metavar="FILE")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: there is nothing to time", file=sys.stderr)
        return 1
    with JsonLines(options.output) as lines:
        lines.write(attempt("matrix product, bfloat16, 8192 cubed", product))
        lines.write(attempt("copy of 4 GiB", copy))
        for case in LARGE[:3]:
            for name, backend in BACKENDS.items():
                lines.write(
                    attempt(f"SDPA {name}", lambda: sdpa(case, backend), case=case._asdict())
                )
            lines.write(attempt("causal_attention", lambda: causal(case), case=case._asdict()))
    return 0


def attempt(what: str, measure: Callable[[], dict], **about) -> dict:
    try:
        return {"what": what, **about, **measure()}
    except Exception as error:  # noqa: BLE001  what cannot run here is a line as well
        return {"what": what, **about, "failed": f"{type(error).__name__}: {error}"[:600]}


def median_ms(action: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(action, warmup=50, rep=200, return_mode="median"))


def product() -> dict:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    ms = median_ms(lambda: a @ b)
    return {"ms": ms, "tflops_per_s": 2 * 8192**3 / ms / 1e9}


def copy() -> dict:
    source = torch.empty(2**32, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    ms = median_ms(lambda: target.copy_(source))
    return {"ms": ms, "bytes_per_s": 2 * 2**32 / ms * 1e3}


def sdpa(case: Case, backend: SDPBackend) -> dict:
    with sdpa_kernel(backend):
        return forward_and_backward(
            case, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
        )


def causal(case: Case) -> dict:
    return forward_and_backward(case, lambda q, k, v: causal_attention(q, k, v, backend="triton"))


def forward_and_backward(case: Case, attention) -> dict:
    shape = (case.batch, case.heads, case.rows, case.d)
    q, k, v = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    grad = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    forward = median_ms(lambda: attention(q, k, v))
    out = attention(q, k, v)
    backward = median_ms(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True))
    pairs = case.batch * case.heads * case.rows * (case.rows + 1) / 2
    return {
        "forward_ms": forward,
        "backward_ms": backward,
        "forward_tflops_per_s": 4 * pairs * case.d / forward / 1e9,
        "backward_tflops_per_s": 10 * pairs * case.d / backward / 1e9,
    }


if __name__ == "__main__":
    sys.exit(main())
