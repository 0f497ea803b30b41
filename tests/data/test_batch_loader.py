import itertools
import json
import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from corpora import CONTEXT_LENGTH

from ebwm_scale.core.errors import CheckpointError, DataError
from ebwm_scale.data.format.shards import open_split
from ebwm_scale.data.loading.batches import BatchLoader, DataState, validation_batches
from ebwm_scale.data.order import SampleOrder

GLOBAL, SEED, STEPS = 24, 33, 30  # 30 steps x 24 samples: more than an epoch


@pytest.fixture(scope="module")
def split(pristine):
    return open_split(pristine, "train", verify="hashes")


def loader(split, **changes):
    return BatchLoader(
        split,
        **{
            **dict(
                context_length=CONTEXT_LENGTH,
                global_batch_size=GLOBAL,
                micro_batch_size=1,
                rank=0,
                world_size=1,
                seed=SEED,
                window_shards=2,
                num_workers=0,
            ),
            **changes,
        },
    )


def steps_of(split, *, world_size=1, micro=1, num_workers=0, first_step=0, count=STEPS):
    """[(tokens, sample ids, positions)] per step, the ranks put together in order."""
    per_rank = []
    for rank in range(world_size):
        batches = loader(
            split,
            rank=rank,
            world_size=world_size,
            micro_batch_size=micro,
            num_workers=num_workers,
            first_step=first_step,
        )
        taken = list(itertools.islice(batches, count * batches.micro_batches_per_step))
        assert all(b.sequences.shape == (micro, CONTEXT_LENGTH + 1) for b in taken)
        joined = [
            torch.cat([getattr(b, f) for b in taken]).view(count, GLOBAL // world_size, -1)
            for f in ("sequences", "sample_ids", "positions")
        ]
        per_rank.append(joined)
        batches.close()
    return [torch.cat([r[i] for r in per_rank], dim=1) for i in range(3)]


@pytest.fixture(scope="module")
def reference(split):
    return steps_of(split)


def test_batches_follow_the_order_and_hold_the_samples(split, reference):
    tokens, ids, positions = reference
    assert positions.flatten().tolist() == list(range(STEPS * GLOBAL)) and STEPS * GLOBAL > len(
        split
    )
    assert (
        ids.flatten().tolist()
        == SampleOrder(split.samples_per_shard, seed=SEED, window_shards=2)
        .samples(0, STEPS * GLOBAL)
        .tolist()
    )
    assert tokens.dtype == ids.dtype == positions.dtype == torch.int64
    for row, sample in zip(tokens.flatten(0, 1).tolist(), ids.flatten().tolist()):
        assert row == split.read(sample).tolist()


@pytest.mark.parametrize(
    "world_size, micro",
    [
        *((1, 24), (1, 6), (2, 12), (2, 3), (3, 4), (4, 2), (8, 3)),
        pytest.param(24, 1, marks=pytest.mark.soak),
    ],
)
def test_world_size_and_accumulation_only_cut_the_global_batch(split, reference, world_size, micro):
    assert all(
        torch.equal(a, b)
        for a, b in zip(steps_of(split, world_size=world_size, micro=micro), reference)
    )


@pytest.mark.parametrize("size", [8, pytest.param(32, marks=pytest.mark.soak)])
def test_many_ranks_take_the_batches_of_one(split, size):
    def positions_and_ids(world_size):
        loaders = [
            loader(split, rank=rank, world_size=world_size, global_batch_size=96)
            for rank in range(world_size)
        ]
        batches = [[next(one) for _ in range(2 * one.micro_batches_per_step)] for one in loaders]
        half = 96 // world_size
        taken = sorted(
            (int(b.positions), int(b.sample_ids), tuple(b.sequences[0].tolist()))
            for rank in batches
            for b in rank
        )
        assert all(
            int(b.positions) // 96 == i // half for rank in batches for i, b in enumerate(rank)
        )
        return taken

    assert positions_and_ids(size) == positions_and_ids(1)


@pytest.mark.parametrize("num_workers", [1, 4])
@pytest.mark.multiprocess
def test_workers_never_change_a_batch(split, reference, num_workers):
    assert all(
        torch.equal(a, b)
        for a, b in zip(steps_of(split, micro=8, num_workers=num_workers), reference)
    )


@pytest.mark.parametrize("first_step", [1, 13, 28])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.multiprocess
def test_resume_from_any_step_gives_the_same_batches(split, reference, first_step, num_workers):
    resumed = steps_of(
        split,
        world_size=2,
        micro=6,
        first_step=first_step,
        count=STEPS - first_step,
        num_workers=num_workers,
    )
    assert all(torch.equal(a, b[first_step:]) for a, b in zip(resumed, reference))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.multiprocess
def test_loading_does_not_touch_any_global_generator(split, num_workers):
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    batches = loader(split, num_workers=num_workers)
    for _ in range(30):
        next(batches)
    list(
        validation_batches(
            split, context_length=4, batch_size=3, max_samples=9, rank=0, world_size=1
        )
    )
    batches.close()
    assert torch.equal(before[0], torch.get_rng_state()) and before[2] == random.getstate()
    assert np.array_equal(before[1], np.random.get_state()[1])


@pytest.mark.multiprocess
def test_signals_to_the_whole_job_do_not_end_the_workers(split):
    batches = loader(split, num_workers=2)
    next(batches)
    workers = [w.pid for w in batches._iterator._workers]
    sender = os.fork()  # the signals of a scheduler do not come from the rank
    if sender == 0:
        for pid in workers:
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGTERM):
                os.kill(pid, number)
        os._exit(0)
    os.waitpid(sender, 0)
    got = [next(batches).positions.item() for _ in range(100)]
    assert got == list(range(1, 101)) and all(w.is_alive() for w in batches._iterator._workers)
    processes = batches._iterator._workers
    processes[
        0
    ].terminate()  # from the rank it still works: this is how an exiting process ends its workers
    processes[0].join(10)
    assert processes[0].exitcode == 0
    start = time.monotonic()
    batches.close()
    assert time.monotonic() - start < 20


def test_shorter_context_cuts_blocks_and_a_longer_one_is_refused(split, reference):
    short = loader(split, context_length=5, micro_batch_size=GLOBAL)
    assert torch.equal(next(short).sequences, reference[0][0][:, :6])
    for make in (
        lambda n: loader(split, context_length=n),
        lambda n: next(
            validation_batches(
                split, context_length=n, batch_size=1, max_samples=1, rank=0, world_size=1
            )
        ),
    ):
        with pytest.raises(
            DataError,
            match="data.context_length is 17: .*packed for 16; use 1 to 16, or pack again",
        ):
            make(17)


@pytest.mark.parametrize(
    "changes",
    [
        dict(global_batch_size=24, world_size=5),
        dict(micro_batch_size=5),
        dict(rank=1),
        dict(first_step=-1),
    ],
)
def test_impossible_divisions_are_refused(split, changes):
    with pytest.raises(ValueError):
        loader(split, **changes)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("max_samples", [1, 10, 10_000])
def test_validation_covers_the_first_samples_once_in_order(pristine, world_size, max_samples):
    held_out = open_split(pristine, "validation", verify="sizes")
    parts = [
        list(
            validation_batches(
                held_out,
                context_length=CONTEXT_LENGTH,
                batch_size=4,
                max_samples=max_samples,
                rank=r,
                world_size=world_size,
            )
        )
        for r in range(world_size)
    ]
    count = min(max_samples, len(held_out))
    sizes = [sum(len(b.sequences) for b in part) for part in parts]
    assert max(sizes) - min(sizes) <= 1 and all(
        len(b.sequences) <= 4 for part in parts for b in part
    )
    batches = [b for part in parts for b in part]
    assert [i for b in batches for i in b.sample_ids.tolist()] == list(range(count))
    assert all(
        b.sequences[0].tolist() == held_out.read(int(b.sample_ids[0])).tolist() for b in batches
    )


def test_data_state_survives_json_and_refuses_other_data(split):
    saved = json.loads(
        json.dumps(DataState(fingerprint=split.fingerprint, seed=SEED, step=7).state_dict())
    )
    assert DataState.load_state_dict(saved, fingerprint=split.fingerprint, seed=SEED).step == 7
    for changes, expected in [
        (dict(fingerprint="f" * 64), f"{split.fingerprint}.*{'f' * 64}"),
        (dict(seed=34), "train.seed 33.*says 34"),
    ]:
        with pytest.raises(CheckpointError, match=expected):
            DataState.load_state_dict(
                saved, **{"fingerprint": split.fingerprint, "seed": SEED, **changes}
            )
    for broken in ({}, {**saved, "step": "x"}, {**saved, "version": 99}):
        with pytest.raises(CheckpointError):
            DataState.load_state_dict(broken, fingerprint=split.fingerprint, seed=SEED)
