"""The Triton kernels with groups, first visible keys and values of their own size, in Triton's
interpreter and float64: every order and the tangent are those of the definition.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from attention_cases import relative_error
from torch import Tensor

from ebwm_kernels.attention import reference
from ebwm_kernels.attention.ops import why_not_triton
from ebwm_kernels.attention.tensors import Cotangents, Inputs
from ebwm_kernels.attention.tuning import architecture_of
from ebwm_kernels.attention.visibility import Shape, same_group, visible_keys

OBSTACLE = why_not_triton(torch.device("cpu"), torch.float64, 64)
if OBSTACLE is None:
    from ebwm_kernels.attention import (
        key_kernels,
        launches,
        query_kernels,
        second_query_kernels,
        triton_backend,
    )

pytestmark = pytest.mark.skipif(OBSTACLE is not None, reason=f"Triton's interpreter: {OBSTACLE}")


# Keys that a row sees. In the wide one, all rows of a tile see the tiles in the middle, and some
# rows those on both sides.
WINDOWS = {"window": 2, "wide window": 62}


class Case(NamedTuple):
    """Tiles of the interpreter are 32 rows by 16 keys, and 16 rows by 32 keys for what is summed
    over rows.
    """

    S: int
    C: int
    group: int = 1
    context_group: int = 1
    offset: int = 0
    own: bool = True
    causal: bool = True
    first: str = "none"
    keys: bool = True  # whether the context's gradients have cotangents
    H: int = 1
    H_kv: int = 1
    d: int = 16
    d_v: int = 16

    def first_visible(self) -> Tensor | None:
        rows = torch.arange(self.S, dtype=torch.int32)
        if self.first == "documents":  # in two samples, at other places
            starts = (0, 5, 21), (0, 18, 33)
            firsts = [sum(torch.where(rows >= s, s - p, 0) for p, s in _steps(x)) for x in starts]
            return torch.stack(firsts).int() // self.group * self.group
        if self.first in WINDOWS:
            last = (rows // self.group + 1) * self.context_group + self.offset
            return (last - WINDOWS[self.first]).clamp(min=0).expand(1, -1).contiguous()
        return None


def _steps(starts):
    return itertools.pairwise(starts)


CASES = [
    Case(1, 1),
    Case(1, 3, offset=2, first="window"),
    Case(5, 11, context_group=2),
    Case(39, 41, 3, 3, offset=2),
    Case(9, 17, 3, 5, offset=2, own=False, H=4, H_kv=2),
    Case(48, 48, 16, 16, keys=False),
    Case(37, 40, 37, 37, offset=3, keys=False),
    Case(39, 20, 3, 3, causal=False),
    Case(40, 40, first="documents", keys=False),
    Case(40, 40, own=False, first="documents", keys=False),
    Case(40, 40, 4, 4, first="documents", H=2),
    Case(40, 44, own=False, offset=4, first="window"),
    Case(40, 40, 2, 2, first="window", keys=False),
    Case(100, 100, first="wide window", keys=False),
    Case(100, 104, own=False, offset=4, first="wide window", H=2),
    Case(100, 100, 4, 4, first="wide window"),
    Case(6, 8, 3, 3, offset=2, d=40, d_v=16),
    Case(5, 7, own=False, causal=False, d=16, d_v=40),
]


def definition(inputs: list[Tensor], first_visible: Tensor | None, shape: Shape) -> Tensor:
    """Attention over context and own keys with one S x (C + S) mask; rows without keys give 0."""
    q, k, v, *own = inputs
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    S = q.shape[2]
    visible = visible_keys(S, k.shape[2], first_visible, shape, q.device)
    if first_visible is not None:
        visible = visible[:, None]
    scores = (shape.scale * q @ k.mT).masked_fill(~visible, float("-inf"))
    if own:
        of_group = same_group(S, shape.group_size, q.device)
        own_scores = (shape.scale * q @ own[0].mT).masked_fill(~of_group, float("-inf"))
        scores = torch.cat([scores, own_scores], -1)
        v = torch.cat([v, own[1]], 2)
    nothing = (scores == float("-inf")).all(-1, keepdim=True)
    return scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0) @ v


class Problem(NamedTuple):
    inputs: list[Tensor]  # q, K, V [, k*, v*]
    grad: Tensor
    g_out: Tensor  # the loss's own gradient on the output
    cotangents: Cotangents
    first_visible: Tensor | None
    shape: Shape

    @property
    def joins(self) -> bool:
        """Whether the ordinary backward can be part of the double backward (joint.py)."""
        return len(self.inputs) == 5 and self.shape.group_size == self.shape.context_group == 1

    def levels(self, implementation) -> dict[str, tuple[Tensor | None, ...]]:
        """Every level of an implementation (triton_backend, reference)."""
        q, k, v, *own = self.inputs
        inputs = Inputs(q, k, v, *(own or (None, None)), self.first_visible)
        output = implementation.forward(inputs, self.shape)
        at = (inputs, output, self.shape)
        first = implementation.gradient(self.grad, *at, with_keys=True)
        second = implementation.double_backward(self.cotangents, self.grad, *at)
        tangent = implementation.tangent(self.cotangents, *at)
        results = {
            "forward": (output.out,),
            "gradient": first,
            "double_backward": second,
            "tangent": (tangent,),
        }
        if self.joins:
            results["joint"] = self._joint(implementation, *at)
        return results

    def _joint(self, implementation, *at) -> tuple[Tensor, ...]:
        """The double backward with the ordinary backward of g_out: one after the other in the
        reference.
        """
        if implementation is not triton_backend:
            g_grad, *rest = implementation.double_backward(self.cotangents, self.grad, *at)
            ordinary = implementation.gradient(self.g_out, *at, with_keys=True)
            return g_grad, *(x + y for x, y in zip(rest, ordinary))
        g_grad, statistics = implementation.double_backward_up(self.cotangents, self.grad, *at)
        rest = implementation.double_backward_down(
            self.cotangents, self.grad, self.g_out, statistics, *at, with_keys=True
        )
        return g_grad, *rest

    def exact(self) -> dict[str, tuple[Tensor, ...]]:
        """The same by autograd and torch.func.jvp of the definition."""
        a, b, c, *own_cotangents = self.cotangents
        inputs = [u.clone().requires_grad_() for u in self.inputs]
        grad = self.grad.clone().requires_grad_()
        out = definition(inputs, self.first_visible, self.shape)
        first = torch.autograd.grad(out, inputs, grad, create_graph=True)
        pairs = [
            (gradient, cotangent)
            for gradient, cotangent in zip(first, (a, b, c, *own_cotangents))
            if cotangent is not None
        ]
        second = torch.autograd.grad(
            [gradient for gradient, _ in pairs],
            [grad, *inputs],
            [cotangent for _, cotangent in pairs],
            retain_graph=True,
        )
        joint = torch.autograd.grad(
            [out, *(gradient for gradient, _ in pairs)],
            [grad, *inputs],
            [self.g_out, *(cotangent for _, cotangent in pairs)],
        )
        tangents = [
            torch.zeros_like(u) if t is None else t
            for u, t in zip(self.inputs, (a, b, c, *own_cotangents))
        ]
        _, tangent = torch.func.jvp(
            lambda *x: definition(list(x), self.first_visible, self.shape),
            tuple(self.inputs),
            tuple(tangents),
        )
        return {
            "forward": (out,),
            "gradient": first,
            "double_backward": second,
            "tangent": (tangent,),
            "joint": joint,
        }


def problem(case: Case) -> Problem:
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, positions: int, d: int) -> Tensor:
        batch = 2 if case.first == "documents" else 1
        return torch.randn(batch, heads, positions, d, generator=generator, dtype=torch.float64)

    def draw_inputs() -> list[Tensor]:
        inputs = [
            draw(case.H, case.S, case.d),
            draw(case.H_kv, case.C, case.d),
            draw(case.H_kv, case.C, case.d_v),
        ]
        if case.own:
            inputs += [draw(case.H, case.S, case.d), draw(case.H, case.S, case.d_v)]
        return inputs

    a, b, c, *own = draw_inputs()
    cotangents = Cotangents(a, *((b, c) if case.keys else (None, None)), *(own or (None, None)))
    shape = Shape(0.3, case.offset, case.causal, case.group, case.context_group)
    inputs, grad = draw_inputs(), draw(case.H, case.S, case.d_v)
    g_out = draw(case.H, case.S, case.d_v)
    return Problem(inputs, grad, g_out, cotangents, case.first_visible(), shape)


def check(case: Case) -> None:
    task = problem(case)
    exact = task.exact()
    for level, ours in task.levels(triton_backend).items():
        for mine, right in zip(ours, exact[level]):
            assert mine is not None
            torch.testing.assert_close(
                mine, right.detach(), rtol=1e-10, atol=1e-12, msg=lambda m, n=level: f"{n}: {m}"
            )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_level_is_that_of_the_definition(case):
    check(case)


@pytest.mark.soak
def test_every_level_is_that_of_the_definition_with_the_patches_of_a_frame():
    check(Case(196, 196, 196, 196, H=1))
    check(Case(392, 400, 196, 200, offset=1, H=1, keys=False))


@pytest.mark.parametrize("own", [False, True], ids=["causal", "energy"])
def test_rows_without_any_key_give_zeros_and_no_nan(own):
    """Two rows of four see nothing; with own keys in groups only the context is empty."""
    group = 2 if own else 1
    task = problem(Case(4, 4, group, group, own=own, first="window"))
    first_visible = torch.tensor([[0, 0, 4, 4]], dtype=torch.int32)
    task = task._replace(first_visible=first_visible)
    exact = task.exact()
    ours = task.levels(triton_backend)
    for level, results in ours.items():
        for mine, right in zip(results, exact[level]):
            torch.testing.assert_close(mine, right.detach(), rtol=1e-10, atol=1e-12, msg=level)
    if not own:
        assert (ours["forward"][0][:, :, 2:] == 0).all()
        q, k, v = task.inputs
        inputs = Inputs(q, k, v, None, None, first_visible)
        normalizer = triton_backend.forward(inputs, task.shape).log_normalizer
        assert (normalizer[:, :, 2:] == float("-inf")).all()


@pytest.mark.parametrize(
    "own, group",
    [(True, 1), *(pytest.param(*case, marks=pytest.mark.soak) for case in ((False, 1), (True, 4)))],
)
def test_tiles_that_no_row_sees_are_not_read(own, group):
    """The first document, and what comes after the rows that are looked at, hold NaN."""
    case = Case(96, 96, group, group, own=own, first="window")
    rows = torch.arange(96, dtype=torch.int32)
    task = problem(case)._replace(first_visible=(rows // 32 * 32)[None])
    clean = task.levels(triton_backend)
    tensors = [*task.inputs, task.grad, task.g_out, *(u for u in task.cotangents if u is not None)]
    for tensor in tensors:
        tensor[:, :, :32] = float("nan")
        tensor[:, :, 64:] = float("nan")
    poisoned = task.levels(triton_backend)
    for level, results in poisoned.items():
        for mine, right in zip(results, clean[level]):
            assert mine is right is None or torch.equal(mine[:, :, 32:64], right[:, :, 32:64]), (
                level
            )


@pytest.mark.parametrize("kernels", ["query", "second query", "key"])
def test_the_comparison_notices_a_tile_without_its_mask(kernels, monkeypatch):
    """Every tile that fits between the first and the last place is taken for one that all see."""
    modules = {"query": query_kernels, "second query": second_query_kernels, "key": key_kernels}

    def too_many(start, end, common, common_end, SIZE, WHOLE):
        return start, end, start, start + (end - start) // SIZE * SIZE

    monkeypatch.setattr(modules[kernels], "tiles_of", too_many)
    with pytest.raises(AssertionError):
        check(Case(40, 40, own=False))


@pytest.mark.parametrize("broken", ["own keys", "last row", "first key", "tangent", "groups"])
def test_the_comparison_notices_what_is_missing(broken, monkeypatch):
    call = launches.Call
    case = Case(8, 8, 4, 4, first="documents")
    if broken == "own keys":  # the gradients of own keys, summed over a group, are left out
        monkeypatch.setattr(call, "over_own_keys", lambda *_, **__: None)
        monkeypatch.setattr(torch, "empty", torch.zeros)
    elif broken == "last row":
        right = call.last_row.func
        monkeypatch.setattr(call, "last_row", property(lambda self: right(self) - 1))
    elif broken == "first key":
        monkeypatch.setattr(launches, "ready", lambda x: x + 1 if _is_integer(x) else x)
    elif broken == "tangent":
        right = triton_backend.tangent
        monkeypatch.setattr(
            triton_backend,
            "tangent",
            lambda t, *rest: right(t._replace(key=t.key * 1.0001), *rest),
        )
    else:
        right = call._sizes
        monkeypatch.setattr(call, "_sizes", lambda self, *x: right(self, *x) | {"context_group": 3})
    with pytest.raises(AssertionError):
        check(case)


def _is_integer(x: Tensor | None) -> bool:
    return x is not None and not x.is_floating_point()


def test_the_levels_of_the_reference_are_the_same():
    task = problem(Case(12, 14, 3, 4, offset=1, first="window"))
    exact = task.levels(reference)
    for level, ours in task.levels(triton_backend).items():
        for mine, right in zip(ours, exact[level]):
            assert relative_error(mine, right) < 1e-12, level


def test_tensors_that_start_in_the_middle_of_an_aligned_one_are_copied():
    task = problem(Case(5, 5, own=False))
    exact = task.levels(triton_backend)
    shifted = []
    for tensor in task.inputs:
        memory = torch.empty(tensor.numel() + 1, dtype=torch.float64)
        view = memory[1:].view(tensor.shape).copy_(tensor)
        assert view.is_contiguous() and view.data_ptr() % launches.ALIGNMENT
        assert launches.ready(view).data_ptr() % launches.ALIGNMENT == 0
        shifted.append(view)
    for level, ours in task._replace(inputs=shifted).levels(triton_backend).items():
        for mine, right in zip(ours, exact[level]):
            assert mine is right is None or torch.equal(mine, right), level


def test_a_users_choice_of_float32_precision_is_followed_and_never_raises():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for chosen, expected in (("tf32", "tf32"), ("ieee", "tf32x3")):
            matmul.fp32_precision = chosen
            assert launches.precision_for(torch.float32) == expected
    finally:
        matmul.fp32_precision = before
    assert launches.precision_for(torch.bfloat16) == "ieee"


@pytest.mark.parametrize(
    "capability, tiles",
    [
        ((8, 0), "sm_80"),
        ((8, 9), "sm_86"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((12, 0), "sm_86"),
    ],
)
def test_gpus_have_tiles_of_their_own_memory(capability, tiles):
    assert architecture_of(capability) == tiles


def test_a_gpu_without_tiles_is_refused_with_the_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (11, 0))
    obstacle = why_not_triton(torch.device("cuda"), torch.bfloat16, 64)
    assert obstacle is not None
    assert obstacle.startswith("no tiles have been compiled for compute capability 11.0")
