"""Steps of a few tokens of each row equal a mask over all tokens: values and first-order gradients;
ties and numbers that are not finite are chosen in one order.
"""

import itertools

import pytest
import torch
from torch.nn import functional as F

from ebwm_kernels.vocabulary import candidates as module
from ebwm_kernels.vocabulary.api import vocabulary_descend_reference, vocabulary_embed_reference
from ebwm_kernels.vocabulary.candidates import (
    Candidates,
    candidates_embed,
    candidates_embed_reference,
    candidates_loss,
    candidates_move,
    candidates_move_reference,
    first_candidates,
    top_candidates,
)
from ebwm_kernels.vocabulary.formulas import NO_CLAMPS, Clamps
from ebwm_kernels.vocabulary.softmax_cross_entropy import IGNORE

ROWS, V, D, K = 11, 23, 6, 5
WAYS = (top_candidates, module._top_without_waiting)  # on a CPU; on other devices


def problem(seed=3):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)
    x, weight, hidden = 3 * draw(ROWS, V), draw(V, D), draw(ROWS, D)
    targets = torch.randint(V, (ROWS,), generator=generator)
    targets[3] = IGNORE
    return x, weight.requires_grad_(), hidden.requires_grad_(), targets, draw


def moving(x, update):
    """What descends, by update."""
    if update == "from zeros":
        return {}
    return {
        "probabilities": {"probabilities": x.softmax(-1)},
        "logits": {"probabilities": x.softmax(-1), "x": x},
        "mirror": {"x": x},
    }[update]


def assert_close(ours, plain):
    torch.testing.assert_close(ours, plain, rtol=1e-11, atol=1e-13)


def two_steps(x, weight, hidden, second, targets, update, clamps, grad_buffer=None):
    """(loss after each of two steps, e): the second mirrors, of candidates alone."""
    first = first_candidates(
        weight, hidden, targets, K, **moving(x, update), clamps=clamps, grad_buffer=grad_buffer
    )
    chosen = first.candidates
    scored = (first.tail, first.target, chosen, targets)
    q = first.values.softmax(-1)
    e = candidates_embed(q, weight, chosen, grad_buffer=grad_buffer)
    values = first.values + candidates_move(weight, second, chosen, grad_buffer=grad_buffer)
    return candidates_loss(first.values, *scored), candidates_loss(values, *scored), e


def two_masked_steps(x, weight, hidden, second, targets, update, clamps):
    state = vocabulary_descend_reference(weight, hidden, **moving(x, update), clamps=clamps)
    # Clamped numbers are equal: the lowest tokens come first.
    order = state.sort(dim=-1, descending=True, stable=True).indices
    mask = torch.zeros_like(state, dtype=torch.bool).scatter_(1, order[:, :K], True)
    e = state.masked_fill(~mask, -torch.inf).softmax(-1) @ weight
    moved = state + mask * (second @ weight.T)
    losses = [F.cross_entropy(u, targets, ignore_index=IGNORE) for u in (state, moved)]
    return *losses, e


@pytest.mark.parametrize("update", ["probabilities", "logits", "mirror", "from zeros"])
@pytest.mark.parametrize(
    "clamps",
    [NO_CLAMPS, Clamps(0.05, None), Clamps(None, 1.0), Clamps(0.3, 0.9)],
    ids=["free", "change", "state", "both"],
)
@pytest.mark.parametrize("with_buffer", [False, True])
def test_two_steps_equal_a_mask_in_plain_autograd(update, clamps, with_buffer):
    x, weight, hidden, targets, draw = problem()
    second = draw(ROWS, D).requires_grad_()
    cotangent = draw(ROWS, D)
    buffer = torch.zeros(V, D, dtype=torch.float64) if with_buffer else None
    ours = two_steps(x, weight, hidden, second, targets, update, clamps, buffer)
    plain = two_masked_steps(x, weight, hidden, second, targets, update, clamps)
    assert_close(ours, plain)

    def gradients(results):
        total = results[0] + 3 * results[1] + (results[2] * cotangent).sum()
        return torch.autograd.grad(total, [weight, hidden, second], allow_unused=True)

    found, expected = gradients(ours), gradients(plain)
    if with_buffer:
        assert found[0] is None
        found = (buffer, *found[1:])
    assert_close(found, expected)


def test_all_tokens_as_candidates_are_the_dense_step():
    x, weight, hidden, targets, draw = problem()
    everything = Candidates(torch.arange(V).expand(ROWS, V).contiguous(), V)
    tail = torch.full((ROWS,), -torch.inf, dtype=torch.float64)
    q = x.softmax(-1)
    e = candidates_embed(q, weight, everything)
    state = x + candidates_move(weight, hidden, everything)
    loss = candidates_loss(state, tail, tail, everything, targets)
    dense_state = vocabulary_descend_reference(weight, hidden, x=x)
    dense = F.cross_entropy(dense_state, targets, ignore_index=IGNORE)
    _, dense_e = vocabulary_embed_reference(x, weight)
    assert_close((e, state, loss), (dense_e, dense_state, dense))
    cotangent = draw(ROWS, D)
    assert_close(
        torch.autograd.grad(loss + (e * cotangent).sum(), [weight, hidden]),
        torch.autograd.grad(dense + (dense_e * cotangent).sum(), [weight, hidden]),
    )


@pytest.mark.parametrize("operation", ["embed", "move"])
def test_each_product_equals_its_reference(operation):
    _, weight, hidden, _, draw = problem()
    ids = torch.stack([torch.randperm(V)[:K].sort().values for _ in range(ROWS)])
    numbers = draw(ROWS, K).requires_grad_()
    if operation == "embed":
        ours = candidates_embed(numbers, weight, Candidates(ids, V))
        plain = candidates_embed_reference(numbers, weight, ids)
        inputs = [numbers, weight]
    else:
        ours = candidates_move(weight, hidden, Candidates(ids, V))
        plain = candidates_move_reference(weight, hidden, ids)
        inputs = [weight, hidden]
    assert_close(ours, plain)
    cotangent = torch.randn_like(plain)
    assert_close(
        torch.autograd.grad(ours, inputs, cotangent), torch.autograd.grad(plain, inputs, cotangent)
    )


def test_of_equal_numbers_the_lowest_tokens_are_chosen():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(4, (200, V), generator=generator).float()
    x[0] = 0.0
    for count, choose in itertools.product((1, K, V - 1), WAYS):
        ids = choose(x, count)
        for row, found in zip(x.tolist(), ids.tolist()):
            order = sorted(range(V), key=lambda token: (-row[token], token))
            assert found == sorted(order[:count])


def test_numbers_that_are_not_finite_are_chosen_first_and_show_in_the_loss():
    x, weight, hidden, targets, _ = problem()
    x[2, 7] = torch.nan
    x[4] = torch.nan
    x[5, 9] = torch.inf
    ids = top_candidates(x, K)
    assert torch.equal(module._top_without_waiting(x, K), ids)
    assert 7 in ids[2] and ids[4].tolist() == list(range(K)) and 9 in ids[5]
    first = first_candidates(weight, hidden, targets, K, x=x)
    loss = candidates_loss(first.values, first.tail, first.target, first.candidates, targets)
    assert loss.isnan()


def test_a_target_has_its_place_or_none():
    chosen = Candidates(torch.tensor([[1, 4, 9], [0, 2, 3]]), V)
    for targets, places, inside in (([4, 3], [1, 2], [1, 1]), ([10, 1], [2, 1], [0, 0])):
        place, is_candidate = chosen.place_of(torch.tensor(targets))
        assert place.tolist() == places and is_candidate.tolist() == inside


def test_the_loss_does_not_cancel_where_candidates_hold_nearly_everything():
    """Subtracting the candidates from the sum over all tokens would leave rounding here."""
    weight = torch.zeros(V, D)
    x = torch.full((1, V), -40.0)
    x[0, :K] = 0.0
    target = torch.tensor([V - 1])
    first = first_candidates(weight, torch.zeros(1, D), target, K, x=x)
    sunk = first.values - 60.0  # now the others hold everything
    loss = candidates_loss(sunk, first.tail, first.target, first.candidates, target)
    exact = x.double()
    exact[0, :K] -= 60.0
    torch.testing.assert_close(loss.double(), F.cross_entropy(exact, target), rtol=1e-5, atol=0)


def test_half_precision_follows_float64():
    _, weight, hidden, targets, draw = problem()
    second = draw(ROWS, D)
    results = {}
    for dtype, state in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        w = weight.detach().bfloat16().to(dtype).requires_grad_()
        h, h2 = (u.detach().bfloat16().to(state).requires_grad_() for u in (hidden, second))
        buffer = torch.zeros(V, D, dtype=state)
        losses = two_steps(None, w, h, h2, targets, "from zeros", NO_CLAMPS, buffer)
        total = losses[0] + losses[1]
        grads = torch.autograd.grad(total, [h, h2])
        results[dtype] = [total, *grads, buffer]
        assert losses[2].dtype == dtype and total.dtype == state
    for half, exact in zip(results[torch.bfloat16], results[torch.float64]):
        assert (half.double() - exact).abs().max() < 0.03 * exact.abs().max()


def test_a_gradient_of_the_map_that_is_added_to_wrong_rows_is_seen(monkeypatch):
    """Breaks it on purpose."""
    right = Candidates.by_token.func
    monkeypatch.setattr(
        Candidates,
        "by_token",
        property(lambda self: (found := right(self))._replace(tokens=found.tokens.flip(0))),
    )
    with pytest.raises(AssertionError):
        test_two_steps_equal_a_mask_in_plain_autograd("mirror", NO_CLAMPS, False)


@pytest.mark.parametrize("result", ["values", "embedded", "moved"])
def test_a_second_derivative_is_refused_instead_of_dropped(result):
    x, weight, hidden, targets, _ = problem()
    first = first_candidates(weight, hidden, targets, K, x=x)
    outcome = {
        "values": lambda: first.values,
        "embedded": lambda: candidates_embed(
            first.values.detach().softmax(-1), weight, first.candidates
        ),
        "moved": lambda: candidates_move(weight, hidden, first.candidates),
    }[result]()
    with pytest.raises(RuntimeError, match="second derivative is not defined"):
        torch.autograd.grad(outcome.sum(), weight, create_graph=True)


def test_a_second_backward_through_one_first_step_is_refused():
    x, weight, hidden, targets, _ = problem()
    first = first_candidates(weight, hidden, targets, K, x=x)
    torch.autograd.grad(first.tail.sum(), weight, retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward through the same loss"):
        torch.autograd.grad(first.tail.sum(), weight)


def test_torch_func_is_refused_in_one_sentence():
    _, weight, hidden, _, _ = problem()
    chosen = Candidates(torch.arange(K).expand(ROWS, K).contiguous(), V)
    with pytest.raises(RuntimeError, match="use vocabulary.candidates.candidates_move_reference"):
        torch.func.grad(lambda h: candidates_move(weight.detach(), h, chosen).sum())(
            hidden.detach()
        )


def test_nothing_of_a_gathered_map_is_kept():
    """No (rows, K, D) numbers, and no (V, D) gradient where there is a buffer."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            results = result if isinstance(result, (tuple, list)) else (result,)
            sizes.extend(u.numel() for u in results if isinstance(u, torch.Tensor))
            return result

    weight = torch.randn(1000, 32, requires_grad=True)
    hidden = torch.randn(8, 32, requires_grad=True)
    ids = torch.stack([torch.randperm(1000)[:40].sort().values for _ in range(8)])
    chosen = Candidates(ids, 1000)
    buffer = torch.zeros(1000, 32)
    with Sizes():
        numbers = candidates_move(weight, hidden, chosen, grad_buffer=buffer)
        out = candidates_embed(numbers, weight, chosen, grad_buffer=buffer)
        out.sum().backward()
    whole = {buffer.numel()}  # the buffer itself, which index_add_ returns
    assert max(set(sizes) - whole) <= 8 * 40 * 32  # at most a row per different token
    assert sizes.count(buffer.numel()) == 2
    assert module.__doc__ is not None and weight.grad is None
