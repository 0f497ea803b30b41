"""Epochs and tokens per source of a mixture: kept to the sample, and the order stays pure."""

import shutil

import numpy as np
import pytest

from ebwm_scale.config.load import config_from_dict
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.data.loading.budgets import MIX_LENGTH, phases_of, shares
from ebwm_scale.data.loading.mixture import MixedOrder, open_sources
from ebwm_scale.data.order import SampleOrder
from ebwm_scale.training.preflight import limit_sources

SIZES = (5000, 900, 300)
WEIGHTS = (7, 2, 1)


def order_of(limits, weights=WEIGHTS):
    orders = [SampleOrder([n], seed=5, window_shards=1, source=i) for i, n in enumerate(SIZES)]
    first_ids = [0, *np.cumsum(SIZES)[:-1].tolist()]
    return MixedOrder(orders, first_ids, phases_of(weights, limits), seed=5)


def counted(ids):
    """Samples of each source."""
    return np.histogram(ids, bins=[0, *np.cumsum(SIZES)])[0].tolist()


@pytest.mark.parametrize(
    "limits",
    [(None, 900, None), (None, 1350, 300), (6000, 900, 150), (None, 1, 2), (4000, None, 1)],
)
def test_every_source_gives_its_budget_and_no_more(limits):
    order = order_of(limits)
    count = 40 * MIX_LENGTH
    if all(limit is not None for limit in limits):
        count = order.phases.num_positions
        assert sum(limits) - MIX_LENGTH < count <= sum(limits)
    ids = order.samples(0, count)
    given = counted(ids)
    for k, limit in enumerate(limits):
        if limit is not None:
            low = limit if None in limits else limit - MIX_LENGTH
            assert low <= given[k] <= limit
    # in whole epochs: every sample of a limited source as often as any other, up to one
    for k, limit in enumerate(limits):
        if limit is not None and given[k]:
            first = sum(SIZES[:k])
            times = np.bincount(ids[(ids >= first) & (ids < first + SIZES[k])] - first)
            assert times.max() <= -(-limit // SIZES[k])


def test_the_order_is_the_same_from_any_position_on():
    order, again = order_of((None, 1350, 300)), order_of((None, 1350, 300))
    whole = order.samples(0, 20 * MIX_LENGTH)
    for start in (0, 1, 1023, 3000, 7777):
        np.testing.assert_array_equal(again.samples(start, 5000), whole[start : start + 5000])


def test_those_that_are_left_share_by_their_weights():
    order = order_of((None, 900, None))
    late = counted(order.samples(30 * MIX_LENGTH, 10 * MIX_LENGTH))
    assert late == [10 * count for count in (shares([7, 1])[0], 0, shares([7, 1])[1])]


def test_without_limits_the_order_is_what_it_was():
    """The formula of before: the j-th of source k in block i is position i n_k + j of its order."""
    order = order_of((None, None, None))
    assert len(order.phases.phases) == 1
    counts = shares(WEIGHTS)
    ids = order.samples(3 * MIX_LENGTH, MIX_LENGTH)
    for k, share in enumerate(counts):
        first = sum(SIZES[:k])
        mine = ids[(ids >= first) & (ids < first + SIZES[k])] - first
        np.testing.assert_array_equal(mine, order.orders[k].samples(3 * share, share))


def test_the_check_notices_a_source_that_is_not_held_back():
    free = counted(order_of((None, None, None)).samples(0, 40 * MIX_LENGTH))
    assert free[1] > 900


@pytest.fixture
def two(pristine, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(pristine.parent, other)
    return [pristine, other / "manifest.json"]


def config(two, budgets, steps=10):
    sources = [{"manifest": str(path), "weight": 1, **budget} for path, budget in zip(two, budgets)]
    return config_from_dict(
        {
            "data": {"sources": sources, "context_length": 16},
            "train": {"max_steps": steps, "global_batch_size": 128},
        }
    )


def test_budgets_of_a_run_are_held_against_its_length(two):
    mixed = open_sources([(path, 1) for path in two], "train", verify="sizes")
    before = mixed.fingerprint
    limit_sources(config(two, [{}, {"epochs": 1.5, "tokens": 16 * 40}]), mixed)
    assert mixed.limits == [None, 40] and mixed.fingerprint != before
    size = len(mixed.parts[0])
    limited = [{"epochs": 2}, {"epochs": 0.5}]
    total = (2 * size + size // 2) // MIX_LENGTH * MIX_LENGTH
    with pytest.raises(ConfigError, match=f"last for {total:,} samples.*takes 1,280"):
        limit_sources(config(two, limited), mixed)
    single = open_sources([(two[0], 1)], "train", verify="sizes")
    with pytest.raises(ConfigError, match=f"last for {size:,} samples"):
        limit_sources(config(two[:1], [{"epochs": 1}]), single)
