"""The fused pointwise operations on a GPU, held against plain PyTorch in float64, to the second
order.

    python tools/gpu/smoke_fused.py [--output smoke_fused.jsonl]

One JSON line per operation and precision, written as it is known: value, inner gradient, and the
gradients of a loss of both. Each runs twice and must give the same bits. Exit code 1 if any failed.
On a CPU under TRITON_INTERPRET=1 it runs in float16 alone, with few rows, to test this file.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded

import torch
from json_lines import JsonLines
from smoke import LIMITS, poison, relative_error
from torch import Tensor
from torch.nn import functional as F

from ebwm_kernels import (
    add_rms_norm,
    rms_norm,
    rms_norm_beside,
    swiglu_halves,
    vocabulary_cross_entropy,
    vocabulary_descend,
    vocabulary_embed,
)
from ebwm_kernels.fused.rotation import HeadCounts, split_reference, split_rotated
from ebwm_kernels.vocabulary.api import vocabulary_descend_reference, vocabulary_embed_reference
from ebwm_kernels.vocabulary.candidates import first_candidates
from ebwm_kernels.vocabulary.formulas import Clamps, state_dtype
from ebwm_kernels.vocabulary.graph_steps import descend_with_graph, embed_with_graph
from ebwm_scale.core.arguments import ArgumentParser

EPSILON = 1e-5
HEAD = 64


class Operation(NamedTuple):
    """of (backend, *inputs) -> a tensor or a tuple. shapes: of inputs, given rows and width.
    num_inner: how many inputs the inner gradient is of; 0: first order alone, of the first one.
    """

    of: Callable
    shapes: Callable[[int, int], list[tuple[int, ...]]]
    num_inner: int


def split(backend: str, rows: Tensor) -> tuple[Tensor, ...]:
    heads = rows.shape[-1] // (3 * HEAD)
    angles = torch.arange(rows.shape[1] * HEAD // 2, device=rows.device).view(-1, HEAD // 2) / 7
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    factors = torch.stack([angles.cos(), angles.sin()], -1).to(dtype)
    function = split_reference if backend == "reference" else split_rotated
    return function(rows, factors, HeadCounts(heads, heads, heads))


def scored(backend: str, weight: Tensor, hidden: Tensor) -> Tensor:
    """The loss of a mirror step from zeros."""
    targets = torch.arange(len(hidden), device=hidden.device) % len(weight)
    _, loss = vocabulary_descend(weight, hidden, targets, backend=backend)
    assert loss is not None, "there are targets"
    return loss


def scored_within_clamps(backend: str, weight: Tensor, hidden: Tensor) -> Tensor:
    """The loss of a step through the softmax, with every clamp and a z-loss."""
    targets = torch.arange(len(hidden), device=hidden.device) % len(weight)
    x = (hidden.detach().double() @ weight.detach().double().T).to(state_dtype(weight))
    _, loss = vocabulary_descend(
        weight,
        hidden,
        targets,
        probabilities=x.softmax(-1),
        x=x,
        clamps=Clamps(1.0, 50.0, 30.0),
        z_weight=1e-2,
        backend=backend,
    )
    assert loss is not None, "there are targets"
    return loss


def steps_with_graph(backend: str, weight: Tensor, hidden: Tensor) -> Tensor:
    """The losses of two mirror steps from zeros, the second from the first's state."""
    hidden = hidden / 8  # or rounding decides between a few tokens
    targets = torch.arange(len(hidden), device=hidden.device) % len(weight)
    if backend == "reference":
        first = vocabulary_descend_reference(weight, hidden)
        _, embedded = vocabulary_embed_reference(first, weight)
        second = vocabulary_descend_reference(weight, embedded.sin(), x=first)
        return F.cross_entropy(first, targets) + F.cross_entropy(second, targets)
    first, first_loss, _ = descend_with_graph(weight, hidden, targets)
    first, _, embedded = embed_with_graph(first, weight, keep_p=False)
    _, second_loss, _ = descend_with_graph(weight, embedded.sin(), targets, start=first)
    assert first_loss is not None and second_loss is not None, "there are targets"
    return first_loss + second_loss


def chosen_candidates(backend: str, weight: Tensor, hidden: Tensor) -> Tensor:
    """A sum of what further steps read of the first one."""
    hidden = hidden / 8
    targets = torch.arange(len(hidden), device=hidden.device) % len(weight)
    first = first_candidates(weight, hidden, targets, len(weight) // 4, backend=backend)
    parts = (first.values.logsumexp(-1), first.tail, first.target)
    return torch.stack(parts).double().mean()


OPERATIONS = {
    "rms_norm": Operation(
        lambda b, x, w: rms_norm(x, w, EPSILON, backend=b),
        lambda n, d: [(2, n, d), (d,)],
        1,
    ),
    "rms_norm, modulated": Operation(
        lambda b, x, w, s: rms_norm(x, w, EPSILON, shift=s, backend=b),
        lambda n, d: [(2, n, d), (d,), (d,)],
        1,
    ),
    "rms_norm_beside": Operation(
        lambda b, x, w: rms_norm_beside(x, w, EPSILON, backend=b),
        lambda n, d: [(2, n, d), (d,)],
        1,
    ),
    "add_rms_norm": Operation(
        lambda b, x, u, w: add_rms_norm(x, u, w, EPSILON, backend=b),
        lambda n, d: [(2, n, d), (2, n, d), (d,)],
        2,
    ),
    "swiglu_halves": Operation(
        lambda b, uv: swiglu_halves(uv, backend=b), lambda n, d: [(2, n, 2 * d)], 1
    ),
    "split_rotated": Operation(split, lambda n, d: [(2, n, 3 * d)], 1),
    "vocabulary_descend": Operation(scored, lambda n, d: [(2 * n + 3, d), (n, d)], 0),
    "vocabulary_descend, clamped": Operation(
        scored_within_clamps, lambda n, d: [(2 * n + 3, d), (n, d)], 0
    ),
    "steps with a graph": Operation(steps_with_graph, lambda n, d: [(2 * n + 3, d), (n, d)], 0),
    "first_candidates": Operation(chosen_candidates, lambda n, d: [(2 * n + 3, d), (n, d)], 0),
    "vocabulary_cross_entropy": Operation(
        lambda b, w, h: vocabulary_cross_entropy(
            h, w, torch.arange(len(h), device=h.device) % len(w), backend=b
        ),
        lambda n, d: [(2 * n + 3, d), (n, d)],
        0,
    ),
    "vocabulary_embed": Operation(
        lambda b, w, x: vocabulary_embed(x, w, backend=b)[1],
        lambda n, d: [(2 * n + 3, d), (n, 2 * n + 3)],
        0,
    ),
}


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=None, metavar="FILE")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device, dtypes = ("cuda", list(LIMITS)) if on_gpu else ("cpu", [torch.float16])
    num_rows, width = (1000, 768) if on_gpu else (5, 128)
    failed = 0
    with JsonLines(options.output) as lines:
        for dtype in dtypes:
            for name in OPERATIONS:
                row = check(name, dtype, device, num_rows, width)
                failed += not row["right"]
                lines.write(row)
        lines.write({"what": "smoke_fused", "failed": failed, "right": failed == 0})
    return int(failed > 0)


def check(name: str, dtype: torch.dtype, device: str, num_rows: int, width: int) -> dict:
    """A line about one operation."""
    row = {"operation": name, "dtype": str(dtype).removeprefix("torch."), "width": width}
    start = time.perf_counter()
    drawn = inputs_of(OPERATIONS[name], num_rows, width, dtype, device)
    try:
        exact = numbers(name, "reference", [u.double() for u in drawn])
        poison(drawn[0])
        ours = numbers(name, "triton", drawn)
        again = numbers(name, "triton", drawn)
    except Exception as error:  # noqa: BLE001  what does not compile or launch is a result
        return row | {"right": False, "failed": f"{type(error).__name__}: {error}"[:600]}
    errors = [relative_error(a, b) for a, b in zip(ours, exact)]
    wrong = [index for index, error in enumerate(errors) if not error < LIMITS[dtype]]
    unsteady = [index for index, u in enumerate(ours) if not torch.equal(u, again[index])]
    return row | {
        "right": not wrong and not unsteady,
        "errors": errors,
        "wrong": wrong,
        "not_the_same_twice": unsteady,
        "seconds": round(time.perf_counter() - start, 2),
    }


def inputs_of(
    operation: Operation, num_rows: int, width: int, dtype: torch.dtype, device: str
) -> list[Tensor]:
    """Drawn once for all precisions, and rounded."""
    generator = torch.Generator().manual_seed(1)
    shapes = operation.shapes(num_rows, width)
    return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]


def numbers(name: str, backend: str, given: list[Tensor]) -> list[Tensor]:
    """Values, inner gradients, and the gradients of a loss of both."""
    operation = OPERATIONS[name]
    inputs = [u.detach().clone().requires_grad_() for u in given]
    out = operation.of(backend, *inputs)
    out = out if isinstance(out, tuple) else (out,)
    wide = [y.double() for y in out]
    if operation.num_inner == 0:
        return [*(y.detach() for y in out), *torch.autograd.grad(wide[0].sum(), inputs[:1])]
    outer = sum(((i + 1) * y.sin()).sum() for i, y in enumerate(wide))
    inner = torch.autograd.grad(outer, inputs[: operation.num_inner], create_graph=True)
    loss = sum(y.square().sum() for y in wide) + sum(g.double().cos().sum() for g in inner)
    found = [*out, *inner, *torch.autograd.grad(loss, inputs)]
    return [u.detach() for u in found]


if __name__ == "__main__":
    sys.exit(main())
