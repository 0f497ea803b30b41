"""The first step that chooses candidates, fused, in Triton's interpreter: plain PyTorch's choice to
the token, its numbers and gradients to 1e-10 in float64, and to 1.5 times its rounding otherwise.
"""

import pytest
import torch
from torch import Tensor

from ebwm_kernels.fused import candidate_kernels
from ebwm_kernels.fused.candidate_kernels import choose_rows
from ebwm_kernels.fused.launches import why_not_fused
from ebwm_kernels.vocabulary import fused_rows
from ebwm_kernels.vocabulary.candidates import first_candidates, top_candidates
from ebwm_kernels.vocabulary.formulas import NO_CLAMPS, Clamps
from ebwm_kernels.vocabulary.softmax_cross_entropy import IGNORE

# The test extra installs Triton where it has wheels, on Linux x86-64; elsewhere nothing is fused.
OBSTACLE = why_not_fused(torch.device("cpu"), torch.float64)
pytestmark = pytest.mark.skipif(OBSTACLE is not None, reason=f"Triton's interpreter: {OBSTACLE}")
ROWS, V, WIDTH, K = 9, 23, 6, 5
CLAMPS = {
    "": NO_CLAMPS,
    "bounds": Clamps(change=0.7, state=5.0),
    "a soft bound": Clamps(soft=2.0),
}


def numbers(update: str, backend: str, dtype: torch.dtype) -> list[Tensor]:
    """Candidates, what further steps read, and the gradients of a loss of it."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)
    states = torch.float64 if dtype == torch.float64 else torch.float32
    x = (3 * draw(ROWS, V)).half().to(states)
    weight = draw(V, WIDTH).half().to(dtype).requires_grad_()
    hidden = draw(ROWS, WIDTH).half().to(states).requires_grad_()
    targets = torch.randint(V, (ROWS,), generator=generator)
    targets[3] = IGNORE
    update, _, bounds = update.partition(", within ")
    moves = {"mirror": {"x": x}, "probabilities": {"probabilities": x.softmax(-1)}}
    moves["logits"] = {"x": x, "probabilities": x.softmax(-1)}
    first = first_candidates(
        weight,
        5 * hidden if update == "logits" else hidden,  # the softmax shortens moves
        None if update == "from zeros, without targets" else targets,
        K,
        **moves.get(update, {}),
        clamps=CLAMPS[bounds],
        keep_state=True,
        backend=backend,
    )
    of_rows = draw(ROWS).to(states)
    of_values = draw(ROWS, K).to(states)
    total = (first.values * of_values).sum() + (first.tail.sin() * of_rows).sum()
    total = total + (first.target.cos() * of_rows).sum()
    assert first.state is not None
    found = [first.candidates.ids, first.values, first.tail, first.target, first.state]
    found += torch.autograd.grad(total, [weight, hidden])
    return [u.detach().double() for u in found]


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).norm() / exact.norm().clamp_min(1e-300))


UPDATES = [
    "mirror",
    "probabilities",
    "logits",
    "from zeros",
    "from zeros, without targets",
    "mirror, within bounds",
    "probabilities, within a soft bound",
    "logits, within bounds",
]


@pytest.mark.parametrize("update", UPDATES)
def test_the_first_step_is_plain_pytorch(update):
    exact = numbers(update, "reference", torch.float64)
    for ours, plain in zip(numbers(update, "triton", torch.float64), exact, strict=True):
        assert error(ours, plain) < 1e-10
    for dtype in (torch.float32, torch.float16):
        ours, plain = numbers(update, "triton", dtype), numbers(update, "reference", dtype)
        assert torch.equal(ours[0], plain[0])
        for index, true in enumerate(exact):
            allowed = 1.5 * error(plain[index], true) + torch.finfo(dtype).eps / 8
            assert error(ours[index], true) <= allowed, (dtype, index)


@pytest.mark.parametrize("case", ["ties", "nan", "more nan than candidates", "infinite", "wide"])
def test_ties_and_numbers_that_are_not_finite_are_chosen_in_one_order(case):
    generator = torch.Generator().manual_seed(3)
    size = 2 * candidate_kernels.TILE.columns + 3 if case == "wide" else V
    x = torch.randint(4, (4, size), generator=generator).float()
    if case == "nan":
        x[1, 3] = torch.nan
    elif case == "more nan than candidates":
        x[1, 3:15] = torch.nan
    elif case == "infinite":
        x[0, 3:15] = torch.inf
        x[1, 3:22] = -torch.inf
    ids, normalizer = choose_rows(x, K)
    assert torch.equal(ids, top_candidates(x, K))
    tail = normalizer[:, 0] + normalizer[:, 1].log()
    expected = x.scatter(1, ids, -torch.inf).logsumexp(-1)
    finite = expected.isfinite()
    assert torch.equal(tail.isfinite(), finite)
    torch.testing.assert_close(tail[finite], expected[finite])


@pytest.mark.parametrize("broken", ["of_tail", "of_target"])
def test_the_comparison_notices_a_missing_gradient(broken, monkeypatch):
    right = candidate_kernels.rest_gradient

    def without(x, normalizer, target, of_tail, of_target, dtype):
        if broken == "of_tail":
            of_tail = 0 * of_tail
        else:
            target = of_target = None
        return right(x, normalizer, target, of_tail, of_target, dtype)

    monkeypatch.setattr(candidate_kernels, "rest_gradient", without)
    with pytest.raises(AssertionError):
        test_the_first_step_is_plain_pytorch("mirror")


@pytest.mark.parametrize("lost", ["clamps", "softmax"])
def test_the_comparison_notices_a_gradient_that_is_not_pulled_back(lost, monkeypatch):
    right = fused_rows.pulled_back

    def without(grad, move, start, through, clamps):
        if lost == "clamps":
            return right(grad, move, start, through, NO_CLAMPS)
        return right(grad, move, start, None, clamps)

    monkeypatch.setattr(fused_rows, "pulled_back", without)
    with pytest.raises(AssertionError):
        test_the_first_step_is_plain_pytorch("logits, within bounds")
