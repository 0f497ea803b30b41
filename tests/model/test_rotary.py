"""The rotation equals its plain formula, forwards and to the second order, in any layout and
precision.
"""

import pytest
import torch

from ebwm_scale.model.rotary import RotaryTable

B, H, S, D, THETA = 2, 3, 5, 8, 1e4


def plain(x, first=0):
    """(a, b) -> (a cos - b sin, a sin + b cos) of adjacent pairs.

    angle = position * theta^(-2 i / d).
    """
    position = torch.arange(first, first + S, dtype=torch.float64)[:, None]
    angle = (position * THETA ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)).to(x.dtype)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack(
        [a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1
    ).flatten(-2)


def inputs(dtype=torch.float64):
    return (
        torch.randn(B, S, H * D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
    )


def heads(x):
    return x.unflatten(-1, (H, D)).transpose(1, 2)


@pytest.mark.parametrize("first", [0, 3])
def test_value_and_gradients_of_first_and_second_order_equal_the_plain_formula(first):
    x = inputs()
    rotary = RotaryTable(D, THETA)(first + S, x).slice(first, S)
    results = []
    for rotate in (rotary.rotate, lambda u: plain(u, first)):
        out = rotate(heads(x))
        (inner,) = torch.autograd.grad(out.sin().sum(), x, create_graph=True)
        (outer,) = torch.autograd.grad(
            inner.cos().sum() + rotate(heads(inner)).square().sin().sum(), x, create_graph=True
        )
        (third,) = torch.autograd.grad(outer.square().sum(), x)
        results.append((out, inner, outer, third))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)


def test_gradients_that_are_not_contiguous():
    x = inputs()
    rotary = RotaryTable(D, THETA)(S, x)
    cotangent = torch.randn(B, H, D, S, dtype=torch.float64).transpose(2, 3)
    ours, expected = (
        torch.autograd.grad(out, x, cotangent) for out in (rotary.rotate(heads(x)), plain(heads(x)))
    )
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(
        torch.autograd.grad(rotary.rotate(heads(x)).sum(), x),
        torch.autograd.grad(plain(heads(x)).sum(), x),
    )


def test_half_precisions_are_rotated_in_float32_and_far_positions_keep_their_angles():
    x = inputs(torch.bfloat16)
    rotary = RotaryTable(D, THETA)(100_000 + S, x).slice(100_000, S)
    out = rotary.rotate(heads(x))
    assert out.dtype == torch.bfloat16
    exact = plain(heads(x).double(), 100_000)
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-6)
    assert torch.equal(out, rotary.rotate(heads(x).float()).bfloat16())


def test_it_keeps_no_activation():
    saved = []
    x = inputs()
    rotary = RotaryTable(D, THETA)(S, x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rotary.rotate(heads(x))
    assert not saved


def scores(table, first):
    """q . k of the same vectors at 24 positions from `first` on."""
    x = torch.randn(1, 1, 24, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rotated = table(first + 24, x).slice(first, 24).rotate(x)
    return rotated @ rotated.mT


def test_a_shift_of_all_groups_in_time_changes_no_score():
    for grid in (None, (2, 3)):
        table = RotaryTable(12, THETA, 6, grid)
        torch.testing.assert_close(scores(table, 0), scores(table, 18), rtol=1e-12, atol=1e-12)
        assert not torch.allclose(scores(table, 0), scores(table, 1))  # no shift of whole groups


def test_rows_and_columns_of_a_grid_are_told_apart():
    """Cells 1 and 3 of a 2 x 3 grid, (0, 1) and (1, 0), and the same grid in one row."""
    like = torch.zeros(1, dtype=torch.float64)
    factors = RotaryTable(12, THETA, 6, (2, 3))(6, like).factors
    assert not torch.allclose(factors[1], factors[3])
    # (time, row, column): 2 pairs each; the row's pairs know no column and the other way round.
    assert torch.equal(factors[1, 2:4], factors[0, 2:4])
    assert torch.equal(factors[3, 4:6], factors[0, 4:6])
    in_one_row = RotaryTable(12, THETA, 6)(6, like).factors
    assert not torch.allclose(factors, in_one_row)
