import json
import shutil

import numpy as np
import pytest

from ebwm_scale.core.errors import ConfigError
from ebwm_scale.core.files import file_sha256
from ebwm_scale.data.loading.budgets import MIX_LENGTH, phases_of, shares
from ebwm_scale.data.loading.mixture import MixedOrder, open_sources
from ebwm_scale.data.order import SampleOrder

SIZES = ([30, 30, 17], [9], [200, 100])
FIRST = [0, 77, 86]


def mixture(weights, seed=5):
    orders = [
        SampleOrder(sizes, seed=seed, window_shards=2, source=i) for i, sizes in enumerate(SIZES)
    ]
    return MixedOrder(orders, FIRST, phases_of(weights, [None] * len(weights)), seed=seed)


def sources_of(ids):
    return np.searchsorted(FIRST, ids, side="right") - 1


def test_each_source_has_its_share_of_every_block():
    order = mixture([0.7, 0.05, 0.25])
    for block in range(5):
        counts = np.bincount(sources_of(order.samples(block * MIX_LENGTH, MIX_LENGTH)), minlength=3)
        assert counts.tolist() == shares([0.7, 0.05, 0.25]) == [717, 51, 256]


def test_each_source_walks_through_its_own_order_so_every_sample_once_per_epoch_of_it():
    order = mixture([0.7, 0.05, 0.25])
    ids = order.samples(0, 4 * MIX_LENGTH)
    for source, sizes in enumerate(SIZES):
        mine = ids[sources_of(ids) == source] - FIRST[source]
        assert (
            mine.tolist()
            == SampleOrder(sizes, seed=5, window_shards=2, source=source)
            .samples(0, len(mine))
            .tolist()
        )
        size = sum(sizes)
        for epoch in range(len(mine) // size):
            assert sorted(mine[epoch * size : (epoch + 1) * size]) == list(range(size))


@pytest.mark.parametrize("start, count", [(0, 1), (1000, 50), (1023, 2), (3000, 2500), (10**9, 5)])
def test_a_mixture_is_a_pure_function_of_the_position(start, count):
    piecewise = mixture([1, 2, 3])
    expected = [piecewise.sample(p) for p in range(start, start + count)]
    assert mixture([1, 2, 3]).samples(start, count).tolist() == expected


@pytest.mark.parametrize("weights", [[1], [1, 1], [1, 1e-9], [3, 2, 2], [1e-9] * 1000 + [1.0]])
def test_shares_fill_a_block_and_leave_no_source_out(weights):
    counts = shares(weights)
    assert sum(counts) == MIX_LENGTH and min(counts) >= 1
    if len(weights) < 10:
        exact = np.array(weights) / sum(weights) * MIX_LENGTH
        assert all(abs(c - e) <= 1 for c, e in zip(counts, exact))


def test_sources_of_a_mixture_are_permuted_independently():
    first, second = (
        SampleOrder([100], seed=5, window_shards=1, source=i).samples(0, 100) for i in (0, 1)
    )
    assert not np.array_equal(first, second)


def test_a_mixed_dataset_reads_both_and_knows_itself(pristine, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(pristine.parent, other)
    values = json.loads((other / "manifest.json").read_text())
    values["source"]["inputs"] = ["elsewhere"]
    (other / "manifest.json").write_text(json.dumps(values))
    mixed = open_sources([(pristine, 3), (other / "manifest.json", 1)], "train", verify="sizes")
    single = open_sources([(pristine, 3)], "train", verify="sizes")
    size = len(single)
    assert len(mixed) == 2 * size and mixed.read(size + 7).tolist() == single.read(7).tolist()
    assert mixed.fingerprint != single.fingerprint
    assert (
        mixed.fingerprint
        != open_sources(
            [(pristine, 1), (other / "manifest.json", 1)], "train", verify="sizes"
        ).fingerprint
    )
    assert mixed.after(size - 1) == 0 and mixed.after_shard_of(2 * size - 1) == size
    assert sorted(mixed.evaluated(8).tolist()) == [0, 1, 2, 3, 4, 5, size, size + 1]


def test_sources_that_do_not_fit_each_other_are_refused(pristine, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(pristine.parent, other)
    values = json.loads((other / "manifest.json").read_text())
    (other / "tokenizer.model").write_bytes(b"another")
    values["tokenizer"]["sha256"] = file_sha256(other / "tokenizer.model")
    (other / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="differ in tokenizer"):
        open_sources([(pristine, 1), (other / "manifest.json", 1)], "train", verify="sizes")
