"""The fused pointwise kernels, in Triton's interpreter, are plain PyTorch to the second order: in
float64 to 1e-10; in float32 and half precision no further from the exact result than 1.5 times
plain PyTorch in the same precision.

The interpreter cuts bfloat16 off where a GPU rounds it: there float16 stands for half precision.
"""

import pytest
import torch
from torch import Tensor

from ebwm_kernels import (
    add_rms_norm,
    rms_norm,
    rms_norm_beside,
    swiglu,
    swiglu_halves,
    vocabulary_cross_entropy,
    vocabulary_descend,
    vocabulary_embed,
    vocabulary_step,
)
from ebwm_kernels.fused import launches as fused_launches
from ebwm_kernels.fused import norm as fused_norm
from ebwm_kernels.fused import rotation
from ebwm_kernels.fused import swiglu as fused_swiglu
from ebwm_kernels.fused import vocabulary as fused_vocabulary
from ebwm_kernels.fused.launches import why_not_fused
from ebwm_kernels.fused.rotation import HeadCounts, join_reference, split_reference, split_rotated
from ebwm_kernels.vocabulary import softmax_cross_entropy
from ebwm_kernels.vocabulary.formulas import Clamps
from ebwm_kernels.vocabulary.softmax_cross_entropy import IGNORE

OBSTACLE = why_not_fused(torch.device("cpu"), torch.float64)
pytestmark = pytest.mark.skipif(OBSTACLE is not None, reason=f"Triton's interpreter: {OBSTACLE}")

EPSILON = 1e-5
ROWS = (3, 7)
# operation: (function of backend and tensors, their shapes, how many the inner gradient is of)
CASES = {
    "rms_norm": (lambda b, x, w: rms_norm(x, w, EPSILON, backend=b), [(*ROWS, 40), (40,)], 1),
    "rms_norm, weight too": (
        lambda b, x, w: rms_norm(x, w, EPSILON, backend=b),
        [(*ROWS, 40), (40,)],
        2,
    ),
    "rms_norm, modulated": (
        lambda b, x, w, s: rms_norm(x, w, EPSILON, shift=s, backend=b),
        [(*ROWS, 33), (33,), (33,)],
        1,
    ),
    "rms_norm, many rows": (
        lambda b, x, w: rms_norm(x, w, EPSILON, backend=b),
        [(11, 1025), (1025,)],
        1,
    ),
    "add_rms_norm": (
        lambda b, x, u, w: add_rms_norm(x, u, w, EPSILON, backend=b),
        [(*ROWS, 40), (*ROWS, 40), (40,)],
        2,
    ),
    "add_rms_norm, modulated": (
        lambda b, x, u, w, s: add_rms_norm(x, u, w, EPSILON, shift=s, backend=b),
        [(*ROWS, 40), (*ROWS, 40), (40,), (40,)],
        2,
    ),
    "rms_norm_beside": (
        lambda b, x, w: rms_norm_beside(x, w, EPSILON, backend=b),
        [(*ROWS, 40), (40,)],
        1,
    ),
    "swiglu": (lambda b, u, v: swiglu(u, v, backend=b), [(*ROWS, 40), (*ROWS, 40)], 2),
    "swiglu_halves": (lambda b, uv: swiglu_halves(uv, backend=b), [(2, 2 * 1030)], 1),
}
SMALL = [name for name in CASES if name != "rms_norm, many rows"]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """A program takes several tiles of rows one after the other, as it does of a real batch."""
    monkeypatch.setattr(fused_norm, "SUM_PARTS", 3)


def numbers(name: str, backend: str, dtype: torch.dtype) -> list[Tensor]:
    """Value, inner gradient, and the gradients of a loss of both, in float64."""
    function, shapes, num_inner = CASES[name]
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    # rounded first, so that every precision has the same inputs
    inputs = [u.half().to(dtype).requires_grad_() for u in drawn]
    out = function(backend, *inputs)
    out = out if isinstance(out, tuple) else (out,)
    outer = sum(((i + 1) * y.sin()).sum() for i, y in enumerate(out))
    inner = torch.autograd.grad(outer, inputs[:num_inner], create_graph=True)
    assert all(g.requires_grad for g in inner)
    loss = sum(y.square().sum() for y in out) + sum(g.cos().sum() for g in inner)
    found = [*out, *inner, *torch.autograd.grad(loss, inputs)]
    return [u.detach().double() for u in found]


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).norm() / exact.norm().clamp_min(1e-300))


@pytest.mark.parametrize("name", CASES)
def test_every_order_is_plain_pytorch_in_float64(name):
    for ours, plain in zip(
        numbers(name, "triton", torch.float64), numbers(name, "reference", torch.float64)
    ):
        assert error(ours, plain) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("name", SMALL)
def test_rounding_is_at_most_half_as_much_again_as_plain_pytorchs(name, dtype):
    exact = numbers(name, "reference", torch.float64)
    for index, (ours, plain) in enumerate(
        zip(numbers(name, "triton", dtype), numbers(name, "reference", dtype))
    ):
        allowed = 1.5 * error(plain, exact[index]) + torch.finfo(dtype).eps / 8
        assert error(ours, exact[index]) <= allowed, index


def test_results_are_the_same_every_time():
    first, second = (numbers("add_rms_norm, modulated", "triton", torch.float32) for _ in "12")
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "swiglu", "swiglu_halves"])
def test_a_third_derivative_raises(name):
    function, shapes, num_inner = CASES[name]
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    out = function("triton", *inputs)
    out = out[1] if isinstance(out, tuple) else out
    inner = torch.autograd.grad(out.sin().sum(), inputs[:num_inner], create_graph=True)
    with pytest.raises(RuntimeError, match="third derivative"):
        torch.autograd.grad(sum(g.sin().sum() for g in inner), inputs, create_graph=True)


def test_what_no_backward_asks_for_is_not_computed(monkeypatch):
    """A refinement step's inner gradient is the state's alone: no sums over rows for the weight."""
    asked = []
    right = fused_norm.gradient
    monkeypatch.setattr(
        fused_norm,
        "gradient",
        lambda *x, with_weight, **o: (
            asked.append(with_weight) or right(*x, with_weight=with_weight, **o)
        ),
    )
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    w = torch.ones(8, dtype=torch.float64, requires_grad=True)
    out = rms_norm(x, w, EPSILON, backend="triton").sin().sum()
    torch.autograd.grad(out, x, create_graph=True)
    assert asked == [False]
    out.backward()
    assert asked == [False, True] and w.grad is not None


@pytest.mark.parametrize("mode", ["vmap of grad", "jvp of grad", "is_grads_batched"])
@pytest.mark.parametrize("name", ["rms_norm", "swiglu_halves"])
def test_transforms_and_forward_mode_give_the_numbers_of_plain_pytorch(name, mode):
    function, shapes, _ = CASES[name]
    generator = torch.Generator().manual_seed(1)
    x, *rest = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes)
    results = []
    for backend in ("triton", "reference"):

        def slope(x, backend=backend):
            return torch.func.grad(lambda x: function(backend, x, *rest).sin().sum())(x)

        if mode == "vmap of grad":
            results.append(torch.func.vmap(slope)(x))
        elif mode == "jvp of grad":
            results.append(torch.func.jvp(slope, (x,), (x.cos(),))[1])
        else:
            leaf = x.clone().requires_grad_()
            out = function(backend, leaf, *rest)
            cotangents = torch.stack([out.detach().cos(), out.detach()])
            results += torch.autograd.grad(out, leaf, cotangents, is_grads_batched=True)
    half = len(results) // 2
    torch.testing.assert_close(results[:half], results[half:], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("counts", [(3, 2, 2), (0, 2, 2), (2, 1, 0), (3, 0, 0)], ids=str)
@pytest.mark.parametrize("d", [2, 24])
def test_heads_are_split_and_joined_as_in_plain_pytorch(counts, d):
    counts = HeadCounts(*counts)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(2, 5, sum(counts) * d, generator=generator, dtype=torch.float64)
    rows.requires_grad_()
    angles = torch.randn(5, d // 2, generator=generator, dtype=torch.float64)
    factors = torch.stack([angles.cos(), angles.sin()], -1)
    ours = split_rotated(rows, factors, counts)
    plain = split_reference(rows, factors, counts)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-14)
    cotangents = [
        torch.randn(u.shape, generator=generator, dtype=torch.float64).requires_grad_()
        for u in plain
    ]
    (joined,) = torch.autograd.grad(ours, rows, cotangents, create_graph=True)
    torch.testing.assert_close(joined, join_reference(*cotangents, factors), rtol=1e-12, atol=1e-14)
    again = torch.autograd.grad(joined, cotangents, rows.detach())
    torch.testing.assert_close(again, plain, rtol=1e-12, atol=1e-14)


V, WIDTH = 23, 6
# of vocabulary_descend: what moves, and its bounds
DESCENTS = {
    "mirror, state kept": ("x", {"keep_state": True}),
    "uniform start": ("uniform p", {"keep_state": True}),
    "loss of logits": ("", {}),
    "through the softmax": ("p, x", {"keep_state": True}),
    "through the softmax, from zeros": ("uniform p, zero x", {}),
    "clamped change": ("x", {"clamps": Clamps(change=0.8)}),
    "clamped state": ("p", {"clamps": Clamps(state=1.1), "keep_state": True}),
    "softly clamped": ("x", {"clamps": Clamps(soft=4.0), "keep_state": True}),
    "z-loss": ("x", {"z_weight": 0.1}),
    "all of it": ("p, x", {"clamps": Clamps(0.2, 5.0, 3.0), "z_weight": 0.1, "keep_state": True}),
    "all of it, without targets": ("p, x", {"clamps": Clamps(0.2, 5.0, 3.0), "keep_state": True}),
}
STEPS = ["embed", *DESCENTS, "step", "step without targets", "step, in given memory"]


def step_numbers(operation: str, backend: str, dtype: torch.dtype) -> list[Tensor]:
    """Everything a vocabulary operation returns, and its gradients."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)
    x = (3 * draw(11, V)).float() if dtype != torch.float64 else 3 * draw(11, V)
    weight = draw(V, WIDTH).half().to(dtype).requires_grad_()
    hidden = draw(11, WIDTH).half().to(dtype).requires_grad_()
    targets = torch.randint(V, (11,), generator=generator)
    targets[3] = IGNORE
    p = x.softmax(-1)
    given = None if "without targets" in operation else targets
    of = [weight, hidden]
    if operation == "embed":
        out = vocabulary_embed(x, weight, backend=backend)
        loss = out[1].sin().sum()
        of = [weight]
    elif operation in DESCENTS:
        moves, options = DESCENTS[operation]
        start = {
            "p": p,
            "uniform p": x.new_tensor(1 / V).expand(11, V),
            "x": x,
            "zero x": x.new_tensor(0.0).expand(11, V),
        }
        names = {"p": "probabilities", "x": "x"}
        moving = {names[name[-1]]: start[name] for name in moves.split(", ") if name}
        z_sum = x.new_zeros(())
        memory = torch.empty_like(x) if moves == "x" else None
        state, loss = vocabulary_descend(
            weight, hidden, given, **moving, **options, out=memory, z_sum=z_sum, backend=backend
        )
        out = [state, loss]
        if "z_weight" in options:
            out.append(z_sum)
        loss = None if loss is None else 3 * loss
    else:
        memory = torch.empty_like(p) if operation == "step, in given memory" else None
        out = vocabulary_step(p, weight, hidden, given, out=memory, backend=backend)
        loss = out[1].sin().sum() + (0 if given is None else out[2])
        of = [weight] if given is None else of
    found = [u for u in out if u is not None]
    if loss is not None:
        found += torch.autograd.grad(loss, of)
    return [u.detach().double() for u in found]


@pytest.mark.parametrize("operation", STEPS)
def test_the_vocabularys_passes_are_plain_pytorch(operation):
    exact = step_numbers(operation, "reference", torch.float64)
    for ours, plain in zip(step_numbers(operation, "triton", torch.float64), exact, strict=True):
        assert error(ours, plain) < 1e-10
    for dtype in (torch.float32, torch.float16):
        ours = step_numbers(operation, "triton", dtype)
        plain = step_numbers(operation, "reference", dtype)
        for index, true in enumerate(exact):
            # of a tensor, whose numbers' roundings average out, and of one number
            rounding = torch.finfo(dtype).eps * (1 / 8 if true.dim() else 4)
            allowed = 1.5 * error(plain[index], true) + rounding
            assert error(ours[index], true) <= allowed, (dtype, index)


def cross_entropy_numbers(backend: str, dtype: torch.dtype) -> list[Tensor]:
    """Loss, z-loss and gradients of a model that predicts logits directly."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)
    weight = draw(V, WIDTH).half().to(dtype).requires_grad_()
    hidden = draw(11, WIDTH).half().to(dtype).requires_grad_()
    targets = torch.randint(V, (11,), generator=generator)
    targets[3] = IGNORE
    z_sum = torch.zeros((), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    loss = vocabulary_cross_entropy(
        hidden,
        weight,
        targets,
        clamps=Clamps(soft=4.0),
        z_weight=0.1,
        z_sum=z_sum,
        backend=backend,
    )
    found = [loss, z_sum, *torch.autograd.grad(3 * loss, [weight, hidden])]
    return [u.detach().double() for u in found]


def test_the_loss_of_transformer_plus_plus_is_plain_pytorchs(monkeypatch):
    """In chunks of four rows."""
    monkeypatch.setattr(softmax_cross_entropy, "CHUNK_BYTES", 4 * V * 4)
    exact = cross_entropy_numbers("reference", torch.float64)
    for ours, plain in zip(cross_entropy_numbers("triton", torch.float64), exact, strict=True):
        assert error(ours, plain) < 1e-10
    for dtype in (torch.float32, torch.float16):
        ours = cross_entropy_numbers("triton", dtype)
        plain = cross_entropy_numbers("reference", dtype)
        for index, true in enumerate(exact):
            rounding = torch.finfo(dtype).eps * (1 / 8 if true.dim() else 4)
            assert error(ours[index], true) <= 1.5 * error(plain[index], true) + rounding, index


def test_a_step_of_nan_is_nan_within_clamps_too():
    weight = torch.full((V, WIDTH), torch.nan)
    hidden = torch.ones(3, WIDTH)
    targets = torch.zeros(3, dtype=torch.int64)
    for clamps in (Clamps(change=1.0), Clamps(state=1.0), Clamps(soft=1.0)):
        state, loss = vocabulary_descend(
            weight, hidden, targets, clamps=clamps, keep_state=True, backend="triton"
        )
        assert state is not None and loss is not None
        assert bool(state.isnan().all()) and bool(loss.isnan())


def test_a_row_wider_than_a_tile_is_one_row():
    generator = torch.Generator().manual_seed(3)
    move = torch.randn(2, 9000, generator=generator, dtype=torch.float64)
    target = torch.tensor([8999, 5])
    rows = fused_vocabulary.softmax_rows(
        move, None, dtype=move.dtype, target=target, share=torch.ones(2).double(), keep_p=True
    )
    torch.testing.assert_close(rows.p, move.softmax(-1))
    torch.testing.assert_close(
        rows.loss, torch.nn.functional.cross_entropy(move, target, reduction="sum")
    )


def test_a_backend_that_cannot_run_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="NVIDIA GPU"):
        rms_norm(x, x[0], EPSILON, backend="triton")
    with pytest.raises(ValueError, match="allowed: auto, triton, reference"):
        swiglu_halves(x, backend="fused")
    with pytest.raises(ValueError, match="up to 16384"):
        fused_launches.resolve_fused("triton", x.device, x.dtype, "rms_norm", 20000)


# ------------------------------------------------------------------------------ broken on purpose


def wrong(function, factor=1.001):
    """The same, its first result a thousandth too large."""

    def scaled(*x, **o):
        found = function(*x, **o)
        if isinstance(found, tuple):
            return (
                type(found)(*scaled_first(found))
                if hasattr(found, "_fields")
                else scaled_first(found)
            )
        return found * factor

    def scaled_first(found):
        first, *rest = found
        return (first * factor, *rest)

    return scaled


@pytest.mark.parametrize("part", ["forward", "gradient", "second"])
def test_the_comparison_notices_a_wrong_norm(part, monkeypatch):
    monkeypatch.setattr(fused_norm, part, wrong(getattr(fused_norm, part)))
    with pytest.raises(AssertionError):
        test_every_order_is_plain_pytorch_in_float64("rms_norm")


@pytest.mark.parametrize("part", ["forward", "second", "gradient"])
def test_the_comparison_notices_a_wrong_swiglu(part, monkeypatch):
    right = getattr(fused_swiglu, part)
    if part == "gradient":
        # it writes where it is told

        def gradient(grad, *rest):
            right(grad * 1.001, *rest)

        monkeypatch.setattr(fused_swiglu, part, gradient)
    else:
        monkeypatch.setattr(fused_swiglu, part, wrong(right))
    with pytest.raises(AssertionError):
        test_every_order_is_plain_pytorch_in_float64("swiglu")


def test_the_comparison_notices_a_rotation_the_other_way(monkeypatch):
    right = rotation._turn
    monkeypatch.setattr(
        rotation,
        "_turn",
        lambda q, k, v, rows, factors, join: right(
            q, k, v, rows, factors * torch.tensor([1, -1]), join=join
        ),
    )
    with pytest.raises(AssertionError):
        test_heads_are_split_and_joined_as_in_plain_pytorch((3, 2, 2), 24)


@pytest.mark.parametrize("operation", ["loss of logits", "all of it"])
def test_the_comparison_notices_a_wrong_residual_of_the_vocabulary(operation, monkeypatch):
    right = fused_vocabulary.softmax_rows

    def shifted(*x, **o):
        rows = right(*x, **o)
        return rows if rows.residual is None else rows._replace(residual=rows.residual * 1.001)

    monkeypatch.setattr(fused_vocabulary, "softmax_rows", shifted)
    with pytest.raises(AssertionError):
        test_the_vocabularys_passes_are_plain_pytorch(operation)


@pytest.mark.parametrize("forgotten", ["through", "change", "z_weight"])
def test_the_comparison_notices_a_step_that_forgets(forgotten, monkeypatch):
    right = fused_vocabulary.softmax_rows

    def without(*x, form, through, **o):
        if forgotten == "through":
            through = None
        else:
            form = form._replace(**{forgotten: 0.0})
        return right(*x, form=form, through=through, **o)

    monkeypatch.setattr(fused_vocabulary, "softmax_rows", without)
    with pytest.raises(AssertionError):
        test_the_vocabularys_passes_are_plain_pytorch("all of it")
