"""energy_attention and causal_attention are their definitions, to second order, for every shape and
backend; and they say no where they must.
"""

import pytest
import torch
from attention_cases import Case, derivatives, relative_error
from torch.utils.flop_counter import FlopCounterMode

import ebwm_kernels.attention.flops  # noqa: F401  registers them
from ebwm_kernels import causal_attention, energy_attention
from ebwm_kernels.attention import ops as attention_ops
from ebwm_kernels.attention import reference as attention_reference
from ebwm_kernels.attention import tuning as attention_tuning
from ebwm_kernels.attention.ops import why_not_triton
from ebwm_kernels.attention.row_blocks import ROWS
from ebwm_kernels.attention.visibility import visible_pairs

CASES = [  # B, H, H_kv, S, C, d, offset, own, causal
    Case(1, 1, 1, 1, 1, 16),
    Case(1, 1, 1, 2, 2, 16),
    Case(2, 4, 2, 17, 17, 32),
    Case(1, 2, 1, 64, 64, 64),
    Case(1, 2, 2, 3, 40, 16, 33),
    Case(1, 4, 1, 5, 6, 16, 1),
    Case(1, 2, 1, 1, 50, 128, 49),
    Case(1, 1, 1, 9, 4, 24, 2),
    Case(1, 1, 1, 6, 6, 80),
    Case(1, 1, 1, 6, 6, 96),
    Case(1, 1, 1, 20, 20, 128),  # beyond 96 columns dQ sums up in two loops
    Case(1, 1, 1, 20, 20, 128, 0, False),
    Case(1, 1, 1, 20, 20, 256),
    Case(1, 1, 1, 1, 2, 16, 1, False),
    Case(2, 4, 2, 17, 17, 32, 0, False),
    Case(1, 2, 1, 33, 40, 16, 7, False),
    Case(1, 1, 1, 9, 4, 24, 2, False),
    Case(2, 2, 1, 17, 23, 16, 0, False, False),
    Case(1, 1, 1, 1, 5, 64, 0, False, False),
    Case(1, 1, 1, 130, 130, 8),
    Case(1, 1, 1, 130, 130, 8, 0, False),
]
LONG = [
    Case(1, 1, 1, 200, 200, 64),
    pytest.param(Case(1, 1, 1, 257, 257, 128), marks=pytest.mark.soak),
    Case(1, 1, 1, 257, 257, 16, 0, False),
]
SMALL, SMALL_PLAIN = Case(2, 4, 2, 7, 9, 16, 2), Case(2, 4, 2, 7, 9, 16, 2, False)
BOTH = pytest.mark.parametrize("case", [SMALL, SMALL_PLAIN], ids=["energy", "causal"])


# The test extra installs Triton on Linux x86-64; tests/conftest.py chooses its interpreter unless
# there is a GPU, where test_attention_gpu.py takes over.
OBSTACLE = why_not_triton(torch.device("cpu"), torch.float64, 64)
INTERPRETED = pytest.mark.skipif(OBSTACLE is not None, reason=f"Triton's interpreter: {OBSTACLE}")


@pytest.fixture(params=["reference", pytest.param("triton", marks=INTERPRETED)])
def backend(request):
    return request.param


def check(case, backend, **options):
    ours = derivatives(lambda *x: case.attention(*x, backend=backend), case.inputs(**options))
    plain = derivatives(case.definition, case.inputs(**options))
    for mine, theirs in zip(ours, plain):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    assert all(gradient.requires_grad for gradient in ours[1:4])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_inner_gradient_and_all_second_order_gradients_equal_plain_autograd(case, backend):
    check(case, backend)


@pytest.mark.parametrize("case", LONG, ids=str)
def test_the_same_over_many_tiles(case, backend):
    check(case, backend)


@BOTH
def test_large_scores_and_a_large_common_key_keep_the_gradients(case, backend):
    for options in (
        {"scale": 6.0},
        {"common_key": 1e3},
    ):  # scores of 150 and 300 lose as many digits in plain autograd, too
        ours, plain = (
            derivatives(f, case.inputs(**options))
            for f in (lambda *x: case.attention(*x, backend=backend), case.definition)
        )
        assert max(map(relative_error, ours, plain)) < 1e-10, options


@pytest.mark.parametrize(
    "case",
    [SMALL, pytest.param(SMALL_PLAIN, marks=pytest.mark.soak)],
    ids=["energy", "causal"],
)
# the interpreter takes a minute, and is compared with plain autograd above
@pytest.mark.parametrize(
    "backend", ["reference", pytest.param("triton", marks=[INTERPRETED, pytest.mark.soak])]
)
def test_gradcheck_and_gradgradcheck(case, backend):
    """Context of energy_attention included: it is differentiable twice with respect to all five."""
    case = case._replace(B=1, H=2, H_kv=1, S=3, C=4, offset=1)

    def function(*inputs):
        return case.attention(*inputs, backend=backend)

    assert torch.autograd.gradcheck(function, case.inputs(), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, case.inputs(), fast_mode=True)


@BOTH
def test_first_order_backward_reaches_all_inputs(case, backend):
    ours, plain = case.inputs(), case.inputs()
    case.attention(*ours, backend=backend).square().sum().backward()
    case.definition(*plain).square().sum().backward()
    for mine, theirs in zip(ours, plain):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-11, atol=1e-12)


PARTS = [(SMALL, chosen) for chosen in [(0,), (1,), (2,), (3,), (4,), (0, 1, 2, 3, 4)]]
PARTS += [(SMALL_PLAIN, chosen) for chosen in [(0,), (1,), (2,), (0, 1, 2)]]
PARTS += [
    pytest.param(case, chosen, marks=pytest.mark.soak)
    for case, chosen in [(SMALL, (0, 2)), (SMALL, (0, 4)), (SMALL_PLAIN, (0, 2))]
]


@pytest.mark.parametrize(
    "case, chosen",
    PARTS,
    ids=lambda part: "energy" if part is SMALL else "causal" if part is SMALL_PLAIN else str(part),
)
def test_second_order_through_any_part_of_the_inner_gradient(case, backend, chosen):
    """Cotangents that are None are zeros, and a gradient of the context under create_graph is a
    gradient, not silence.
    """
    results = []
    for function in (lambda *x: case.attention(*x, backend=backend), case.definition):
        inputs = case.inputs()
        inner = torch.autograd.grad(
            function(*inputs).sin().sum(), [inputs[i] for i in chosen], create_graph=True
        )
        assert all(g.requires_grad for g in inner)
        results.append([*inner, *torch.autograd.grad(sum(g.sin().sum() for g in inner), inputs)])
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_the_inner_gradient_leaves_the_context_alone(backend, monkeypatch):
    """A refinement step asks for q, k* and v*: no work for the context's keys and values, with or
    without a graph.
    """
    asked = []
    implementation = attention_ops._implementation(backend)
    right = implementation.gradient
    monkeypatch.setattr(
        implementation,
        "gradient",
        lambda *x, with_keys: asked.append(with_keys) or right(*x, with_keys=with_keys),
    )
    inputs = SMALL.inputs()
    keys, values = (u * 1.0 for u in inputs[3:])
    out = SMALL.attention(*inputs[:3], keys, values, backend=backend).square().sum()
    torch.autograd.grad(out, inputs[:3], create_graph=True)
    torch.autograd.grad(out, inputs[:3], retain_graph=True)
    assert asked == [False, False]
    torch.autograd.grad(out, [inputs[0], keys], retain_graph=True)
    out.backward()
    assert asked == [False, False, True, True] and inputs[4].grad is not None


@BOTH
def test_a_third_derivative_raises(case, backend):
    inputs = case.inputs()
    inner = torch.autograd.grad(
        case.attention(*inputs, backend=backend).sin().sum(), inputs[:3], create_graph=True
    )
    with pytest.raises(RuntimeError, match="third derivative is not defined"):
        torch.autograd.grad(sum(g.sin().sum() for g in inner), inputs[0], create_graph=True)


@BOTH
def test_non_contiguous_inputs_and_a_given_scale(case, backend):
    inputs = [u.detach().transpose(1, 2).contiguous().transpose(1, 2) for u in case.inputs()]
    assert not inputs[0].is_contiguous()
    function = energy_attention if case.own else causal_attention
    scaled = [inputs[0] * 0.3 * case.d**0.5, *inputs[1:]]
    torch.testing.assert_close(
        function(*inputs, scale=0.3, context_offset=2, backend=backend), case.definition(*scaled)
    )


@BOTH
def test_results_are_the_same_every_time(case, backend):
    first, second = (
        derivatives(lambda *x: case.attention(*x, backend=backend), case.inputs()) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("term", ["phi", "centre", "future", "own"])
def test_the_comparison_notices_a_wrong_double_backward(term, monkeypatch):
    """Breaks the reference on purpose, one term at a time, and expects the comparison above to see
    it.
    """
    right = attention_reference.double_backward
    if term == "phi":
        monkeypatch.setattr(
            attention_reference,
            "double_backward",
            lambda *x: right(*x)._replace(grad=right(*x).grad * 1.001),
        )
    elif term == "centre":
        monkeypatch.setattr(
            attention_reference,
            "double_backward",
            lambda c, *rest: right(c._replace(query=c.query * 1.0001), *rest),
        )
    elif term == "future":
        monkeypatch.setattr(
            attention_reference,
            "double_backward",
            lambda *x: right(*x[:-1], x[-1]._replace(offset=x[-1].offset + 1)),
        )
    else:
        monkeypatch.setattr(
            attention_reference,
            "double_backward",
            lambda c, *rest: right(c._replace(v_self=c.v_self * 1.0001), *rest),
        )
    with pytest.raises(AssertionError):
        check(SMALL, "reference")


@INTERPRETED
@pytest.mark.parametrize(
    "kernel",
    ["_tangent", "_second_own", "_second_query", "_second_key", "_gradient_query", "_gradient_key"],
)
def test_the_comparison_notices_a_kernel_that_skips_its_last_tile(kernel, monkeypatch):
    """Each kernel is needed: run over one row, or one key, fewer, it spoils a number that is
    compared.
    """
    from ebwm_kernels.attention import launches

    right = launches.Call._run

    def spoiled(self, function, tile, num_programs, *rest):
        right(self, function, tile, num_programs - (function.__name__ == kernel), *rest)

    monkeypatch.setattr(launches.Call, "_run", spoiled)
    monkeypatch.setattr(
        torch, "empty", torch.zeros
    )  # what is not written is zero, not yesterday's right answer
    # with own keys _second_key has taken over what _gradient_key does (joint.py)
    case = SMALL_PLAIN if kernel == "_gradient_key" else SMALL
    with pytest.raises(AssertionError):
        check(case, "triton")


@INTERPRETED
@pytest.mark.soak
def test_every_tile_of_the_table_computes_the_same(monkeypatch):
    """The tiles that GPUs get, in the interpreter: sizes that are no multiple of them, heads that
    share keys.
    """
    from ebwm_kernels.attention import launches

    for architecture in ("sm_80", "sm_90"):
        for case in (
            Case(1, 2, 1, 70, 70, 64),
            Case(1, 2, 1, 70, 70, 64, 0, False),
            Case(1, 1, 1, 70, 70, 90),
        ):
            monkeypatch.setattr(launches, "architecture", lambda device: architecture)
            monkeypatch.setattr(
                launches,
                "tile_for",
                lambda kernel, a, d, dtype, *rest, **more: attention_tuning.tile_for(
                    kernel, a, d, torch.bfloat16, *rest, **more
                ),
            )
            check(case, "triton")


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.soak), torch.float16]
)
@pytest.mark.parametrize(
    "case",
    [SMALL, pytest.param(SMALL_PLAIN, marks=pytest.mark.soak)],
    ids=["energy", "causal"],
)
def test_low_precision_is_as_near_to_float64_as_pytorch_math_of_the_same_dtype(
    case, backend, dtype
):
    """In every output of every order, over three draws: at most 1.5 times its error (Triton), twice
    (reference), a twentieth of a rounding aside.

    PyTorch computes float16 in float32. The loss whose gradients are compared rounds as well, so
    equal errors are a ratio of one.
    """
    case, allowed = case._replace(S=48, C=50, d=64, B=1), 1.5 if backend == "triton" else 2.0
    totals = 0
    for seed in range(3):
        exact = derivatives(
            case.definition,
            [u.double().detach().requires_grad_() for u in case.inputs(dtype=dtype, seed=seed)],
        )
        ours = derivatives(
            lambda *x: case.attention(*x, backend=backend), case.inputs(dtype=dtype, seed=seed)
        )
        math = derivatives(case.sdpa_math, case.inputs(dtype=dtype, seed=seed))
        totals += torch.tensor(
            [
                [relative_error(mine, right), relative_error(theirs, right)]
                for mine, theirs, right in zip(ours, math, exact)
            ]
        )
    assert (totals[:, 0] <= allowed * totals[:, 1] + 3 * torch.finfo(dtype).eps / 20).all(), totals


def test_bfloat16_runs_on_the_reference_and_keeps_its_dtype():
    outputs = derivatives(SMALL.attention, SMALL.inputs(dtype=torch.bfloat16))
    exact = derivatives(
        SMALL.definition,
        [u.detach().double().requires_grad_() for u in SMALL.inputs(dtype=torch.bfloat16)],
    )
    assert all(u.dtype == torch.bfloat16 for u in outputs)
    assert max(map(relative_error, outputs, exact)) < 2e-2


@BOTH
def test_the_operations_are_well_formed_for_dispatch_fake_tensors_and_aot(case):
    """torch.library's own checks: schema, fake tensors, autograd registration."""
    q, *own, k, v = case.inputs()
    own = own or [None, None]
    rest = (0.25, case.offset, case.causal, 1, 1, "reference")
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        torch.ops.ebwm.attention.default, (q, k, v, *own, None, *rest), test_utils=tests
    )
    out, normalizer = (u.detach() for u in torch.ops.ebwm.attention(q, k, v, *own, None, *rest))
    for with_keys in (False, True):
        torch.library.opcheck(
            torch.ops.ebwm.attention_gradient.default,
            (torch.ones_like(q), q, k, v, *own, None, out, normalizer, *rest, with_keys, False),
            test_utils=tests,
        )
    cotangents = (q, None, None, *own) if case.own else (q, k, v, None, None)
    torch.library.opcheck(
        torch.ops.ebwm.attention_double_backward.default,
        (
            *(None if u is None else u.detach() for u in (*cotangents, q, q, k, v, *own)),
            None,
            out,
            normalizer,
            *rest,
        ),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_flops_count_the_pairs_that_exist():
    for S, C, offset in [(7, 7, 0), (7, 9, 2), (3, 12, 9), (9, 4, 2), (1, 1, 0), (4, 4, 8)]:
        assert visible_pairs(S, C, offset) == sum(min(C, t + offset + 1) for t in range(S))
    assert visible_pairs(7, 9, causal=False) == 63
    inputs, counter = SMALL.inputs(), FlopCounterMode(display=False)
    with counter:
        derivatives(SMALL.attention, inputs)
    per_product = 2 * 2 * 4 * visible_pairs(7, 9, 2) * 16
    assert counter.get_total_flops() == per_product * (
        2 + 3 + 5 + 8
    )  # forward, inner, ordinary backward with K and V, double backward


@BOTH
def test_memory_of_the_reference_is_linear_in_the_number_of_positions(case):
    """Nothing of size S x S is alive at once: 16 blocks' worth of positions, and no tensor holds
    more than a block of rows.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if operation := OPERATIONS.get(function.name()):
                with self:
                    return operation(*args, **(kwargs or {}))
            result = function(*args, **(kwargs or {}))
            largest.extend(
                u.untyped_storage().nbytes()
                for u in torch.utils._pytree.tree_leaves(result)
                if isinstance(u, torch.Tensor)
            )
            return result

    OPERATIONS = {
        o._qualname: o._init_fn
        for o in (attention_ops._attention, attention_ops._gradient, attention_ops._double_backward)
    }
    S = 16 * ROWS
    with Largest():
        derivatives(
            case._replace(B=1, H=1, H_kv=1, S=S, C=S, offset=0, d=16).attention,
            case._replace(B=1, H=1, H_kv=1, S=S, C=S, offset=0, d=16).inputs(),
        )
    assert max(largest) <= 8 * ROWS * S


BAD = [
    (
        lambda t: [t[0], t[1][:, :, :-1], *t[2:]],
        r"k_self has shape \(2, 4, 6, 16\), q has \(2, 4, 7, 16\)",
    ),
    (
        lambda t: [*t[:3], t[3][:, :1].expand(-1, 3, -1, -1), t[4][:, :1].expand(-1, 3, -1, -1)],
        r"3 key/value heads for 4 query heads",
    ),
    (lambda t: [t[0].float(), *t[1:]], r"must share one floating dtype"),
    (
        lambda t: [t[0].to("meta"), *t[1:]],
        r"k_self is torch.float64 on cpu, q is torch.float64 on meta",
    ),
    (lambda t: [*t[:4], t[4][..., :2]], r"v_self has shape .* it must be \(2, 4, 7, 2\)"),
    (lambda t: [*t[:3], t[3][:1], t[4][:1]], r"needs both to be \(2, H_kv, C, 16\)"),
    (lambda t: [*t[:3], t[3][:, :, :0], t[4][:, :, :0]], r"at least one key"),
    (lambda t: [t[0][0], *t[1:]], r"q has shape .*expected 4 dimensions"),
    (lambda t: [u.long() for u in t], r"one floating dtype"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_what_does_not_fit_is_refused_before_any_work(change, message):
    with pytest.raises(ValueError, match=message):
        energy_attention(*change([u.detach() for u in SMALL.inputs()]))


def test_causal_attention_refuses_the_same():
    q, k, v = (u.detach() for u in SMALL_PLAIN.inputs())
    with pytest.raises(
        ValueError, match=r"causal_attention: k has shape \(2, 2, 9, 16\) and v \(2, 2, 8, 16\)"
    ):
        causal_attention(q, k, v[:, :, 1:])
    with pytest.raises(ValueError, match="context_offset is -1; must be 0 or more"):
        causal_attention(q, k, v, context_offset=-1)


def test_a_backend_that_is_unknown_or_cannot_run_is_refused_with_the_reason(monkeypatch):
    inputs = SMALL.inputs()
    with pytest.raises(ValueError, match="backend is 'cuda'; allowed: auto, triton, reference"):
        energy_attention(*inputs, backend="cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        ValueError,
        match="backend triton cannot run torch.float64, head dimension 16 on cpu: .*; "
        "use backend auto or reference",
    ):
        energy_attention(*inputs, backend="triton")
    wide = Case(1, 1, 1, 2, 2, 300).inputs()
    with pytest.raises(ValueError, match="head dimensions up to 256"):
        energy_attention(*wide, backend="triton")
    energy_attention(*wide)  # auto: the reference takes any
