"""The Triton kernels on the GPU at hand: half precisions and float32 against float64, the same
every time, memory linear in the positions.
"""

import pytest
import torch
from attention_cases import Case, derivatives, relative_error

from ebwm_kernels import energy_attention
from ebwm_kernels.attention.energy import energy_attention_definition
from ebwm_kernels.attention.ops import resolve_backend
from ebwm_kernels.attention.tuning import MAX_HEAD_DIMENSION

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a GPU (tools/gpu/session.py runs this there)"
    ),
]
DEVICE = "cuda"
CASES = [
    Case(1, 1, 1, 1, 1, 64),
    Case(2, 4, 2, 17, 17, 32),
    Case(2, 4, 4, 200, 200, 64),
    Case(1, 2, 1, 257, 300, 128, 43),
    Case(1, 2, 2, 130, 130, 16),
    Case(1, 2, 1, 90, 90, 80),
    Case(1, 2, 2, 190, 190, 96),
    Case(1, 1, 1, 100, 100, 192),
    Case(1, 1, 1, 140, 140, 256),
    Case(1, 8, 2, 1024, 1024, 64),
    Case(1, 4, 4, 513, 513, 128),
    Case(2, 4, 2, 200, 200, 64, 0, False),
    Case(1, 2, 1, 257, 300, 128, 43, False),
    Case(1, 2, 2, 100, 170, 64, 0, False, False),
]


def errors(case, dtype, **options):
    """(ours, PyTorch's MATH of the same dtype) against float64, per output."""
    exact = derivatives(
        case.definition,
        [
            u.double().detach().requires_grad_()
            for u in case.inputs(dtype=dtype, device=DEVICE, **options)
        ],
    )
    ours = derivatives(
        lambda *x: case.attention(*x, backend="triton"),
        case.inputs(dtype=dtype, device=DEVICE, **options),
    )
    math = derivatives(case.sdpa_math, case.inputs(dtype=dtype, device=DEVICE, **options))
    return [
        (relative_error(a, right), relative_error(b, right))
        for a, b, right in zip(ours, math, exact)
    ]


@pytest.mark.parametrize(
    "case, dtype",
    [
        (case, dtype)
        for case in CASES
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        if case.d <= MAX_HEAD_DIMENSION[dtype]
    ],
    ids=str,
)
def test_every_output_is_within_twice_the_error_of_pytorch_math(case, dtype):
    assert resolve_backend("auto", torch.device(DEVICE), dtype, case.d, "test") == "triton"
    for ours, math in errors(case, dtype):
        assert ours <= 2 * math + torch.finfo(dtype).eps, (ours, math)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_large_common_key_does_not_drown_the_gradients(dtype):
    for ours, math in errors(Case(1, 4, 2, 200, 200, 64), dtype, common_key=30.0):
        assert ours <= 2 * math + 4 * torch.finfo(dtype).eps, (ours, math)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("group, documents", [(49, False), (1, True), (49, True)])
def test_groups_and_documents_are_within_twice_the_error_of_the_reference(group, documents, dtype):
    case, options = Case(2, 4, 2, 196, 196, 64), {"group_size": group}
    if documents:
        rows = torch.arange(196, device=DEVICE, dtype=torch.int32)
        options["first_visible"] = (rows // 98 * 98).expand(2, -1)
    inputs = case.inputs(dtype=dtype, device=DEVICE)
    exact = derivatives(
        lambda *x: energy_attention_definition(*x, **options),
        [u.detach().double().requires_grad_() for u in inputs],
    )
    ours, plain = (
        derivatives(lambda *x, b=backend: energy_attention(*x, backend=b, **options), inputs)
        for backend in ("triton", "reference")
    )
    for mine, theirs, right in zip(ours, plain, exact):
        allowed = 2 * relative_error(theirs, right) + torch.finfo(dtype).eps
        assert relative_error(mine, right) <= allowed


def test_results_are_the_same_every_time():
    case = Case(2, 8, 2, 500, 500, 64)
    first, second = (
        derivatives(case.attention, case.inputs(dtype=torch.bfloat16, device=DEVICE))
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_peak_memory_is_linear_in_the_number_of_positions():
    def peak(S):
        inputs = Case(1, 4, 4, S, S, 64).inputs(dtype=torch.bfloat16, device=DEVICE)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        derivatives(Case(1, 4, 4, S, S, 64).attention, inputs)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    peak(4096)
    assert peak(16384) <= 4.4 * peak(4096)
