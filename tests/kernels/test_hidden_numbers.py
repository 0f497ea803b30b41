"""What a row does not see does not reach it, be it infinite or no number: every order of the
reference, with causal masks, groups, documents, windows and shared heads.
"""

from __future__ import annotations

import pytest
import torch
from test_triton_masks import Case, problem
from torch import Tensor

from ebwm_kernels.attention import isolation, reference
from ebwm_kernels.attention.row_blocks import ROWS

INF, NAN = float("inf"), float("nan")
OF_ROWS = {"forward": (0,), "gradient": (0, 3, 4), "double_backward": (0, 1, 4, 5), "tangent": (0,)}
OF_KEYS = {"gradient": (1, 2), "double_backward": (2, 3)}
OF_ROWS["joint"], OF_KEYS["joint"] = OF_ROWS["double_backward"], OF_KEYS["double_backward"]


def poisoned(task, keys: slice, rows: slice, number: float = INF):
    """The problem with such numbers in everything that belongs to these keys and rows."""

    def spoil(x: Tensor | None, places: slice) -> Tensor | None:
        if x is None:
            return None
        x = x.clone()
        x[:, :, places] = number
        return x

    q, k, v, *own = task.inputs
    a, b, c, *own_cotangents = task.cotangents
    return task._replace(
        inputs=[
            spoil(q, rows),
            spoil(k, keys),
            spoil(v, keys),
            *(spoil(x, rows) for x in own),
        ],
        grad=spoil(task.grad, rows),
        g_out=spoil(task.g_out, rows),
        cotangents=type(task.cotangents)(
            spoil(a, rows),
            spoil(b, keys),
            spoil(c, keys),
            *(spoil(x, rows) for x in own_cotangents),
        ),
    )


def assert_equal_at(task, other, rows: slice, keys: slice, implementation=reference) -> None:
    """Every order has the clean problem's numbers in these rows and keys."""
    clean = task.levels(reference)
    for level, results in other.levels(implementation).items():
        parts = [(index, rows) for index in OF_ROWS[level]]
        parts += [(index, keys) for index in OF_KEYS.get(level, ())]
        for index, places in parts:
            if results[index] is not None:
                mine, right = (x[:, :, places] for x in (results[index], clean[level][index]))
                torch.testing.assert_close(
                    mine, right, rtol=1e-10, atol=1e-12, msg=lambda m, n=level: f"{n}: {m}"
                )


NOWHERE = slice(0, 0)
FUTURE = [
    Case(9, 9, own=False),
    Case(9, 9),
    Case(9, 11, offset=2, H=4, H_kv=2),
    Case(ROWS + 6, ROWS + 6),
    Case(9, 9, 3, 3),
    Case(9, 9, 3, 3, own=False),
    Case(9, 9, own=False, first="window"),
]


@pytest.mark.parametrize("number", [INF, -INF, NAN, 1e200])
@pytest.mark.parametrize("case", FUTURE, ids=str)
def test_the_future_does_not_reach_a_row(case, number):
    """Keys from the middle on, and the rows that see them, in a problem of one or two blocks."""
    middle = case.S // 2 // case.group * case.group
    task = problem(case)
    other = poisoned(task, slice(middle + case.offset, None), slice(middle, None), number)
    assert_equal_at(task, other, slice(0, middle), NOWHERE)


@pytest.mark.parametrize("own", [True, False], ids=["energy", "causal"])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("is_first", [True, False], ids=["earlier", "later"])
def test_documents_do_not_reach_each_other(own, group, is_first):
    """Neither their rows nor the gradients of their keys; the samples' documents differ."""
    task = problem(Case(40, 40, group, group, own=own, first="documents", H=2))
    start = 24 if is_first else 0
    first = torch.tensor([[0] * 24 + [24] * 16] * 2, dtype=torch.int32)
    first[1, 32:] = 32
    task = task._replace(first_visible=first)
    bad = slice(0, 24) if is_first else slice(24, 40)
    good = slice(start, start + (16 if is_first else 24))
    assert_equal_at(task, poisoned(task, bad, bad), good, good)


def test_a_row_that_sees_no_context_is_not_reached_by_the_key_in_its_place():
    case = Case(4, 4, 2, 2, first="window")
    task = problem(case)._replace(first_visible=torch.tensor([[0, 0, 4, 4]], dtype=torch.int32))
    other = poisoned(task, slice(0, 4), slice(0, 2), NAN)
    assert_equal_at(task, other, slice(2, 4), NOWHERE)


def test_without_isolation_the_same_comparison_fails(monkeypatch):
    monkeypatch.setattr(isolation, "_are_finite", lambda results: True)
    for case in (Case(9, 9, own=False), Case(9, 9)):
        task = problem(case)
        other = poisoned(task, slice(4, None), slice(4, None))
        with pytest.raises(AssertionError):
            assert_equal_at(task, other, slice(0, 4), NOWHERE)


def test_a_large_hidden_key_takes_no_digits_from_the_rows_before_it():
    """As a part of a mean over all keys it would: 1e12 is where float64 has four decimals left."""
    task = problem(Case(ROWS, ROWS, own=False))
    other = poisoned(task, slice(ROWS - 1, None), slice(ROWS - 1, None), 1e12)
    assert_equal_at(task, other, slice(0, ROWS - 1), NOWHERE)


@pytest.mark.parametrize("case", [Case(9, 9), Case(9, 9, 3, 3), Case(9, 9, own=False)], ids=str)
def test_what_is_not_finite_for_all_is_computed_once(case, monkeypatch):
    """A training that has diverged costs no more: nothing could be saved."""
    looked_at = []
    right = isolation._is_spoiled
    monkeypatch.setattr(
        isolation, "_is_spoiled", lambda *x: looked_at.append(right(*x)) or looked_at[-1]
    )
    task = problem(case)
    everything = slice(0, None)
    poisoned(task, everything, everything, NAN).levels(reference)
    assert looked_at and not any(looked_at)
    looked_at.clear()
    task.levels(reference)
    assert not looked_at
