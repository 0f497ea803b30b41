"""torch.func's transforms and forward mode: right numbers in float64, or one sentence that says
what to use. Never a zero in place of a tangent.
"""

import pytest
import torch
from torch import func
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode
from transform_cases import (
    ATTENTION,
    CASES,
    D_V,
    DOCUMENTS,
    EVERY,
    KEY,
    QUERY,
    VALUE,
    B,
    D,
    S,
    draw,
    summed,
    vocabulary_calls,
)

import ebwm_kernels.attention.flops  # noqa: F401  registers them
from ebwm_kernels import causal_attention, observed_attention
from ebwm_kernels.attention import reference, transforms
from ebwm_kernels.attention.causal import causal_attention_definition
from ebwm_kernels.attention.ops import why_not_triton


def in_all(num_arguments):
    """argnums of torch.func: every argument."""
    return tuple(range(num_arguments))


# Each takes a function and its inputs, and gives numbers that are compared.


def tangent(function, inputs):
    return func.jvp(function, inputs, directions(inputs))


def dual_tensors(function, inputs):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(inputs, directions(inputs))]
        return tuple(forward_ad.unpack_dual(function(*duals)))


def gradient(function, inputs):
    return func.grad(summed(function), argnums=in_all(len(inputs)))(*inputs)


def pulled_back(function, inputs):
    out, pull_back = func.vjp(function, *inputs)
    return pull_back(out.sin())


def forward_over_reverse(function, inputs):
    of_all = func.grad(summed(function), argnums=in_all(len(inputs)))
    return func.jvp(of_all, inputs, directions(inputs))


def reverse_over_forward(function, inputs):
    def along(*tensors):
        return func.jvp(summed(function), tensors, directions(inputs))[1]

    return func.grad(along, argnums=in_all(len(inputs)))(*inputs)


def reverse_over_reverse(function, inputs):
    def along(*tensors):
        gradients = func.grad(summed(function), argnums=in_all(len(inputs)))(*tensors)
        return sum((g * d).sum() for g, d in zip(gradients, directions(inputs)))

    return func.grad(along, argnums=in_all(len(inputs)))(*inputs)


def autograd_over_tangent(function, inputs):
    leaves = [u.clone().requires_grad_() for u in inputs]
    moved = func.jvp(function, tuple(leaves), directions(inputs))[1]
    return torch.autograd.grad(moved.sin().sum(), leaves)


def dual_over_reverse(function, inputs):
    with forward_ad.dual_level():
        duals = []
        for u, direction in zip(inputs, directions(inputs)):
            duals.append(forward_ad.make_dual(u.clone().requires_grad_(), direction))
        gradients = torch.autograd.grad(summed(function)(*duals), duals, create_graph=True)
        return [forward_ad.unpack_dual(g).tangent for g in gradients]


def dual_cotangent(function, inputs):
    """The graph is there before the dual level is."""
    leaves = [u.clone().requires_grad_() for u in inputs]
    out = function(*leaves)
    with forward_ad.dual_level():
        cotangent = forward_ad.make_dual(torch.ones_like(out), out.detach().sin())
        (of_first,) = torch.autograd.grad(out, leaves[:1], cotangent, create_graph=True)
        return forward_ad.unpack_dual(of_first).tangent


def batched_cotangents(function, inputs):
    leaves = [u.clone().requires_grad_() for u in inputs]
    out = function(*leaves)
    cotangents = draw([(3, *out.shape)], seed=5)
    return torch.autograd.grad(out, leaves, cotangents, is_grads_batched=True)


def batched_cotangents_of_a_gradient(function, inputs):
    leaves = [u.clone().requires_grad_() for u in inputs]
    (first,) = torch.autograd.grad(summed(function)(*leaves), leaves[:1], create_graph=True)
    cotangents = draw([(3, *first.shape)], seed=5)
    return torch.autograd.grad(first, leaves, cotangents, is_grads_batched=True)


def mapped(function, inputs):
    """The first input in three versions along its second dimension, the others shared."""
    versions = torch.stack([inputs[0], 2 * inputs[0], -inputs[0]], 1)
    dims = (1, *(None for _ in inputs[1:]))
    return func.vmap(function, in_dims=dims)(versions, *inputs[1:])


def jacobian(function, inputs):
    return func.jacrev(function)(*inputs), func.jacfwd(function)(*inputs)


def old_interface(function, inputs):
    return (
        torch.autograd.functional.vhp(summed(function), inputs, directions(inputs)),
        torch.autograd.functional.jvp(function, inputs, directions(inputs)),
        torch.autograd.functional.jacobian(
            function, inputs, vectorize=True, strategy="forward-mode"
        ),
    )


def directions(inputs):
    return draw([u.shape for u in inputs], seed=9)


WAYS = (
    tangent,
    dual_tensors,
    gradient,
    pulled_back,
    forward_over_reverse,
    reverse_over_forward,
    reverse_over_reverse,
    autograd_over_tangent,
    dual_over_reverse,
    dual_cotangent,
    batched_cotangents,
    batched_cotangents_of_a_gradient,
    mapped,
    jacobian,
    old_interface,
)


def check(name, way):
    shapes, operation, definition = CASES[name]
    inputs = draw(shapes)
    torch.testing.assert_close(
        way(operation, inputs), way(definition, inputs), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@EVERY
def test_each_way_to_differentiate_gives_the_numbers_of_the_definition(name, way):
    check(name, way)


INTERPRETED = why_not_triton(torch.device("cpu"), torch.float64, D) is None


@pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is not there")
@pytest.mark.parametrize("way", [tangent, forward_over_reverse], ids=lambda way: way.__name__)
def test_the_triton_kernels_give_the_numbers_of_the_definition(way):
    shapes, operation, definition = CASES["energy in groups, two documents"]
    inputs = tuple(u[:, :2] for u in draw(shapes[:3])) + tuple(u[:, :1] for u in draw(shapes[3:]))

    def on_triton(*tensors):
        return operation(*tensors, backend="triton")

    torch.testing.assert_close(
        way(on_triton, inputs), way(definition, inputs), rtol=1e-10, atol=1e-12
    )


@EVERY
def test_a_tangent_is_the_difference_quotient_in_float64(name):
    shapes, operation, _ = CASES[name]
    inputs = draw(shapes)
    step = 1e-5
    ahead = operation(*(u + step * d for u, d in zip(inputs, directions(inputs))))
    behind = operation(*(u - step * d for u, d in zip(inputs, directions(inputs))))
    _, moved = tangent(operation, inputs)
    torch.testing.assert_close(moved, (ahead - behind) / (2 * step), rtol=1e-7, atol=1e-8)


@EVERY
def test_the_whole_hessian_is_that_of_plain_pytorch(name):
    shapes, operation, definition = CASES[name]
    inputs = draw(shapes)
    everything = in_all(len(inputs))
    ours, plain = (
        func.hessian(summed(f), argnums=everything)(*inputs) for f in (operation, definition)
    )
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["energy", "causal"])
def test_per_sample_gradients_and_hessian_products_are_those_of_a_loop(name):
    shapes, operation, _ = CASES[name]
    inputs = draw(shapes)

    def sample_loss(*sample):
        return summed(operation)(*(u[None] for u in sample))

    def second_order(*sample):
        return func.jvp(func.grad(sample_loss), sample, tuple(u.cos() for u in sample))

    for function in (func.grad(sample_loss, argnums=in_all(len(inputs))), second_order):
        together = func.vmap(function)(*inputs)
        one_by_one = [function(*(u[i] for u in inputs)) for i in range(B)]
        stacked = tuple(torch.stack(parts) for parts in zip(*one_by_one))
        torch.testing.assert_close(together, stacked, rtol=1e-11, atol=1e-13)


def test_a_mask_per_sample_is_mapped_with_its_sample():
    q, k, v = draw([QUERY, KEY, VALUE])

    def one(q, k, v, first):
        return causal_attention(q[None], k[None], v[None], first_visible=first[None])[0]

    torch.testing.assert_close(
        func.vmap(one)(q, k, v, DOCUMENTS), causal_attention(q, k, v, first_visible=DOCUMENTS)
    )


@pytest.mark.parametrize("name", ATTENTION)
def test_a_third_derivative_and_forward_over_forward_raise_under_transforms(name):
    shapes, operation, _ = CASES[name]
    first, *others = draw(shapes)
    loss = summed(with_first(operation, others))
    once = func.grad(loss)
    twice = func.grad(lambda x: once(x).sin().sum())
    with pytest.raises(RuntimeError, match="third derivative is not defined; differentiate at mos"):
        func.grad(lambda x: twice(x).sin().sum())(first)
    with pytest.raises(RuntimeError, match="third derivative is not defined; differentiate at mos"):
        func.jvp(twice, (first,), (first,))
    with pytest.raises(RuntimeError, match="use forward over reverse"):
        func.jacfwd(func.jacfwd(loss))(first)


def with_first(operation, others):
    return lambda x: operation(x, *others)


@EVERY
def test_functional_hvp_raises_and_names_what_does_it(name):
    shapes, operation, _ = CASES[name]
    first, *others = draw(shapes)
    loss = summed(with_first(operation, others))
    with pytest.raises(RuntimeError, match="use vhp, or torch.func.jvp of torch.func.grad"):
        torch.autograd.functional.hvp(loss, first, first)
    _, product = torch.autograd.functional.vhp(loss, first, first)
    assert product.shape == first.shape


@pytest.mark.parametrize("name", vocabulary_calls(*draw([(3, 4), (6, 4)])))
@pytest.mark.parametrize("product", ["hvp", "vhp"])
def test_products_with_a_hessian_that_is_not_there_name_what_has_one(name, product):
    """vhp is no way out here: these operations are differentiable once."""
    hidden, weight = draw([(3, 4), (6, 4)])
    loss = summed(vocabulary_calls(hidden, weight)[name])
    message = f"{name}: its second derivative is not defined; .*hvp, vhp and hessian need .* use "
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.autograd.functional, product)(loss, weight, weight)


@pytest.mark.parametrize("name", ATTENTION)
def test_every_way_to_a_third_derivative_names_vhp(name):
    """By the engine, and by each transform around a second derivative."""
    shapes, operation, _ = CASES[name]
    first, *others = draw(shapes)
    loss = summed(with_first(operation, others))

    def along(x):
        return func.grad(lambda y: (func.grad(loss)(y) * first).sum())(x)

    for ask in (
        lambda: torch.autograd.functional.hvp(loss, first, first),
        lambda: func.grad(lambda x: along(x).sum())(first),
        lambda: func.vjp(along, first)[1](first),
        lambda: func.jvp(along, (first,), (first,)),
        lambda: func.vmap(func.grad(lambda x: along(x).sum()))(first[None]),
    ):
        with pytest.raises(RuntimeError, match="functional.hvp asks .* use vhp"):
            ask()


@pytest.mark.parametrize("name", vocabulary_calls(*draw([(3, 4), (6, 4)])))
def test_first_order_operations_refuse_transforms_in_one_sentence(name):
    hidden, weight = draw([(3, 4), (6, 4)])
    function = vocabulary_calls(hidden, weight)[name]
    message = f"{name}: torch.func transforms and forward-mode derivatives are not defined; use "
    with pytest.raises(RuntimeError, match=message):
        func.jvp(function, (weight,), (weight,))
    with pytest.raises(RuntimeError, match=message):
        func.grad(lambda w: function(w).sum())(weight)
    leaf = weight.clone().requires_grad_()
    out = function(leaf)
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(out, leaf, torch.ones(2, *out.shape).double(), is_grads_batched=True)


def test_observed_attention_never_drops_a_tangent():
    """PyTorch's kernel refuses forward mode or is right; a zero would be neither."""
    q, k, v = draw([QUERY, (B, 4, S, D), (B, 4, S, D)])
    try:
        _, moved = func.jvp(observed_attention, (q, k, v), directions((q, k, v)))
    except (RuntimeError, NotImplementedError) as error:
        assert "forward" in str(error)
        return
    _, right = func.jvp(causal_attention_definition, (q, k, v), directions((q, k, v)))
    torch.testing.assert_close(moved, right)


# ------------------------------------------------------------------------------- what would be seen


def test_a_wrong_tangent_is_noticed(monkeypatch):
    right = reference.tangent
    monkeypatch.setattr(reference, "tangent", lambda *u: right(*u) * (1 + 1e-6))
    with pytest.raises(AssertionError):
        check("energy", tangent)
    with pytest.raises(AssertionError):
        test_a_tangent_is_the_difference_quotient_in_float64("energy")


@pytest.mark.parametrize("way", [forward_over_reverse, reverse_over_forward, dual_over_reverse])
def test_a_hessian_without_the_directions_of_keys_is_noticed(way, monkeypatch):
    right = reference.double_backward
    monkeypatch.setattr(
        reference,
        "double_backward",
        lambda cotangents, *u: right(cotangents._replace(key=None, value=None), *u),
    )
    with pytest.raises(AssertionError):
        check("causal", way)


def test_a_map_over_the_wrong_dimension_is_noticed(monkeypatch):
    right = transforms._mapped
    wrong = lambda function, info, dims, inputs: right(function, info, (0, *dims[1:]), inputs)
    monkeypatch.setattr(transforms, "_mapped", wrong)
    with pytest.raises((AssertionError, RuntimeError)):
        check("causal", mapped)


def test_a_tangent_dropped_by_the_operator_is_noticed(monkeypatch):
    """Without the way through transforms.py: what this package did before, and others do."""
    from ebwm_kernels.attention import ops

    monkeypatch.setattr(ops, "transforms_active", lambda: False)
    with pytest.raises(AssertionError):
        check("causal", tangent)


# ------------------------------------------------------------------------------------- the operator


def test_the_tangent_is_well_formed_for_dispatch_and_counted():
    q, k, v = draw([QUERY, KEY, VALUE])
    rest = (0.5, 0, True, 1, 1, "reference")
    out, log_normalizer = torch.ops.ebwm.attention(q, k, v, None, None, None, *rest)
    arguments = (q, k, v, None, None, q, k, v, None, None, None, out, log_normalizer, *rest)
    torch.library.opcheck(
        torch.ops.ebwm.attention_tangent.default,
        arguments,
        test_utils=("test_schema", "test_faketensor"),
    )
    counter = FlopCounterMode(display=False)
    with counter:
        torch.ops.ebwm.attention_tangent(*arguments)
    pairs = B * 4 * (1 + 2 + 3 + 4)
    assert counter.get_total_flops() == 2 * pairs * (3 * D + 2 * D_V)
