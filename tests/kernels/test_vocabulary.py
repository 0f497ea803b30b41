"""The chunked vocabulary step equals the materialised one: value and first-order gradients, both updates, any number of chunks."""
import pytest
import torch
from torch.nn import functional as F

from ebwm_kernels import vocabulary
from ebwm_kernels.vocabulary import (IGNORE, vocabulary_cross_entropy, vocabulary_descend, vocabulary_descend_reference, vocabulary_embed,
                                     vocabulary_embed_reference)

ROWS, V, D = 11, 23, 6


@pytest.fixture(params=[1, 4, 1000], ids=lambda rows: f"chunks_of_{rows}_rows")
def chunk_rows(request, monkeypatch):
    monkeypatch.setattr(vocabulary, "CHUNK_BYTES", 4 * V * request.param)


def problem():
    generator = torch.Generator().manual_seed(3)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)
    x, weight, gradient = 3 * draw(ROWS, V), draw(V, D).requires_grad_(), draw(ROWS, D).requires_grad_()
    targets = torch.randint(V, (ROWS,), generator=generator)
    targets[3] = IGNORE
    return x, weight, gradient, targets, draw


@pytest.mark.parametrize("update", ["probabilities", "logits"])
@pytest.mark.parametrize("per_row_step", [False, True])
def test_descend_and_score_equal_plain_autograd(chunk_rows, update, per_row_step):
    x, weight, gradient, targets, draw = problem()
    step = (draw(ROWS, 1).abs() + 0.5 if per_row_step else torch.tensor(1.7, dtype=torch.float64)).requires_grad_()
    state, loss = vocabulary_descend(x, weight, gradient, step, targets, update=update)
    plain = vocabulary_descend_reference(x, weight, gradient, step, update=update)
    plain_loss = F.cross_entropy(plain, targets, ignore_index=IGNORE)
    torch.testing.assert_close(state, plain.detach(), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(loss, plain_loss, rtol=1e-13, atol=1e-14)
    ours = torch.autograd.grad(3 * loss, [weight, gradient, step])
    theirs = torch.autograd.grad(3 * plain_loss, [weight, gradient, step])
    for mine, plain_gradient in zip(ours, theirs):
        torch.testing.assert_close(mine, plain_gradient, rtol=1e-11, atol=1e-13)
    assert not state.requires_grad


def test_the_comparison_notices_a_missing_pull_back(chunk_rows):
    """The gradients of the two updates differ: scoring one against the other must fail."""
    x, weight, gradient, targets, _ = problem()
    step = torch.tensor(1.7, dtype=torch.float64)
    _, loss = vocabulary_descend(x, weight, gradient, step, targets, update="logits")
    other = F.cross_entropy(vocabulary_descend_reference(x, weight, gradient, step, update="probabilities"), targets, ignore_index=IGNORE)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(torch.autograd.grad(loss, weight), torch.autograd.grad(other, weight))


def test_embed_and_its_weight_gradient_equal_plain_autograd(chunk_rows):
    x, weight, _, _, draw = problem()
    out, plain = vocabulary_embed(x, weight), vocabulary_embed_reference(x, weight)
    torch.testing.assert_close(out, plain, rtol=1e-13, atol=1e-14)
    cotangent = draw(ROWS, D)
    torch.testing.assert_close(torch.autograd.grad(out, weight, cotangent), torch.autograd.grad(plain, weight, cotangent), rtol=1e-12, atol=1e-13)


def test_cross_entropy_equals_plain_autograd(chunk_rows):
    _, weight, hidden, targets, _ = problem()
    loss, plain = vocabulary_cross_entropy(hidden, weight, targets), F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE)
    torch.testing.assert_close(loss, plain, rtol=1e-13, atol=1e-14)
    for mine, theirs in zip(torch.autograd.grad(loss, [hidden, weight]), torch.autograd.grad(plain, [hidden, weight])):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_without_targets_or_state_only_the_other_is_made():
    x, weight, gradient, targets, _ = problem()
    step = torch.tensor(1.0, dtype=torch.float64)
    state, loss = vocabulary_descend(x, weight, gradient, step, None, update="logits")
    assert loss is None and state.shape == x.shape
    state, loss = vocabulary_descend(x, weight, gradient, step, targets, update="logits", keep_state=False)
    assert state is None and loss.ndim == 0


def test_a_second_derivative_is_refused_instead_of_dropped():
    x, weight, gradient, targets, _ = problem()
    _, loss = vocabulary_descend(x, weight, gradient, torch.tensor(1.0, dtype=torch.float64), targets, update="probabilities")
    with pytest.raises(RuntimeError, match="second derivative is not defined"):
        torch.autograd.grad(loss, weight, create_graph=True)
