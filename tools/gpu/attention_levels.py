"""Calls of attention that the GPU's programs share: sizes, random tensors, and all levels of one
backend on them.

    forward -> gradient (what refinement takes) -> double_backward (what training takes) -> tangent
    joint: the double backward with the ordinary backward, where the kernels have it (joint.py)
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded

import torch
from torch import Tensor

from ebwm_kernels.attention.tensors import Cotangents, Inputs, Output
from ebwm_kernels.attention.tuning import has_joint_tiles
from ebwm_kernels.attention.visibility import Shape

NAMES = {
    "forward": ("O", "L"),
    "gradient": ("dQ", "dK", "dV", "dk*", "dv*"),
    "double_backward": ("gG", "gQ", "gK", "gV", "gk*", "gv*"),
    "tangent": ("dO",),
    "joint": ("joint gG", "joint gQ", "joint gK", "joint gV", "joint gk*", "joint gv*"),
}


class Case(NamedTuple):
    """Sizes of one call: samples, heads of queries and of keys, rows, context keys, and so on.

    own: a key of its own for each row, as candidates have. group: rows that see each other's.
    documents: each row's first visible key is the first one of its document, of so many rows.
    """

    batch: int
    heads: int
    key_heads: int
    rows: int
    keys: int
    d: int
    offset: int = 0
    own: bool = True
    causal: bool = True
    group: int = 1
    documents: int | None = None

    @property
    def shape(self) -> Shape:
        return Shape(self.d**-0.5, self.offset, self.causal, self.group, self.group)


# Few and small: the reference takes them in float64. Odd sizes, shared keys, an offset, one row,
# rows without a context, no own keys, groups that cut tiles, documents.
CORRECT = (
    Case(1, 2, 2, 256, 256, 64),
    Case(1, 2, 1, 257, 300, 64, offset=43),
    Case(1, 2, 2, 256, 256, 128),
    Case(1, 2, 2, 1, 1, 64),
    Case(1, 1, 1, 1, 33, 64, offset=32),
    Case(1, 2, 2, 200, 200, 64, own=False),
    Case(1, 2, 1, 100, 170, 64, own=False, causal=False),
    Case(1, 2, 2, 222, 222, 64, group=37),
    Case(1, 2, 1, 196, 196, 64, group=196),
    Case(2, 2, 2, 250, 250, 64, documents=60),
    Case(1, 2, 1, 130, 130, 32),
    Case(1, 2, 1, 90, 90, 96),
    Case(1, 1, 1, 140, 140, 256),
)
# As training has them.
LARGE = (
    Case(8, 16, 16, 1024, 1024, 64),
    Case(4, 32, 32, 4096, 4096, 64),
    Case(4, 16, 16, 4096, 4096, 128),
    Case(8, 16, 16, 1024, 1024, 64, own=False),
    Case(8, 16, 16, 1024, 1024, 64, group=64),
)


class Call(NamedTuple):
    """All that the levels are given. joins: whether there is a joint pass."""

    inputs: Inputs
    grad: Tensor
    g_out: Tensor
    joins: bool
    cotangents: Cotangents
    tangents: Cotangents
    shape: Shape

    def double(self) -> Call:
        """The same numbers in float64."""

        def wide(tensors):
            return [
                u.double() if torch.is_tensor(u) and u.is_floating_point() else u for u in tensors
            ]

        return Call(
            Inputs(*wide(self.inputs)),
            self.grad.double(),
            self.g_out.double(),
            self.joins,
            Cotangents(*wide(self.cotangents)),
            Cotangents(*wide(self.tangents)),
            self.shape,
        )


def call_of(case: Case, dtype: torch.dtype, device: str, seed: int = 1) -> Call:
    """A call on random numbers. Tensors lie (B, S, H, d), as a projection leaves them."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(heads: int, length: int) -> Tensor:
        shape = (case.batch, length, heads, case.d)
        rows = torch.randn(shape, generator=generator, device=device).to(dtype)
        return rows.transpose(1, 2)

    q, grad, on_q = (draw(case.heads, case.rows) for _ in range(3))
    k, v, on_k, on_v = (draw(case.key_heads, case.keys) for _ in range(4))
    own = [draw(case.heads, case.rows) if case.own else None for _ in range(4)]
    g_out = draw(case.heads, case.rows)
    joins = case.own and case.group == 1 and has_joint_tiles(case.d, dtype)
    first_visible = None
    if case.documents is not None:
        rows = torch.arange(case.rows, device=device)
        starts = rows // case.documents * case.documents
        first_visible = starts.expand(case.batch, -1).to(torch.int32)
    # Refinement differentiates with respect to a candidate: then nothing comes back on dK and dV.
    on_keys = (None, None) if case.own else (on_k, on_v)
    return Call(
        Inputs(q, k, v, own[0], own[1], first_visible),
        grad,
        g_out,
        joins,
        Cotangents(on_q, *on_keys, own[2], own[3]),
        Cotangents(on_q, on_k, on_v, own[2], own[3]),
        case.shape,
    )


def joint(backend: ModuleType, call: Call, output: Output) -> tuple[Tensor, ...]:
    """gG, and the sums of both backwards: of Triton's one pass, or of the reference's two."""
    at = (call.inputs, output, call.shape)
    if not hasattr(backend, "double_backward_up"):
        g_grad, *second = backend.double_backward(call.cotangents, call.grad, *at)
        ordinary = backend.gradient(call.g_out, *at, with_keys=True)
        return g_grad, *(x + y for x, y in zip(second, ordinary))
    g_grad, statistics = backend.double_backward_up(call.cotangents, call.grad, *at)
    rest = backend.double_backward_down(
        call.cotangents, call.grad, call.g_out, statistics, *at, with_keys=True
    )
    return g_grad, *rest


def levels(backend: ModuleType, call: Call) -> dict[str, Tensor]:
    """Every output of every level by its name; backend: triton_backend, or the reference."""
    output = backend.forward(call.inputs, call.shape)
    results = {
        "forward": output,
        "gradient": backend.gradient(call.grad, call.inputs, output, call.shape, with_keys=True),
        "double_backward": backend.double_backward(
            call.cotangents, call.grad, call.inputs, output, call.shape
        ),
        "tangent": (backend.tangent(call.tangents, call.inputs, output, call.shape),),
    }
    if call.joins:
        results["joint"] = joint(backend, call, output)
    return {
        name: tensor
        for level, tensors in results.items()
        for name, tensor in zip(NAMES[level], tensors)
        if tensor is not None
    }
