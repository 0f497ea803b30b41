"""The Triton kernels of a vocabulary's passes over states (rows, V): a program owns a row.

    _softmax_rows    x' = move [+ start], within clamps; move as given, or through the softmax
                     m, s = max and sum of exp(x' - m), in one reading
                     p' = exp(x' - m) / s, and what the products read of it, in a second one
                     loss of the row = (m + ln s - x'_y + z (m + ln s)^2) share
    _round_rows      p - onehot(y), rounded

and, for states that carry a graph, the gradients of softmax and loss:

    _softmax_gradient    p * (g - p.g), and what else arrives at x
    _state_gradient      r = (p - onehot(y)) share, and what else arrives at x'
    _step_gradient       r pulled back through clamps and softmax to move, start and given p

A move through the softmax is p * (u - p.u): a reading for p.u comes first, and the residual r is
pulled back to p * (slope r - p.(slope r)), whose sum is found beside m and s.

What they compute in plain code: formulas.py and softmax_cross_entropy.py of vocabulary/. A clamp
that binds has slope 0; NaN stays NaN.
"""

# Triton compiles the kernels: its annotations say otherwise, as in attention/row_tiles.py.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)  # below every state, and finite: its difference to itself is 0
SMALL = tl.constexpr(0.5)  # below it tanh is a quotient of polynomials, exact to 1e-13


@triton.jit
def tile_of_a_row(V: tl.constexpr, COLUMN_TILES: tl.constexpr, BC: tl.constexpr):
    """(row, columns (BC,), which of them there are) of this program, of COLUMN_TILES for a row."""
    tile = tl.program_id(0)
    row = (tile // COLUMN_TILES).to(tl.int64)
    column = (tile % COLUMN_TILES) * BC + tl.arange(0, BC)
    return row, column, column < V


@triton.jit
def _numbers(X, place, exists, ONE_NUMBER: tl.constexpr, ACC: tl.constexpr):
    """Some columns of a row; of a tensor that is one number, that number."""
    if ONE_NUMBER:
        return tl.where(exists, tl.load(X).to(ACC), 0.0)
    return tl.load(X + place, mask=exists, other=0.0).to(ACC)


@triton.jit
def _tanh(y):
    """Exact to rounding also near 0, where 1 - exp(-2y) cancels."""
    square = y * y
    above = 135135.0 + square * (17325.0 + square * (378.0 + square))
    below = 135135.0 + square * (62370.0 + square * (3150.0 + square * 28.0))
    decayed = tl.exp(-2.0 * tl.abs(y))
    large = (1.0 - decayed) / (1.0 + decayed)
    return tl.where(tl.abs(y) < SMALL, y * (above / below), tl.where(y < 0, -large, large))


@triton.jit
def _within(x, BOUND: tl.constexpr):
    """(x clamped, 1 where the bound does not bind)."""
    bound = tl.full(x.shape, BOUND, x.dtype)
    clamped = tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))
    return clamped, tl.where(tl.abs(x) <= bound, 1.0, 0.0)


@triton.jit
def _step(
    MOVE,
    START,
    GIVEN_P,
    mean,
    place,
    exists,
    HAS_START: tl.constexpr,
    ONE_NUMBER: tl.constexpr,
    THROUGH: tl.constexpr,
    ONE_P: tl.constexpr,
    CHANGE: tl.constexpr,
    BOUND: tl.constexpr,
    SOFT: tl.constexpr,
    ACC: tl.constexpr,
):
    """(x', its slope by start, its slope by the move behind the softmax) of some columns; x' is
    LOWEST where there are none.
    """
    x = tl.load(MOVE + place, mask=exists, other=0.0).to(ACC)
    slope = tl.full(x.shape, 1.0, ACC)
    free = slope
    if THROUGH:
        x = _numbers(GIVEN_P, place, exists, ONE_P, ACC) * (x - mean)
    if CHANGE > 0:
        x, free = _within(x, CHANGE)
    if HAS_START:
        x += _numbers(START, place, exists, ONE_NUMBER, ACC)
    if BOUND > 0:
        x, inside = _within(x, BOUND)
        slope *= inside
    if SOFT > 0:
        soft = tl.full(x.shape, SOFT, ACC)
        x = _tanh(x / soft)
        slope *= 1.0 - x * x
        x *= soft
    return tl.where(exists, x, LOWEST), slope, slope * free


@triton.jit
def _softmax_rows(
    MOVE,
    START,
    GIVEN_P,
    TARGET,
    SHARE,
    STATE,
    P,
    RESIDUAL,
    LOSS,
    Z_TERM,
    NORMALIZER,
    V: tl.constexpr,
    HAS_START: tl.constexpr,
    ONE_NUMBER: tl.constexpr,
    THROUGH: tl.constexpr,
    ONE_P: tl.constexpr,
    CHANGE: tl.constexpr,
    BOUND: tl.constexpr,
    SOFT: tl.constexpr,
    Z_WEIGHT: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    KEEP_STATE: tl.constexpr,
    KEEP_P: tl.constexpr,
    KEEP_RESIDUAL: tl.constexpr,
    KEEP_NORMALIZER: tl.constexpr,
    SCALED: tl.constexpr,
    ACC: tl.constexpr,
    BC: tl.constexpr,
):
    """RESIDUAL: p' - onehot(y), or p' without targets; with SCALED the gradient of the row's loss
    by the move that was given. A bound that is 0 is none. NORMALIZER: m
    and s, (rows, 2): in m + ln s they would share a rounding.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BC)
    mean = 0.0
    if THROUGH:
        sums = tl.zeros([BC], ACC)
        for start in range(0, V, BC):
            exists = start + column < V
            place = row * V + start + column
            u = tl.load(MOVE + place, mask=exists, other=0.0).to(ACC)
            sums += _numbers(GIVEN_P, place, exists, ONE_P, ACC) * u
        mean = tl.sum(sums, 0)
    largest = tl.full([BC], LOWEST, ACC)
    total = tl.zeros([BC], ACC)
    of_target = tl.zeros([BC], ACC)
    pulled = tl.zeros([BC], ACC)
    pulled_target = tl.zeros([BC], ACC)
    target = -1
    if HAS_TARGET:
        target = tl.load(TARGET + row).to(tl.int32)
    for start in range(0, V, BC):
        exists = start + column < V
        place = row * V + start + column
        x, _, slope = _step(
            MOVE, START, GIVEN_P, mean, place, exists, HAS_START, ONE_NUMBER, THROUGH, ONE_P,
            CHANGE, BOUND, SOFT, ACC,
        )  # fmt: skip
        if KEEP_STATE:
            tl.store(STATE + place, x.to(STATE.dtype.element_ty), mask=exists)
        # each lane has a maximum and a sum of its own: they meet behind the loop
        higher = tl.maximum(largest, x)
        now = tl.where(exists, tl.exp(x - higher), 0.0)
        rescaled = tl.exp(largest - higher)
        total = total * rescaled + now
        largest = higher
        if HAS_TARGET:
            of_target += tl.where(start + column == target, x, 0.0)
        if THROUGH and KEEP_RESIDUAL:
            weighted = _numbers(GIVEN_P, place, exists, ONE_P, ACC) * slope
            pulled = pulled * rescaled + weighted * now
            pulled_target += tl.where(start + column == target, weighted, 0.0)
    m = tl.max(largest, 0)
    to_common = tl.exp(largest - m)
    s = tl.sum(total * to_common, 0)
    normalizer = m + tl.log(s)
    if KEEP_NORMALIZER:
        tl.store(NORMALIZER + 2 * row, m)
        tl.store(NORMALIZER + 2 * row + 1, s)
    share = 1.0
    steepness = 1.0
    if HAS_TARGET:
        row_share = tl.load(SHARE + row).to(ACC)
        loss = (normalizer - tl.sum(of_target, 0)) * row_share
        if Z_WEIGHT > 0:
            z = tl.full([], Z_WEIGHT, ACC)
            z_term = z * normalizer * normalizer * row_share
            tl.store(Z_TERM + row, z_term)
            loss += z_term
            steepness += 2.0 * z * normalizer
        tl.store(LOSS + row, loss)
        if SCALED:
            share = row_share
    if KEEP_P or KEEP_RESIDUAL:
        pull = tl.sum(pulled * to_common, 0) / s * steepness - tl.sum(pulled_target, 0)
        for start in range(0, V, BC):
            exists = start + column < V
            place = row * V + start + column
            x, _, slope = _step(
                MOVE, START, GIVEN_P, mean, place, exists, HAS_START, ONE_NUMBER, THROUGH, ONE_P,
                CHANGE, BOUND, SOFT, ACC,
            )  # fmt: skip
            p = tl.exp(x - m) / s
            if KEEP_RESIDUAL:
                residual = p * steepness
                residual = tl.where(start + column == target, residual - 1.0, residual) * slope
                if THROUGH:
                    before = _numbers(GIVEN_P, place, exists, ONE_P, ACC)
                    residual = before * (residual - pull)
                residual *= share
                tl.store(RESIDUAL + place, residual.to(RESIDUAL.dtype.element_ty), mask=exists)
            if KEEP_P:
                tl.store(P + place, p.to(P.dtype.element_ty), mask=exists)


@triton.jit
def _round_rows(
    P,
    TARGET,
    RESIDUAL,
    V: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    BC: tl.constexpr,
):
    """p - onehot(y), rounded after the subtraction."""
    row, column, exists = tile_of_a_row(V, COLUMN_TILES, BC)
    p = tl.load(P + row * V + column, mask=exists, other=0.0)
    target = tl.load(TARGET + row).to(tl.int32)
    residual = tl.where(column == target, p - 1.0, p)
    tl.store(RESIDUAL + row * V + column, residual.to(RESIDUAL.dtype.element_ty), mask=exists)


@triton.jit
def _softmax_gradient(
    X,
    NORMALIZER,
    OF_EMBEDDED,
    OF_P,
    OF_X,
    DX,
    V: tl.constexpr,
    HAS_EMBEDDED: tl.constexpr,
    HAS_P: tl.constexpr,
    HAS_X: tl.constexpr,
    ACC: tl.constexpr,
    BC: tl.constexpr,
):
    """dx = p * (g - p.g) + OF_X of a row, p = softmax(x), g = OF_EMBEDDED + OF_P."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BC)
    m = tl.load(NORMALIZER + 2 * row).to(ACC)
    s = tl.load(NORMALIZER + 2 * row + 1).to(ACC)
    sums = tl.zeros([BC], ACC)
    for start in range(0, V, BC):
        exists = start + column < V
        place = row * V + start + column
        p, g = _pulled(
            X, m, s, OF_EMBEDDED, OF_P, place, exists, HAS_EMBEDDED, HAS_P, ACC
        )  # fmt: skip
        sums += p * g
    mean = tl.sum(sums, 0)
    for start in range(0, V, BC):
        exists = start + column < V
        place = row * V + start + column
        p, g = _pulled(
            X, m, s, OF_EMBEDDED, OF_P, place, exists, HAS_EMBEDDED, HAS_P, ACC
        )  # fmt: skip
        dx = p * (g - mean)
        if HAS_X:
            dx += tl.load(OF_X + place, mask=exists, other=0.0).to(ACC)
        tl.store(DX + place, dx.to(DX.dtype.element_ty), mask=exists)


@triton.jit
def _pulled(
    X,
    m,
    s,
    OF_EMBEDDED,
    OF_P,
    place,
    exists,
    HAS_EMBEDDED: tl.constexpr,
    HAS_P: tl.constexpr,
    ACC: tl.constexpr,
):
    """(p, its cotangent) of some columns; p is 0 where there are none."""
    x = tl.load(X + place, mask=exists, other=LOWEST).to(ACC)
    g = tl.zeros(x.shape, ACC)
    if HAS_EMBEDDED:
        g += tl.load(OF_EMBEDDED + place, mask=exists, other=0.0).to(ACC)
    if HAS_P:
        g += tl.load(OF_P + place, mask=exists, other=0.0).to(ACC)
    return tl.exp(x - m) / s, g


@triton.jit
def _state_gradient(
    X,
    NORMALIZER,
    TARGET,
    SHARE,
    OF_LOSS,
    OF_X,
    DX,
    ROUNDED,
    V: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    Z_WEIGHT: tl.constexpr,
    HAS_X: tl.constexpr,
    KEEP_DX: tl.constexpr,
    KEEP_ROUNDED: tl.constexpr,
    ACC: tl.constexpr,
    BC: tl.constexpr,
):
    """(p (1 + 2 z lnZ) - onehot(y)) share OF_LOSS + OF_X, in two precisions."""
    row, column, exists = tile_of_a_row(V, COLUMN_TILES, BC)
    place = row * V + column
    m = tl.load(NORMALIZER + 2 * row).to(ACC)
    s = tl.load(NORMALIZER + 2 * row + 1).to(ACC)
    target = tl.load(TARGET + row).to(tl.int32)
    share = tl.load(SHARE + row).to(ACC) * tl.load(OF_LOSS).to(ACC)
    x = tl.load(X + place, mask=exists, other=LOWEST).to(ACC)
    dx = _arriving(
        x, m, s, share, column == target, OF_X, place, exists, Z_WEIGHT, True, HAS_X, ACC
    )  # fmt: skip
    if KEEP_DX:
        tl.store(DX + place, dx.to(DX.dtype.element_ty), mask=exists)
    if KEEP_ROUNDED:
        tl.store(ROUNDED + place, dx.to(ROUNDED.dtype.element_ty), mask=exists)


@triton.jit
def _step_gradient(
    MOVE,
    START,
    GIVEN_P,
    NORMALIZER,
    TARGET,
    SHARE,
    OF_LOSS,
    OF_STATE,
    OF_MOVE,
    OF_START,
    OF_P,
    V: tl.constexpr,
    HAS_START: tl.constexpr,
    ONE_NUMBER: tl.constexpr,
    THROUGH: tl.constexpr,
    ONE_P: tl.constexpr,
    CHANGE: tl.constexpr,
    BOUND: tl.constexpr,
    SOFT: tl.constexpr,
    Z_WEIGHT: tl.constexpr,
    HAS_LOSS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    KEEP_START: tl.constexpr,
    KEEP_P: tl.constexpr,
    ACC: tl.constexpr,
    BC: tl.constexpr,
):
    """The gradients of a step's move u as it was given, of its start and of the given p.

    r arrives at x', and g = slope r at the move behind the softmax, v = p * (u - p.u). Of u it is
    p * (g - p.g), of p (u - p.u) * g - (p.g) u. Slopes are found again from what the step read.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BC)
    m = 0.0
    s = 1.0
    share = 0.0
    target = -1
    if HAS_LOSS:
        m = tl.load(NORMALIZER + 2 * row).to(ACC)
        s = tl.load(NORMALIZER + 2 * row + 1).to(ACC)
        share = tl.load(SHARE + row).to(ACC) * tl.load(OF_LOSS).to(ACC)
        target = tl.load(TARGET + row).to(tl.int32)
    mean = 0.0
    pull = 0.0
    if THROUGH:
        sums = tl.zeros([BC], ACC)
        for start in range(0, V, BC):
            exists = start + column < V
            place = row * V + start + column
            u = tl.load(MOVE + place, mask=exists, other=0.0).to(ACC)
            sums += _numbers(GIVEN_P, place, exists, ONE_P, ACC) * u
        mean = tl.sum(sums, 0)
        sums = tl.zeros([BC], ACC)
        for start in range(0, V, BC):
            exists = start + column < V
            place = row * V + start + column
            _, g = _of_step(
                MOVE, START, GIVEN_P, OF_STATE, mean, m, s, share, start + column == target,
                place, exists, HAS_START, ONE_NUMBER, THROUGH, ONE_P, CHANGE, BOUND, SOFT,
                Z_WEIGHT, HAS_LOSS, HAS_STATE, ACC,
            )  # fmt: skip
            sums += _numbers(GIVEN_P, place, exists, ONE_P, ACC) * g
        pull = tl.sum(sums, 0)
    for start in range(0, V, BC):
        exists = start + column < V
        place = row * V + start + column
        of_start, g = _of_step(
            MOVE, START, GIVEN_P, OF_STATE, mean, m, s, share, start + column == target,
            place, exists, HAS_START, ONE_NUMBER, THROUGH, ONE_P, CHANGE, BOUND, SOFT,
            Z_WEIGHT, HAS_LOSS, HAS_STATE, ACC,
        )  # fmt: skip
        if KEEP_START:
            tl.store(OF_START + place, of_start.to(OF_START.dtype.element_ty), mask=exists)
        if KEEP_P:
            u = tl.load(MOVE + place, mask=exists, other=0.0).to(ACC)
            of_p = (u - mean) * g - pull * u
            tl.store(OF_P + place, of_p.to(OF_P.dtype.element_ty), mask=exists)
        if THROUGH:
            g = _numbers(GIVEN_P, place, exists, ONE_P, ACC) * (g - pull)
        tl.store(OF_MOVE + place, g.to(OF_MOVE.dtype.element_ty), mask=exists)


@triton.jit
def _of_step(
    MOVE,
    START,
    GIVEN_P,
    OF_STATE,
    mean,
    m,
    s,
    share,
    is_target,
    place,
    exists,
    HAS_START: tl.constexpr,
    ONE_NUMBER: tl.constexpr,
    THROUGH: tl.constexpr,
    ONE_P: tl.constexpr,
    CHANGE: tl.constexpr,
    BOUND: tl.constexpr,
    SOFT: tl.constexpr,
    Z_WEIGHT: tl.constexpr,
    HAS_LOSS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    ACC: tl.constexpr,
):
    """r with the slopes of some columns: (at start, at the move behind the softmax)."""
    x, of_start, of_move = _step(
        MOVE, START, GIVEN_P, mean, place, exists, HAS_START, ONE_NUMBER, THROUGH, ONE_P,
        CHANGE, BOUND, SOFT, ACC,
    )  # fmt: skip
    r = _arriving(
        x, m, s, share, is_target, OF_STATE, place, exists, Z_WEIGHT, HAS_LOSS, HAS_STATE, ACC
    )  # fmt: skip
    return of_start * r, of_move * r


@triton.jit
def _arriving(
    x,
    m,
    s,
    share,
    is_target,
    OF_STATE,
    place,
    exists,
    Z_WEIGHT: tl.constexpr,
    HAS_LOSS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    ACC: tl.constexpr,
):
    """What arrives at x' in some columns: the loss's gradient, and what the next step adds."""
    r = tl.zeros(x.shape, ACC)
    if HAS_LOSS:
        r = tl.exp(x - m) / s
        if Z_WEIGHT > 0:
            r *= 1.0 + 2.0 * tl.full([], Z_WEIGHT, ACC) * (m + tl.log(s))
        r = tl.where(is_target, r - 1.0, r) * share
    if HAS_STATE:
        r += tl.load(OF_STATE + place, mask=exists, other=0.0).to(ACC)
    return r
