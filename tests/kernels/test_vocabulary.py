"""The chunked vocabulary step equals the materialised one: value and first-order gradients, every
update, any number of chunks.
"""

import pytest
import torch
from torch.nn import functional as F

from ebwm_kernels.vocabulary import autograd as vocabulary
from ebwm_kernels.vocabulary import softmax_cross_entropy
from ebwm_kernels.vocabulary.api import vocabulary_descend_reference, vocabulary_embed_reference
from ebwm_kernels.vocabulary.autograd import (
    vocabulary_cross_entropy,
    vocabulary_descend,
    vocabulary_embed,
    vocabulary_step,
)
from ebwm_kernels.vocabulary.formulas import NO_CLAMPS, Clamps
from ebwm_kernels.vocabulary.softmax_cross_entropy import IGNORE

ROWS, V, D = 11, 23, 6


@pytest.fixture(params=[1, 4, 1000], ids=lambda rows: f"chunks_of_{rows}_rows")
def chunk_rows(request, monkeypatch):
    monkeypatch.setattr(softmax_cross_entropy, "CHUNK_BYTES", 4 * V * request.param)


def problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)
    x, weight, hidden = (
        3 * draw(ROWS, V),
        draw(V, D).requires_grad_(),
        draw(ROWS, D).requires_grad_(),
    )
    targets = torch.randint(V, (ROWS,), generator=generator)
    targets[3] = IGNORE
    return x, x.softmax(-1), weight, hidden, targets, draw


def moving(x, p, update):
    """What descends, by update."""
    return {
        "probabilities": {"probabilities": p},
        "logits": {"probabilities": p, "x": x},
        "mirror": {"x": x},
    }[update]


def reference_loss(x, weight, hidden, targets, update, clamps=NO_CLAMPS):
    state = vocabulary_descend_reference(
        weight, hidden, **moving(x, x.softmax(-1), update), clamps=clamps
    )
    return F.cross_entropy(state, targets, ignore_index=IGNORE), state.detach()


def z_loss(x, weight, hidden, targets, update, clamps):
    """The mean of logsumexp^2 over the rows that count, in plain autograd."""
    moves = moving(x, x.softmax(-1), update)
    state = vocabulary_descend_reference(weight, hidden, **moves, clamps=clamps)
    return state.logsumexp(-1)[targets != IGNORE].square().mean()


def loss_of(operation, p, weight, hidden, targets):
    if operation == "descend":
        return vocabulary_descend(weight, hidden, targets, probabilities=p)[1]
    return vocabulary_step(p, weight, hidden, targets)[2]


def assert_close(ours, plain):
    torch.testing.assert_close(ours, plain, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("update", ["probabilities", "logits", "mirror"])
@pytest.mark.parametrize("keep_state", [False, True])
@pytest.mark.parametrize(
    "clamps",
    [NO_CLAMPS, Clamps(0.05, None), Clamps(None, 1.0), Clamps(0.3, 0.9), Clamps(0.3, 2.0, 1.5)],
    ids=["free", "change", "state", "both", "soft"],
)
@pytest.mark.parametrize("z_weight", [0.0, 0.1])
def test_descend_and_score_equal_plain_autograd(chunk_rows, update, keep_state, clamps, z_weight):
    x, p, weight, hidden, targets, _ = problem()
    z_sum = torch.ones((), dtype=torch.float64)
    state, loss = vocabulary_descend(
        weight,
        hidden,
        targets,
        **moving(x, p, update),
        keep_state=keep_state,
        clamps=clamps,
        z_weight=z_weight,
        z_sum=z_sum,
    )
    plain_loss, plain = reference_loss(x, weight, hidden, targets, update, clamps)
    z_term = z_loss(x, weight, hidden, targets, update, clamps)
    assert_close(z_sum - 1, z_weight * z_term.detach())
    plain_loss = plain_loss + z_weight * z_term
    assert_close(loss, plain_loss)
    assert_close(
        torch.autograd.grad(3 * loss, [weight, hidden]),
        torch.autograd.grad(3 * plain_loss, [weight, hidden]),
    )
    if keep_state:
        assert_close(state, plain)
        assert not state.requires_grad
    else:
        assert state is None


@pytest.mark.parametrize("loss_weight", [1.0, 0.25])
def test_step_equals_descend_then_embed_in_plain_autograd(chunk_rows, loss_weight):
    """The two outputs that carry gradients, back-propagated together, and one after the other."""
    x, p, weight, hidden, targets, draw = problem()
    cotangent = draw(ROWS, D)
    plain_loss, plain_state = reference_loss(x, weight, hidden, targets, "probabilities")
    plain_p, plain_e = vocabulary_embed_reference(plain_state, weight)
    plain = torch.autograd.grad(
        loss_weight * plain_loss + (plain_e * cotangent).sum(), [weight, hidden], retain_graph=True
    )
    p_next, e_next, loss = vocabulary_step(p, weight, hidden, targets, loss_weight=loss_weight)
    assert_close((p_next, e_next, loss), (plain_p, plain_e, plain_loss))
    assert not p_next.requires_grad
    assert_close(
        torch.autograd.grad(loss_weight * loss + (e_next * cotangent).sum(), [weight, hidden]),
        plain,
    )
    p_next, e_next, loss = vocabulary_step(p, weight, hidden, targets, loss_weight=loss_weight)
    (of_hidden,) = torch.autograd.grad(loss_weight * loss, hidden)
    (of_weight,) = torch.autograd.grad((e_next * cotangent).sum(), weight)
    assert_close((of_weight, of_hidden), plain)


def test_a_step_whose_loss_does_not_count_gives_the_gradient_of_the_embedding_alone(chunk_rows):
    x, p, weight, hidden, targets, draw = problem()
    cotangent = draw(ROWS, D)
    _, plain_state = reference_loss(x, weight, hidden, targets, "probabilities")
    _, plain_e = vocabulary_embed_reference(plain_state, weight)
    _, e_next, _ = vocabulary_step(p, weight, hidden, targets, loss_weight=0.0)
    assert_close(
        torch.autograd.grad((e_next * cotangent).sum(), weight),
        torch.autograd.grad((plain_e * cotangent).sum(), weight),
    )


def test_half_precision_weights_keep_the_gradient_of_a_nearly_certain_prediction():
    """e' and W_y are equal to bfloat16 where p'_y is near 1; their difference, the gradient, must
    come out all the same.
    """
    x, _, weight, hidden, targets, draw = problem()
    x[torch.arange(ROWS), targets.clamp(min=0)] = 9.0
    p, cotangent, gradients = (
        x,
        draw(ROWS, D),
        {},
    )  # as p: any numbers serve, and these make p' nearly certain
    for dtype in (torch.float64, torch.bfloat16):
        w, h = (
            weight.detach().bfloat16().to(dtype).requires_grad_(),
            (0.1 * hidden).detach().bfloat16().to(torch.float64).requires_grad_(),
        )
        state = torch.float64 if dtype == torch.float64 else torch.float32
        h_state = h.to(state)
        _, embedded, loss = vocabulary_step(p.to(state), w, h_state, targets)
        gradients[dtype, "both"] = torch.autograd.grad(
            loss + (embedded.to(state) * cotangent.to(state)).sum(), [w, h], retain_graph=True
        )
        gradients[dtype, "loss"] = torch.autograd.grad(loss + 0 * embedded.sum(), [w, h])
    for name in ("loss", "both"):
        for half, exact in zip(gradients[torch.bfloat16, name], gradients[torch.float64, name]):
            if exact is not None:
                assert (half.double() - exact).abs().max() < 0.02 * exact.abs().max()


def test_the_comparison_notices_a_missing_pull_back(chunk_rows):
    """The gradients of the two updates differ: scoring one against the other must fail."""
    x, p, weight, hidden, targets, _ = problem()
    _, loss = vocabulary_descend(weight, hidden, targets, probabilities=p, x=x)
    other, _ = reference_loss(x, weight, hidden, targets, "probabilities")
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            torch.autograd.grad(loss, weight), torch.autograd.grad(other, weight)
        )


def test_embed_and_its_weight_gradient_equal_plain_autograd(chunk_rows):
    x, p, weight, _, _, draw = problem()
    (ours_p, out), (_, plain) = vocabulary_embed(x, weight), vocabulary_embed_reference(x, weight)
    assert_close((ours_p, out), (p, plain))
    cotangent = draw(ROWS, D)
    assert_close(
        torch.autograd.grad(out, weight, cotangent), torch.autograd.grad(plain, weight, cotangent)
    )


def test_cross_entropy_equals_plain_autograd(chunk_rows):
    _, _, weight, hidden, targets, _ = problem()
    loss, plain = (
        vocabulary_cross_entropy(hidden, weight, targets),
        F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE),
    )
    assert_close(loss, plain)
    assert_close(
        torch.autograd.grad(loss, [hidden, weight]), torch.autograd.grad(plain, [hidden, weight])
    )


@pytest.mark.parametrize("operation", ["descend", "step"])
def test_without_a_target_that_counts_loss_and_gradients_are_zero(operation):
    _, p, weight, hidden, targets, _ = problem()
    targets.fill_(IGNORE)
    loss = loss_of(operation, p, weight, hidden, targets)
    gradients = torch.autograd.grad(loss, [weight, hidden], allow_unused=operation == "step")
    assert loss == 0 and all(gradient.eq(0).all() for gradient in gradients if gradient is not None)


def test_without_targets_there_is_a_state_and_no_loss():
    x, p, weight, hidden, _, _ = problem()
    state, loss = vocabulary_descend(weight, hidden, None, probabilities=p, x=x)
    assert loss is None and state.shape == x.shape
    p_next, embedded, loss = vocabulary_step(p, weight, hidden, None)
    assert loss is None
    assert_close(
        (p_next, embedded),
        vocabulary_embed_reference(
            vocabulary_descend_reference(weight, hidden, probabilities=p), weight
        ),
    )


@pytest.mark.parametrize("operation", ["descend", "step"])
def test_a_second_derivative_is_refused_instead_of_dropped(operation):
    _, p, weight, hidden, targets, _ = problem()
    loss = loss_of(operation, p, weight, hidden, targets)
    with pytest.raises(RuntimeError, match="second derivative is not defined"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_a_second_backward_through_one_loss_is_refused_instead_of_scaled_twice():
    _, p, weight, hidden, targets, _ = problem()
    loss = vocabulary_descend(weight, hidden, targets, probabilities=p)[1]
    torch.autograd.grad(2 * loss, weight, retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward through the same loss"):
        torch.autograd.grad(loss, weight)


def test_rows_of_one_target_are_added_in_one_order_on_every_device():
    """On a GPU index_add_ would add with atomics, in an order that changes from run to run."""
    from torch.utils._python_dispatch import TorchDispatchMode

    names = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    for dtype in (torch.float32, torch.bfloat16):
        with torch.device("meta"):
            weight = torch.empty(V, D, dtype=dtype, requires_grad=True)
            hidden = torch.empty(ROWS, D, dtype=dtype, requires_grad=True)
            targets = torch.empty(ROWS, dtype=torch.int64)
            p = torch.empty(ROWS, V)
        with Names():
            _, embedded, loss = vocabulary_step(p, weight, hidden, targets)
            (embedded.float().sum() + loss).backward()
    assert names.count("index_put_") == 2 and "index_add_" not in names


def test_repeated_targets_add_up_as_in_a_loop():
    _, _, weight, hidden, _, _ = problem()
    targets = torch.tensor([5] * 6 + [2] * (ROWS - 6))
    expected = weight.detach().clone()
    for target, row in zip(targets, hidden.detach()):
        expected[target] += row
    added = weight.detach().clone()
    vocabulary._add_rows_(added, targets, hidden.detach())
    sorted_way = weight.detach().clone().index_put_((targets,), hidden.detach(), accumulate=True)
    assert_close(added, expected)
    assert_close(sorted_way, expected)
