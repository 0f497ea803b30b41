import numpy as np
import pytest

from ebwm_scale.data.order import SampleOrder

SIZES = [7, 3, 11, 1, 8, 8, 2]
TOTAL = sum(SIZES)
GOLDEN = [14, 19, 20, 13, 38, 17, 12, 39, 10, 18, 11, 16]  # of order() below


def order(seed=3, window_shards=2, sizes=SIZES):
    return SampleOrder(sizes, seed=seed, window_shards=window_shards)


@pytest.mark.parametrize("window_shards", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("epoch", [0, 1, 5, 10**9])
def test_every_sample_once_per_epoch(window_shards, epoch):
    ids = order(window_shards=window_shards).samples(epoch * TOTAL, TOTAL)
    assert ids.dtype == np.int64 and sorted(ids) == list(range(TOTAL))


def test_order_is_a_pure_function_of_the_position():
    stream = order().samples(0, 4 * TOTAL)
    fresh = order()
    for position in [
        4 * TOTAL - 1,
        0,
        57,
        56,
        TOTAL,
        TOTAL - 1,
        2 * TOTAL + 3,
    ]:  # jumping about changes nothing
        assert fresh.sample(position) == stream[position] == order().sample(position)
    for start, count in [(0, 0), (5, 9), (TOTAL - 2, 5), (1, 3 * TOTAL)]:
        assert np.array_equal(fresh.samples(start, count), stream[start : start + count])


def test_epochs_and_seeds_and_windows_differ():
    first, second = order().samples(0, TOTAL), order().samples(TOTAL, TOTAL)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, order(seed=4).samples(0, TOTAL))
    assert not np.array_equal(first, np.arange(TOTAL))
    equal = SampleOrder([50, 50], seed=3, window_shards=1).samples(0, 100)
    assert not np.array_equal(equal[:50] % 50, equal[50:] % 50)
    one_shard = SampleOrder([50], seed=3, window_shards=1).samples(0, 100)
    assert not np.array_equal(
        one_shard[:50], one_shard[50:]
    )  # not only the shards: the samples inside a window differ too


def test_samples_stay_in_their_window_of_shards():
    shard_of = np.repeat(np.arange(len(SIZES)), SIZES)
    shards = shard_of[order(window_shards=2).samples(0, TOTAL)]
    position, windows = 0, []
    while position < TOTAL:
        first = list(dict.fromkeys(shards[position:]))[:2]
        size = sum(SIZES[s] for s in first)
        windows.append(set(shards[position : position + size]))
        position += size
    assert [len(w) for w in windows] == [2, 2, 2, 1] and set().union(*windows) == set(range(7))


def test_order_never_changes_between_releases_and_machines():
    assert order().samples(0, 12).tolist() == GOLDEN, (
        "the order is part of the format: changing it breaks the resume of every run"
    )


def test_order_does_not_touch_the_global_generator():
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    order().samples(0, 3 * TOTAL)
    assert np.array_equal(before, np.random.get_state()[1])


@pytest.mark.parametrize(
    "arguments",
    [
        dict(sizes=[]),
        dict(sizes=[0, 0]),
        dict(sizes=[3, -1]),
        dict(seed=-1),
        dict(seed=2**64),
        dict(window_shards=0),
    ],
)
def test_impossible_arguments_are_refused(arguments):
    with pytest.raises(ValueError):
        order(**arguments)
    with pytest.raises(ValueError):
        order().samples(-1, 3)
