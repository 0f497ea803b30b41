"""Random numbers are a function of their address, and have the distribution they claim."""

import math

import numpy as np
import pytest
import torch

from ebwm_scale.refinement.noise import NoiseSource, Purpose, _normal, _Stream, _words

SOURCE = NoiseSource(33, 7)
SAMPLES = torch.tensor([5, 11, 2**40])


def draw(
    *,
    source=SOURCE,
    samples=SAMPLES,
    num_positions=6,
    size=37,
    purpose=Purpose.INITIAL_STATE,
    **options,
):
    return source.normal(samples, num_positions, size, purpose=purpose, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 2, 15, 16, 33, 257, 2048, 5001])
def test_a_row_is_the_same_bits_however_the_batch_is_split(dtype, size):
    whole = draw(size=size, dtype=dtype)
    assert whole.shape == (3, 6, size) and whole.dtype == dtype
    for b in range(3):
        for first, count in ((0, 6), (0, 1), (1, 3), (5, 1)):
            part = draw(
                samples=SAMPLES[b : b + 1],
                num_positions=count,
                first_position=first,
                size=size,
                dtype=dtype,
            )
            assert torch.equal(part[0], whole[b, first : first + count])


@pytest.mark.parametrize("size", [37, 2048, 70000])
def test_a_row_is_the_same_bits_with_any_number_of_threads_and_wherever_it_lies_in_memory(size):
    before = torch.get_num_threads()
    try:
        rows = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            rows.append(draw(samples=SAMPLES[:1], num_positions=2, size=size))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*rows)
    stream = _Stream(SOURCE.seed, SOURCE.step)
    for shift in range(1, 17):  # another alignment
        moved = np.empty(size + shift, np.float32)[shift:]
        _normal(stream.seek(0, 1, 5, int(Purpose.INITIAL_STATE)), moved)
        assert np.array_equal(moved, rows[0][0, 1].numpy())


def test_a_moved_stream_equals_a_new_generator_at_the_address():
    stream = _Stream(33, 7)
    for counter, count in (
        ((0, 1, 2, 3), 5),
        ((0, 9, 2, 3), 1),
        ((0, 1, 2, 3), 8),
        ((0, 2**63, 2**64 - 1, 0), 3),
    ):
        fresh = np.random.Philox(key=_words(33, 7), counter=_words(*counter)).random_raw(count)
        assert np.array_equal(stream.seek(*counter).random_raw(count), fresh)


def test_every_part_of_the_address_changes_the_numbers():
    rows = [
        draw(),
        draw(source=NoiseSource(34, 7)),
        draw(source=NoiseSource(33, 8)),
        draw(samples=SAMPLES + 1),
        draw(first_position=6),
        draw(purpose=Purpose.LANGEVIN),
        draw(purpose=Purpose.LANGEVIN + 1),
    ]
    numbers = torch.cat([row.flatten() for row in rows])
    assert len(numbers.unique()) > 0.999 * len(numbers)
    correlation = torch.corrcoef(torch.cat([row.flatten(0, 1) for row in rows]))
    assert (
        correlation - torch.eye(len(correlation))
    ).abs().max() < 0.9  # of 37 numbers each: 0.65 is usual, 1 is a repeated row


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [501, 32000])
def test_normal_numbers_have_the_normal_distribution(dtype, size):
    x = (
        draw(
            samples=torch.arange(4), num_positions=4 if size > 1000 else 256, size=size, dtype=dtype
        )
        .flatten()
        .double()
    )
    n = len(x)
    assert x.isfinite().all() and 4 < x.abs().max() < 7
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - moment) < 5 * math.sqrt(variance / n)
    ordered, ranks = x.sort().values, torch.arange(1, n + 1, dtype=torch.float64) / n
    assert (torch.special.ndtr(ordered) - ranks).abs().max() < 1.95 / math.sqrt(
        n
    )  # Kolmogorov, p = 0.001


def test_halves_of_a_row_are_independent():
    """Radius and angle come from the two halves of the bits: neither the numbers nor their
    magnitudes may be related.
    """
    first, second = draw(samples=torch.arange(4), num_positions=16, size=4000).double().chunk(2, -1)
    for f in (lambda u: u, torch.abs, torch.square):
        a, b = f(first).flatten(), f(second).flatten()
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 5 / math.sqrt(len(a))


def test_an_odd_row_and_other_precisions():
    assert draw(size=1).shape == (3, 6, 1)
    assert torch.equal(draw(dtype=torch.bfloat16), draw().bfloat16())
    assert not torch.equal(
        draw(dtype=torch.float64).float(), draw()
    )  # another construction from the same stream: no promise


def test_uniform_numbers_are_in_range_and_addressed_by_the_sample():
    u = SOURCE.uniform(SAMPLES, 5000, purpose=Purpose.STEP_SIZE, dtype=torch.float64)
    assert u.shape == (3, 5000, 1) and 0 <= u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 5 / math.sqrt(12 * u.numel())
    assert torch.equal(
        SOURCE.uniform(SAMPLES[1:2], 5000, purpose=Purpose.STEP_SIZE, dtype=torch.float64)[0], u[1]
    )
    assert torch.equal(
        SOURCE.uniform(SAMPLES, 7, purpose=Purpose.STEP_SIZE, dtype=torch.float64), u[:, :7]
    )
    others = [
        NoiseSource(33, 8).uniform(SAMPLES, 5000, purpose=Purpose.STEP_SIZE),
        SOURCE.uniform(SAMPLES, 5000, purpose=Purpose.REPLAY),
    ]
    assert all(not torch.equal(u.float(), other) for other in others)


def test_integers_cover_their_range_and_depend_on_seed_step_purpose_and_index():
    draws = [NoiseSource(33, step).integer(2, 4, purpose=Purpose.NUM_STEPS) for step in range(300)]
    assert set(draws) == {2, 3, 4} and draws == [
        NoiseSource(33, step).integer(2, 4, purpose=Purpose.NUM_STEPS) for step in range(300)
    ]
    big = 2**40
    numbers = {
        SOURCE.integer(0, big, purpose=Purpose.REPLAY),
        SOURCE.integer(0, big, purpose=Purpose.REPLAY, index=1),
        SOURCE.integer(0, big, purpose=Purpose.NUM_STEPS),
        NoiseSource(34, 7).integer(0, big, purpose=Purpose.REPLAY),
        NoiseSource(33, 8).integer(0, big, purpose=Purpose.REPLAY),
    }
    assert len(numbers) == 5


def test_drawing_leaves_the_global_generators_alone():
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    (
        draw(),
        SOURCE.uniform(SAMPLES, 3, purpose=Purpose.STEP_SIZE),
        SOURCE.integer(0, 3, purpose=Purpose.REPLAY),
    )
    assert torch.equal(state, torch.get_rng_state()) and np.array_equal(
        numpy_state, np.random.get_state()[1]
    )
