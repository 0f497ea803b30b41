"""Steps whose states carry a graph, with fused passes in Triton's interpreter, are plain autograd:
in float64 to 1e-10; in float32 and half precision no further from the exact result than 1.5 times
plain PyTorch. float16 stands for half precision, as in test_fused.py.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ebwm_kernels.fused import vocabulary as fused_vocabulary
from ebwm_kernels.fused.launches import Tile, why_not_fused
from ebwm_kernels.vocabulary.api import vocabulary_descend_reference, vocabulary_embed_reference
from ebwm_kernels.vocabulary.formulas import NO_CLAMPS, Clamps
from ebwm_kernels.vocabulary.graph_steps import descend_with_graph, embed_with_graph
from ebwm_kernels.vocabulary.softmax_cross_entropy import IGNORE

# The test extra installs Triton where it has wheels, on Linux x86-64; elsewhere nothing is fused.
OBSTACLE = why_not_fused(torch.device("cpu"), torch.float64)
pytestmark = pytest.mark.skipif(OBSTACLE is not None, reason=f"Triton's interpreter: {OBSTACLE}")
ROWS, V, WIDTH = 9, 23, 6
FORMS = [
    "mirror",
    "probabilities",
    "logits",
    "mirror, last loss alone",
    "mirror, z-loss",
    "logits, z-loss",
    "logits, last loss alone",
    "mirror, no targets",
    "logits, no targets",
    "mirror, bounds",
    "probabilities, bounds",
    "logits, bounds",
    "mirror, soft bound",
    "logits, all bounds, z-loss",
]
CLAMPS = {
    "bounds": Clamps(change=0.7, state=1.1),
    "soft bound": Clamps(soft=2.0),
    "all bounds": Clamps(change=0.7, state=1.1, soft=2.0),
}


def plain_embed(x, weight, *, keep_p):
    p, embedded = vocabulary_embed_reference(x, weight)
    return x, p if keep_p else None, embedded


def plain_descend(weight, hidden, targets, *, start, through, clamps, z_weight):
    state = vocabulary_descend_reference(
        weight, hidden, x=start, probabilities=through, clamps=clamps
    )
    if targets is None:
        return state, None, None
    loss = F.cross_entropy(state, targets, ignore_index=IGNORE)
    z_term = z_weight * state.logsumexp(-1)[targets != IGNORE].square().mean()
    return state, loss + z_term, z_term.detach() if z_weight else None


def numbers(form: str, fused: bool, dtype: torch.dtype) -> list[Tensor]:
    """Two steps: their losses, the last state, and the gradients of what they were given."""
    embed, descend = (
        (embed_with_graph, descend_with_graph) if fused else (plain_embed, plain_descend)
    )
    generator = torch.Generator().manual_seed(3)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)
    weight = draw(V, WIDTH).half().to(dtype).requires_grad_()
    # as -alpha dE/de they are in the states' dtype
    states = torch.float64 if dtype == torch.float64 else torch.float32
    hidden = draw(ROWS, WIDTH).half().to(states).requires_grad_()
    second = draw(WIDTH, WIDTH).half().to(states)
    targets = torch.randint(V, (ROWS,), generator=generator)
    targets[3] = IGNORE
    if "no targets" in form:
        targets = None
    update, *parts = form.split(", ")
    choices = {
        "clamps": next((CLAMPS[part] for part in parts if part in CLAMPS), NO_CLAMPS),
        "z_weight": 0.1 if "z-loss" in parts else 0.0,
    }
    reach = V if update == "logits" else 1  # the softmax shortens moves
    start = through = None
    if update == "logits":  # as embed_zeros has them
        start, through = (torch.tensor(n, dtype=states).expand(ROWS, V) for n in (0.0, 1 / V))
    x, first_loss, _ = descend(
        weight, reach * hidden, targets, start=start, through=through, **choices
    )
    x, p, embedded = embed(x, weight, keep_p=update != "mirror")
    direction = reach * (embedded.to(states) @ second).sin()
    start, through = {"mirror": (x, None), "probabilities": (p, None), "logits": (x, p)}[update]
    last, loss, z_term = descend(
        weight, direction, targets, start=start, through=through, **choices
    )
    total = last.cos().sum() / 100
    found = [last]
    if loss is not None and first_loss is not None:
        total = total + 2 * loss
        found += [first_loss, loss]
        if "last loss alone" not in parts:
            total = total + 3 * first_loss
    found += torch.autograd.grad(total, [weight, hidden])
    if z_term is not None:
        found.append(z_term)
    return [u.detach().double() for u in found]


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).norm() / exact.norm().clamp_min(1e-300))


@pytest.mark.parametrize("form", FORMS)
def test_steps_with_a_graph_are_plain_autograd(form):
    exact = numbers(form, False, torch.float64)
    for ours, plain in zip(numbers(form, True, torch.float64), exact, strict=True):
        assert error(ours, plain) < 1e-10
    for dtype in (torch.float32, torch.float16):
        ours, plain = numbers(form, True, dtype), numbers(form, False, dtype)
        for index, true in enumerate(exact):
            # of a tensor, whose numbers' roundings average out, and of one number
            rounding = torch.finfo(dtype).eps * (1 / 8 if true.dim() else 4)
            assert error(ours[index], true) <= 1.5 * error(plain[index], true) + rounding, (
                dtype,
                index,
            )


@pytest.mark.parametrize("form", ["mirror", "logits, all bounds, z-loss"])
def test_rows_that_take_several_tiles_are_plain_autograd_too(form, monkeypatch):
    for name in ("TILE", "THROUGH_TILE"):
        monkeypatch.setattr(fused_vocabulary, name, Tile(1, 8, 4))
    exact = numbers(form, False, torch.float64)
    for ours, plain in zip(numbers(form, True, torch.float64), exact, strict=True):
        assert error(ours, plain) < 1e-10


def test_a_buffer_receives_the_maps_gradient():
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(V, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.arange(ROWS)

    def gradient(**given) -> Tensor | None:
        x, loss, _ = descend_with_graph(weight, hidden, targets, **given)
        _, _, embedded = embed_with_graph(x, weight, keep_p=False, **given)
        assert loss is not None
        total = loss + embedded.sin().sum()
        return torch.autograd.grad(total, [weight, hidden], allow_unused=True)[0]

    buffer = torch.ones_like(weight).detach()
    assert gradient(grad_buffer=buffer) is None
    torch.testing.assert_close(buffer - 1, gradient())


@pytest.mark.parametrize("operation", ["embed", "descend"])
def test_a_second_derivative_is_refused(operation):
    weight = torch.randn(V, WIDTH, dtype=torch.float64, requires_grad=True)
    if operation == "embed":
        x = torch.randn(ROWS, V, dtype=torch.float64, requires_grad=True)
        out = embed_with_graph(x, weight, keep_p=False)[2].sin().sum()
    else:
        x = torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
        out = descend_with_graph(weight, x, torch.arange(ROWS))[1]
    with pytest.raises(RuntimeError, match="second derivative is not defined"):
        torch.autograd.grad(out, x, create_graph=True)


@pytest.mark.parametrize(
    "part, lost, form",
    [
        ("softmax_gradient", {"of_x": None}, "mirror"),
        ("state_gradient", {"of_x": None}, "mirror"),
        ("step_gradient", {"of_state": None}, "logits"),
        ("step_gradient", {"form": fused_vocabulary.PLAIN_SUM}, "mirror, bounds"),
        ("step_gradient", {"form": fused_vocabulary.PLAIN_SUM}, "logits, bounds"),
        ("softmax_gradient", {"of_p": None}, "logits"),
    ],
)
def test_the_comparison_notices_a_gradient_that_does_not_arrive(part, lost, form, monkeypatch):
    """What the next step adds to a state's gradient is dropped, or what clamps do to it."""
    right = getattr(fused_vocabulary, part)
    monkeypatch.setattr(fused_vocabulary, part, lambda *x, **given: right(*x, **given | lost))
    with pytest.raises(AssertionError):
        test_steps_with_a_graph_are_plain_autograd(form)
