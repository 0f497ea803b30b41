"""What a row does not see does not reach it inside a tile of the Triton kernels either, in Triton's
interpreter and float64.
"""

from __future__ import annotations

import pytest
import torch
from test_hidden_numbers import INF, NAN, NOWHERE, assert_equal_at, poisoned
from test_triton_masks import OBSTACLE, Case, problem

from ebwm_kernels.attention import reference

if OBSTACLE is None:
    from ebwm_kernels.attention import spoiled_keys, spoiled_rows, triton_backend

pytestmark = [
    pytest.mark.skipif(OBSTACLE is not None, reason=f"Triton's interpreter: {OBSTACLE}"),
    # zero times infinity is what it is about
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

FUTURE = [
    (Case(4, 4), INF),
    (Case(4, 4, own=False), NAN),
    (Case(4, 5, offset=1, own=False, H=2), 1e200),
    (Case(6, 6, 3, 3), NAN),
]


def spoil_the_future(case: Case, number: float):
    """(the problem, the same with such numbers in its second half, rows of the first half)."""
    middle = case.S // 2 // case.group * case.group
    task = problem(case)
    other = poisoned(task, slice(middle + case.offset, None), slice(middle, None), number)
    return task, other, slice(0, middle)


@pytest.mark.parametrize("case, number", FUTURE, ids=str)
def test_the_future_does_not_reach_a_row_of_its_tile(case, number):
    task, other, rows = spoil_the_future(case, number)
    assert_equal_at(task, other, rows, NOWHERE, triton_backend)


@pytest.mark.parametrize("own", [True, False], ids=["energy", "causal"])
@pytest.mark.parametrize("is_first", [True, False], ids=["earlier", "later"])
def test_documents_of_one_tile_do_not_reach_each_other(own, is_first):
    """Neither their rows nor the gradients of their keys."""
    task = problem(Case(5, 5, own=own, first="window"))
    task = task._replace(first_visible=torch.tensor([[0, 0, 0, 3, 3]], dtype=torch.int32))
    bad, good = slice(0, 3), slice(3, 5)
    if not is_first:
        bad, good = good, bad
    assert_equal_at(task, poisoned(task, bad, bad), good, good, triton_backend)


def test_what_a_row_sees_is_infinite_for_it():
    """Nothing is hidden that should be seen: the same results are finite as in the reference."""
    _, other, _ = spoil_the_future(Case(4, 4), INF)
    right = other.levels(reference)
    for level, results in other.levels(triton_backend).items():
        for mine, exact in zip(results, right[level]):
            assert mine is not None and exact is not None
            assert not mine.isfinite().all()
            assert torch.equal(mine.isfinite(), exact.isfinite()), level


@pytest.mark.parametrize("module", ["spoiled_rows", "spoiled_keys"])
def test_without_a_second_look_the_same_comparisons_fail(module, monkeypatch):
    of = {"spoiled_rows": spoiled_rows, "spoiled_keys": spoiled_keys}[module]
    monkeypatch.setattr(of, "is_spoiled", lambda *_: False)
    if of is spoiled_rows:
        task, other, rows = spoil_the_future(Case(4, 4, own=False), INF)
        with pytest.raises(AssertionError):
            assert_equal_at(task, other, rows, NOWHERE, triton_backend)
        return
    task = problem(Case(5, 5, own=False, first="window"))
    task = task._replace(first_visible=torch.tensor([[0, 0, 0, 3, 3]], dtype=torch.int32))
    bad, good = slice(3, 5), slice(0, 3)
    with pytest.raises(AssertionError):
        assert_equal_at(task, poisoned(task, bad, bad), good, good, triton_backend)
