"""torch.compile of a refinement step gives eager float64's gradients, or raises: never a wrong
number silently.
"""

import pytest
import torch

from ebwm_kernels import causal_attention, energy_attention, rms_norm, swiglu

B, H, H_KV, S, D = 2, 4, 2, 6, 32


def parameters():
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "wq": (D, D),
        "wk": (D, D // 2),
        "wv": (D, D // 2),
        "wo": (D, D),
        "w1": (D, 2 * D),
        "w2": (2 * D, D),
        "w3": (D, 2 * D),
        "norm": (D,),
        "e": (D, 1),
    }
    return {
        name: (
            torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[0] ** 0.5
        ).requires_grad_()
        for name, shape in shapes.items()
    }


def heads(x, count):
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def energy(p, observed, w, *, attention_only: bool):
    """Energies of a one-block model; the whole block, or attention between linear maps."""
    n = p if attention_only else rms_norm(p, w["norm"], 1e-5)
    q, k, v = heads(n @ w["wq"], H), heads(n @ w["wk"], H_KV), heads(n @ w["wv"], H_KV)
    k, v = (u.repeat_interleave(H // H_KV, 1) for u in (k, v))
    keys, values = heads(observed @ w["wk"], H_KV), heads(observed @ w["wv"], H_KV)
    p = p + energy_attention(q, k, v, keys, values).transpose(1, 2).flatten(2) @ w["wo"]
    if not attention_only:
        p = p + swiglu(p @ w["w1"], p @ w["w3"]) @ w["w2"]
    return (p.sin() @ w["e"]).sum()


def refinement_step(delta, start, observed, w, attention_only=True):
    """One step of refinement and a loss of where it ends; delta is a leaf of zeros, which compile
    needs in place of requires_grad_().
    """
    p = start + delta
    (gradient,) = torch.autograd.grad(
        energy(p, observed, w, attention_only=attention_only), delta, create_graph=True
    )
    return (p - 0.5 * gradient).square().sum()


def gradients(step, **options):
    w = parameters()
    generator = torch.Generator().manual_seed(4)
    start, observed = (
        torch.randn(B, S, D, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    delta = torch.zeros_like(start, requires_grad=True)
    loss = step(delta, start, observed, w, **options)
    return loss, torch.autograd.grad(loss, list(w.values()), allow_unused=True)


def compare(eager, compiled):
    torch.testing.assert_close(compiled[0], eager[0], rtol=1e-10, atol=1e-12)
    for mine, theirs in zip(compiled[1], eager[1]):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


WHOLE = pytest.mark.parametrize("attention_only", [True, False], ids=["attention", "block"])


@WHOLE
def test_a_step_compiled_as_one_graph_gives_the_gradients_of_eager(attention_only):
    """The inner autograd.grad inside the graph."""
    eager = gradients(refinement_step, attention_only=attention_only)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = gradients(
            torch.compile(refinement_step, backend="aot_eager", fullgraph=True),
            attention_only=attention_only,
        )
    compare(eager, compiled)


@WHOLE
def test_a_step_compiled_with_graph_breaks_raises_where_pytorch_would_lose_gradients(
    attention_only,
):
    """What a user may try first.

    autograd.grad breaks the graph, and the energy is compiled for one differentiation.
    """
    with pytest.raises(
        RuntimeError, match="torch.compile made this backward for one differentiation"
    ):
        gradients(
            torch.compile(refinement_step, backend="aot_eager"), attention_only=attention_only
        )


def test_a_compiled_energy_whose_gradient_is_taken_outside_raises():
    compiled_energy = torch.compile(
        lambda p, o, w: energy(p, o, w, attention_only=True), backend="aot_eager"
    )

    def step(delta, start, observed, w):
        p = start + delta
        (gradient,) = torch.autograd.grad(compiled_energy(p, observed, w), delta, create_graph=True)
        return (p - 0.5 * gradient).square().sum()

    with pytest.raises(
        RuntimeError, match="torch.compile made this backward for one differentiation"
    ):
        gradients(step)


def test_pytorch_alone_does_not_give_the_gradients_there():
    """Why we raise.

    torch 2.13 loses the gradient without a word, 2.11 raises. If this fails, PyTorch has learnt to:
    refuse_kept_graph can go.
    """
    square = torch.compile(lambda x, w: (x @ w).square().sum(), backend="aot_eager")
    x, w = (torch.randn(3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    (gradient,) = torch.autograd.grad(square(x, w), x, create_graph=True)
    try:
        (lost,) = torch.autograd.grad((x.detach() - gradient).square().sum(), w, allow_unused=True)
    except RuntimeError:
        return
    assert lost is None


def test_first_order_training_of_compiled_attention_works():
    def loss(q, k, v):
        return causal_attention(q, k, v).sin().sum()

    def results(function):
        generator = torch.Generator().manual_seed(5)
        inputs = [
            torch.randn(1, 2, 5, 16, generator=generator, dtype=torch.float64).requires_grad_()
            for _ in range(3)
        ]
        function(*inputs).backward()
        return function(*inputs), [u.grad for u in inputs]

    compare(results(loss), results(torch.compile(loss, backend="aot_eager", fullgraph=True)))


def test_compiled_causal_attention_gives_first_and_second_order():
    def penalty(q, k, v):
        out = causal_attention(q, k, v)
        gradient = torch.autograd.grad(out.sin().sum(), (q, k, v), create_graph=True)
        return sum(g.square().sum() for g in gradient) + out.sum()

    def results(function):
        generator = torch.Generator().manual_seed(5)
        inputs = [
            torch.randn(1, 2, 5, 16, generator=generator, dtype=torch.float64).requires_grad_()
            for _ in range(3)
        ]
        return function(*inputs), torch.autograd.grad(function(*inputs), inputs)

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compare(
            results(penalty), results(torch.compile(penalty, backend="aot_eager", fullgraph=True))
        )


def along(function, inputs):
    """Tangent, gradient and Hessian times a direction, by torch.func."""
    directions = tuple(u.cos() for u in inputs)

    def loss(*tensors):
        return function(*tensors).sin().sum()

    _, tangent = torch.func.jvp(function, inputs, directions)
    gradient, product = torch.func.jvp(torch.func.grad(loss), inputs, directions)
    return tangent, gradient, product


def three_tensors():
    generator = torch.Generator().manual_seed(5)
    shapes = [(1, 4, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8)]
    return tuple(torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes)


def test_transforms_inside_a_compiled_function_give_the_numbers_of_eager():
    inputs = three_tensors()

    def run(*tensors):
        return along(causal_attention, tensors)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), run(*inputs), rtol=1e-10, atol=1e-12)


def test_a_compiled_function_under_transforms_gives_the_numbers_of_eager():
    """First compiled without them: what surrounds a call is part of what it was compiled for."""
    inputs = three_tensors()
    compiled = torch.compile(causal_attention, backend="aot_eager")
    compiled(*inputs)
    torch.testing.assert_close(
        along(compiled, inputs), along(causal_attention, inputs), rtol=1e-10, atol=1e-12
    )
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(u, u.cos()) for u in inputs]
        moved = torch.autograd.forward_ad.unpack_dual(compiled(*duals)).tangent
        right = torch.autograd.forward_ad.unpack_dual(causal_attention(*duals)).tangent
        torch.testing.assert_close(moved, right, rtol=1e-10, atol=1e-12)
