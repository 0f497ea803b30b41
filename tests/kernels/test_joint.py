"""The ordinary backward and the second half of the double backward in one pass: the same numbers
as plain autograd, whatever is asked for, and in whatever order autograd meets it.

In Triton's interpreter, float64. What the pass computes over masks: test_triton_masks.py.
"""

from __future__ import annotations

import pytest
import torch
from test_attention import INTERPRETED
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import ebwm_kernels.attention.flops  # noqa: F401  registers them
from ebwm_kernels import energy_attention
from ebwm_kernels.attention import joint, ops
from ebwm_kernels.attention.energy import energy_attention_definition

pytestmark = INTERPRETED
NAMES = ("q", "k*", "v*", "K", "V", "W")
ALL = tuple(range(len(NAMES)))
UP, DOWN = "attention_double_backward_up", "attention_double_backward_down"
WHOLE, ORDINARY = "attention_double_backward", "attention_gradient"


def inputs(seed: int = 0, *, d_v: int = 8) -> list[Tensor]:
    """q, k*, v*, K, V and what reads the output, W: shared heads, an offset."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return (drawn / 2).requires_grad_()

    own = [draw(1, 2, 5, 8), draw(1, 2, 5, 8), draw(1, 2, 5, d_v)]
    return [*own, draw(1, 1, 8, 8), draw(1, 1, 8, d_v), draw(d_v, d_v)]


def ours(*tensors: Tensor, **options) -> Tensor:
    return energy_attention(*tensors, context_offset=3, backend="triton", **options)


def plain(*tensors: Tensor, **options) -> Tensor:
    return energy_attention_definition(*tensors, context_offset=3, **options)


def two_layers(attend, q, k_self, v_self, K, V, W) -> Tensor:
    """A loss behind an inner gradient through attention twice, and on the output itself."""
    out = attend(q * 1.5, k_self, v_self, K, V)
    out = attend(out @ W, k_self, v_self, K, V) + out
    energy = (out @ W).tanh().sum()
    inner = torch.autograd.grad(energy, (q, k_self, v_self), create_graph=True)
    moved = [u - 0.3 * g for u, g in zip((q, k_self, v_self), inner)]
    return sum(u.square().sum() for u in moved) + out.sin().sum()


def linear_energy(attend, q, k_self, v_self, K, V, W) -> Tensor:
    """The energy's cotangent on the output is a constant, and the loss is of the gradient alone:
    nothing but the order of the nodes brings the ordinary backward.
    """
    out = attend(q, k_self, v_self, K, V)
    (inner,) = torch.autograd.grad((out @ W).sum(), q, create_graph=True)
    return inner.square().sum()


def twice_differentiated(attend, q, k_self, v_self, K, V, W) -> Tensor:
    """Two inner gradients of one output: two double backwards wait at one node."""
    out = attend(q, k_self, v_self, K, V)
    first = torch.autograd.grad((out @ W).tanh().sum(), (q, v_self), create_graph=True)
    second = torch.autograd.grad(out.sin().sum(), (q, k_self), create_graph=True)
    return sum(g.square().sum() for g in (*first, *second)) + out.cos().sum()


def with_context(attend, q, k_self, v_self, K, V, W) -> Tensor:
    """The context is differentiated too: dK and dV have cotangents."""
    out = attend(q, k_self, v_self, K, V)
    inner = torch.autograd.grad((out @ W).tanh().sum(), (q, K, V), create_graph=True)
    return sum(g.square().sum() for g in inner) + out.cos().sum()


def checkpointed(attend, q, k_self, v_self, K, V, W) -> Tensor:
    """What a step keeps is computed again: `refinement.recompute: step`."""
    return checkpoint(two_layers, attend, q, k_self, v_self, K, V, W, use_reentrant=False)


LOSSES = [two_layers, linear_energy, twice_differentiated, with_context, checkpointed]


class Operations(TorchDispatchMode):
    """The names of the operations of attention that run."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name.startswith("ebwm::"):
            self.names.append(name.removeprefix("ebwm::"))
        return function(*args, **(kwargs or {}))


def gradients(loss, attend, tensors: list[Tensor], chosen: tuple[int, ...] = ALL):
    wanted = [tensors[i] for i in chosen]
    return torch.autograd.grad(loss(attend, *tensors), wanted, allow_unused=True)


def assert_same(mine, right) -> None:
    for name, x, y in zip(NAMES, mine, right, strict=True):
        if y is None or x is None:
            assert x is y is None, name
            continue
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_all_gradients_are_those_of_plain_autograd(loss):
    assert_same(gradients(loss, ours, inputs()), gradients(loss, plain, inputs()))


@pytest.mark.parametrize("options", [{"window": 3}, {"first_visible": True}], ids=str)
def test_so_they_are_with_windows_and_documents(options):
    if "first_visible" in options:
        starts = torch.tensor([[0] * 2 + [5] * 2 + [7]])
        options = {"first_visible": starts.int()}
    results = [
        gradients(two_layers, lambda *x, f=f: f(*x, **options), inputs()) for f in (ours, plain)
    ]
    assert_same(*results)


def test_values_may_have_another_dimension():
    def loss(attend, q, k_self, v_self, K, V, W):
        out = attend(q, k_self, v_self, K, V)
        inner = torch.autograd.grad((out @ W).tanh().sum(), (q, v_self), create_graph=True)
        return sum(g.square().sum() for g in inner) + out.cos().sum()

    results = [gradients(loss, f, inputs(d_v=12)) for f in (ours, plain)]
    assert_same(*results)


@pytest.mark.parametrize("place", ALL, ids=NAMES)
def test_each_gradient_may_be_asked_for_alone(place):
    mine, right = (gradients(two_layers, attend, inputs(), (place,)) for attend in (ours, plain))
    torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-11)


def operations_of(loss, chosen: tuple[int, ...] = ALL) -> list[str]:
    tensors = inputs()
    value = loss(ours, *tensors)
    with Operations() as seen:
        torch.autograd.grad(value, [tensors[i] for i in chosen], allow_unused=True)
    return seen.names


def test_each_layer_takes_one_pass_up_and_one_down():
    """The ordinary backward has none of its own."""
    assert operations_of(two_layers) == [UP, UP, DOWN, DOWN]


def test_what_cannot_wait_is_computed_whole():
    """Cotangents on dK and dV; and W alone, whose gradient does not pass the layers' inputs."""
    assert operations_of(with_context) == [WHOLE, ORDINARY]
    assert operations_of(linear_energy, chosen=(5,)) == [WHOLE]


def test_the_context_costs_nothing_where_its_gradients_are_not_asked_for(monkeypatch):
    from ebwm_kernels.attention import launches

    launched = []
    right = launches.Call._run

    def noted(self, kernel, *rest):
        launched.append(kernel.__name__)
        right(self, kernel, *rest)

    monkeypatch.setattr(launches.Call, "_run", noted)
    gradients(two_layers, ours, inputs(), chosen=(0, 1, 2))
    assert "_second_query" in launched and "_second_key" not in launched


def test_it_is_counted_as_21_products():
    """A layer's forward, inner gradient, and all that the loss sends back: 2 + 3 + 3 + 5 + 8."""
    q, k_self, v_self, K, V, _ = inputs()
    with FlopCounterMode(display=False) as counter:
        out = energy_attention(q, k_self, v_self, K, V, context_offset=3, backend="triton")
        inner = torch.autograd.grad(out.sin().sum(), (q, k_self, v_self), create_graph=True)
        loss = sum(g.square().sum() for g in inner) + out.cos().sum()
        torch.autograd.grad(loss, (q, k_self, v_self, K, V))
    heads, d = 2, 8
    pairs = sum(t + 4 for t in range(5))
    assert counter.get_total_flops() == 21 * 2 * heads * pairs * d


def test_the_gradient_s_node_has_an_edge_to_that_of_the_ordinary_backward():
    """So autograd runs it first, whatever threads and devices it has: in one thread the order of
    creation alone would do.
    """
    *tensors, _ = inputs()
    out = ours(*tensors)
    (inner,) = torch.autograd.grad(out.sum(), tensors[0], create_graph=True)
    assert out.grad_fn in [node for node, _ in inner.grad_fn.next_functions]


def test_a_graph_that_is_kept_gives_the_same_twice():
    tensors = inputs()
    loss = two_layers(ours, *tensors)
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    second = torch.autograd.grad(loss, tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_a_run_that_failed_between_the_halves_leaves_nothing_behind():
    """The first half has run, and what it left waits at the node: the next run must not take it."""
    *tensors, _ = inputs()
    out = ours(*tensors)
    loss = penalty(out, tensors[0])
    fails = out.register_hook(fail)
    with pytest.raises(ArithmeticError):
        torch.autograd.grad(loss, tensors, retain_graph=True)
    assert out.grad_fn.waiting
    fails.remove()
    mine = torch.autograd.grad(loss, tensors)
    assert not out.grad_fn.waiting
    right = torch.autograd.grad(penalty(plain(*tensors), tensors[0]), tensors)
    for x, y in zip(mine, right):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)


def penalty(out: Tensor, q: Tensor) -> Tensor:
    (inner,) = torch.autograd.grad(out.tanh().sum(), q, create_graph=True)
    return inner.square().sum() + out.cos().sum()


def fail(gradient: Tensor) -> None:
    raise ArithmeticError("on purpose")


@pytest.mark.parametrize("lost", ["ordinary", "second half"])
def test_the_comparison_notices_what_is_lost(lost, monkeypatch):
    if lost == "ordinary":
        right = joint.joined_backward
        monkeypatch.setattr(
            ops,
            "joined_backward",
            lambda waiting, g_out, *rest, **options: right(waiting, None, *rest, **options),
        )
    else:
        monkeypatch.setattr(ops, "take_waiting", lambda node: [])
    with pytest.raises(AssertionError):
        assert_same(gradients(two_layers, ours, inputs()), gradients(two_layers, plain, inputs()))
