"""Tensors of attention that lie positions first, packed, shared or otherwise: read where they are,
with the numbers of contiguous ones; and the model, which hands its projections over as they lie.
"""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from attention_cases import Case, derivatives
from test_triton_masks import Case as Masked
from test_triton_masks import problem
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ebwm_kernels import energy_attention
from ebwm_kernels.attention import reference
from ebwm_kernels.attention.ops import why_not_triton
from ebwm_scale.config.load import config_from_dict
from ebwm_scale.model.attention import Attention
from ebwm_scale.model.rotary import RotaryTable

OBSTACLE = why_not_triton(torch.device("cpu"), torch.float64, 64)
INTERPRETED = pytest.mark.skipif(OBSTACLE is not None, reason=f"Triton's interpreter: {OBSTACLE}")
if OBSTACLE is None:
    import triton.language as triton_language

    from ebwm_kernels.attention import launches, triton_backend


def positions_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def packed(x: Tensor) -> Tensor:
    """Every third head of a projection that gives queries, keys and values at once."""
    whole = x.new_full((x.shape[0], x.shape[2], x.shape[1], 3, x.shape[3]), float("nan"))
    whole[:, :, :, 1] = x.transpose(1, 2)
    return whole[:, :, :, 1].transpose(1, 2)


def from_a_longer_one(x: Tensor) -> Tensor:
    """The first positions of a cache, the last of which nobody has written."""
    cache = x.new_full((*x.shape[:2], x.shape[2] + 3, x.shape[3]), float("nan"))
    cache[:, :, : x.shape[2]] = x
    return cache[:, :, : x.shape[2]]


def columns_apart(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def between_loads(x: Tensor) -> Tensor:
    """Rows that do not start where a load may: one number more than the head dimension apart."""
    whole = x.new_full((*x.shape[:3], x.shape[3] + 1), float("nan"))
    whole[..., :-1] = x
    return whole[..., :-1]


READ_IN_PLACE = (positions_first, packed, from_a_longer_one)
SMALL = Masked(3, 3, H=2, H_kv=1)
COPIED = (columns_apart, between_loads)
CASES = [
    Masked(5, 7, offset=2, H=4, H_kv=2),
    Masked(6, 6, own=False, H=2, H_kv=1, d=24),
    Masked(8, 8, 4, 4, first="documents", H=2, H_kv=2),
]


def laid_out(task, *layouts):
    """The same problem with its tensors in other layouts, which take turns."""
    turns = itertools.cycle(layouts)

    def layout(x: Tensor) -> Tensor:
        return next(turns)(x)

    def move(x: Tensor | None) -> Tensor | None:
        return None if x is None else layout(x)

    return task._replace(
        inputs=[layout(x) for x in task.inputs],
        grad=layout(task.grad),
        cotangents=type(task.cotangents)(*(move(x) for x in task.cotangents)),
    )


def assert_same_bits(task, other, implementation) -> None:
    expected = task.levels(implementation)
    for level, ours in other.levels(implementation).items():
        for mine, right in zip(ours, expected[level]):
            assert mine is right is None or torch.equal(mine, right), level


@INTERPRETED
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_give_the_same_bits_in_every_layout(case):
    task = problem(case)
    assert_same_bits(task, laid_out(task, *READ_IN_PLACE, *COPIED), triton_backend)


@INTERPRETED
@pytest.mark.parametrize("layout", READ_IN_PLACE, ids=lambda f: f.__name__)
def test_kernels_read_a_tensor_where_it_lies(layout):
    x = torch.randn(2, 3, 4, 16, dtype=torch.float64)
    view = layout(x)
    assert launches.ready(view) is view and not view.is_contiguous()


@INTERPRETED
@pytest.mark.parametrize("layout", COPIED, ids=lambda f: f.__name__)
def test_what_no_load_can_read_is_copied(layout):
    view = layout(torch.randn(2, 3, 4, 16, dtype=torch.float64))
    ready = launches.ready(view)
    assert ready is not None and ready is not view
    assert ready.is_contiguous() and torch.equal(ready, view)


@INTERPRETED
def test_tensors_that_samples_or_heads_share_are_read_where_they_lie():
    task = problem(SMALL)

    def shared(x: Tensor) -> Tensor:
        return x[:, :1].expand(2, x.shape[1], -1, -1)

    view = shared(task.inputs[0])
    assert view.stride()[:2] == (0, 0) and launches.ready(view) is view
    other = laid_out(task, shared)
    assert_same_bits(laid_out(other, lambda x: x.contiguous()), other, triton_backend)


@INTERPRETED
def test_rows_beyond_the_reach_of_32_bits_are_brought_together():
    """2**20 rows 2**12 apart; the memory is never touched."""
    far = torch.empty_strided((1, 64, 2**20, 64), (2**32, 64, 2**12, 1), device="meta")
    assert not launches._can_be_read(far)
    assert launches._can_be_read(far[:, :, : 2**18])


@INTERPRETED
def test_a_wrong_step_is_noticed(monkeypatch):
    """Rows taken as if they were side by side."""
    right = launches.strides_of

    def dense(x):
        return right(x)._replace(row=triton_language.constexpr(x.shape[-1]))

    monkeypatch.setattr(launches, "strides_of", dense)
    task = problem(SMALL)
    with pytest.raises(AssertionError):
        assert_same_bits(task, laid_out(task, positions_first), triton_backend)


@pytest.mark.parametrize("layout", READ_IN_PLACE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_gives_the_same_bits_in_every_layout(case, layout):
    task = problem(case)
    assert_same_bits(task, laid_out(task, layout), reference)


@pytest.mark.parametrize("layout", COPIED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_is_right_for_rows_that_lie_oddly(case, layout):
    """Its sums run in another order there."""
    task = problem(case)
    expected = task.levels(reference)
    for level, ours in laid_out(task, layout).levels(reference).items():
        for mine, right in zip(ours, expected[level]):
            torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-12, msg=level)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=INTERPRETED)])
def test_outputs_lie_as_a_projection_reads_them_and_gradients_as_their_tensors(backend):
    case = Case(2, 2, 1, 3, 4, 16, 1)
    for layout in (positions_first, lambda x: x):
        inputs = [layout(x.detach()).requires_grad_() for x in case.inputs()]
        out = case.attention(*inputs, backend=backend)
        assert out.transpose(1, 2).is_contiguous()
        first = torch.autograd.grad(out.sin().sum(), inputs, create_graph=True)
        loss = torch.stack([g.sin().sum() for g in first]).sum()
        second = torch.autograd.grad(loss, inputs)
        for gradients in (first, second):
            assert [g.stride() for g in gradients] == [x.stride() for x in inputs]


def test_positions_first_has_the_derivatives_of_the_definition():
    case = Case(2, 4, 2, 5, 7, 16, 2)
    exact = derivatives(case.definition, case.inputs())
    inputs = [positions_first(x.detach()).requires_grad_() for x in case.inputs()]
    for mine, right in zip(derivatives(case.attention, inputs), exact):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-12)


class Copies(TorchDispatchMode):
    """Counts the tensors of a whole stream that are copied to lie otherwise."""

    def __init__(self, numel: int):
        super().__init__()
        self.numel = numel
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        copies = (torch.ops.aten.clone, torch.ops.aten.copy_, torch.ops.aten._to_copy)
        is_large = function.overloadpacket in copies and args[0].numel() >= self.numel
        if is_large and not within_the_interpreter():
            self.found.append(f"{function} {tuple(args[0].shape)} {args[0].stride()}")
        return function(*args, **(kwargs or {}))


def within_the_interpreter() -> bool:
    """Triton's interpreter copies what a kernel is given, which a GPU does not."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.endswith("triton/runtime/interpreter.py"):
            return True
        frame = frame.f_back
    return False


def copies_of_a_layer(backend: str, num_kv_heads: int) -> list[str]:
    """Through the predicted stream: its context, output, inner gradient and second order."""
    width, batch, rows = 32, 2, 5
    model = {"size": "4xs", "width": width, "num_heads": 2, "num_kv_heads": num_kv_heads}
    config = config_from_dict({"model": model | {"attention_backend": backend}}).model
    attention = Attention(config).double()
    observed, predicted = (
        torch.randn(batch, rows, width, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    rotary = RotaryTable(width // 2, 1e4)(rows, observed)
    with Copies(batch * rows * width // 2) as copies:
        context = attention.keys_values(observed, rotary)
        out = attention.forward_predicted(predicted, context, rotary, 0)
        (slope,) = torch.autograd.grad(out.square().sum(), predicted, create_graph=True)
        slope.sin().sum().backward()
    return copies.found


@INTERPRETED
def test_the_model_makes_no_copy_for_kernels_that_read_any_layout(monkeypatch):
    ready = launches.ready
    copied = []

    def watched(x):
        result = ready(x)
        copied.extend([x.shape] if result is not x else [])
        return result

    monkeypatch.setattr(launches, "ready", watched)
    monkeypatch.setattr(triton_backend, "ready", watched)
    assert copies_of_a_layer("triton", num_kv_heads=2) == [] and copied == []
    repeated = copies_of_a_layer("triton", num_kv_heads=1)  # own keys and values, once per head
    assert len(repeated) == 2 and copied == []


def test_the_model_copies_values_once_for_the_reference():
    """Which would copy them at each level; and it hands out gradients heads first."""
    found = copies_of_a_layer("reference", num_kv_heads=2)
    assert len(found) == 2, found


def test_scores_of_no_position_are_no_error():
    q, k = torch.zeros(2, 2, 0, 16), torch.zeros(2, 2, 3, 16)
    out = energy_attention(q, q, q, k, k)
    assert out.shape == (2, 2, 0, 16)
