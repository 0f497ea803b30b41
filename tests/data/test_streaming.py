"""Streaming: complete samples only, each once per pass, and what is lost is written down."""

import json
import os

import pytest
from corpora import CONTEXT_LENGTH

from ebwm_scale.core.errors import ConfigError, DataError
from ebwm_scale.data.format.manifest import load_manifest
from ebwm_scale.data.format.shards import open_split
from ebwm_scale.data.loading.streaming import StreamLoader, expand


def shards_of(dataset):
    return [
        str(dataset.parent / shard.path) for shard in load_manifest(dataset).splits["train"].shards
    ]


def stream(
    dataset,
    shards=None,
    *,
    rank=0,
    world_size=1,
    first_shard=0,
    buffer=7,
    allow_pipe=True,
    **options,
):
    return StreamLoader(
        shards or shards_of(dataset),
        load_manifest(dataset),
        context_length=CONTEXT_LENGTH,
        global_batch_size=world_size,
        micro_batch_size=1,
        rank=rank,
        world_size=world_size,
        seed=3,
        buffer=buffer,
        first_shard=first_shard,
        allow_pipe=allow_pipe,
        **options,
    )


def take(loader, count):
    return [next(loader) for _ in range(count)]


def rows(batches):
    return [tuple(b.sequences[0].tolist()) for b in batches]


@pytest.mark.parametrize("kind", ["path", "pipe", "url"])
@pytest.mark.multiprocess
def test_a_stream_gives_the_samples_of_the_index(dataset, kind):
    split = open_split(dataset, "train", verify="sizes")
    shards = [
        {"path": s, "pipe": f"pipe:cat {s}", "url": f"file://{s}"}[kind] for s in shards_of(dataset)
    ]
    loader = stream(dataset, shards, buffer=1)
    got = rows(take(loader, len(split) - 1))
    assert sorted([*got, rows(take(loader, 1))[0]]) == sorted(
        tuple(split.read(i).tolist()) for i in range(len(split))
    )
    assert loader.found == []


def test_ranks_take_different_shards(dataset):
    ids = [
        {
            int(b.sample_ids) >> 32
            for b in take(stream(dataset, rank=rank, world_size=2, buffer=1), 15)
        }
        for rank in (0, 1)
    ]
    assert not ids[0] & ids[1]


def test_the_order_changes_per_pass_and_samples_are_shuffled(dataset):
    split = open_split(dataset, "train", verify="sizes")
    ids = [int(b.sample_ids) for b in take(stream(dataset, buffer=10), 2 * len(split))]
    first, second = ids[: len(split)], ids[len(split) :]
    assert first != sorted(first) and [i >> 32 for i in first] != [i >> 32 for i in second]
    assert ids == [int(b.sample_ids) for b in take(stream(dataset, buffer=10), 2 * len(split))]


def test_a_resume_goes_on_with_shards_that_nobody_had_begun(dataset):
    loaders = [stream(dataset, rank=rank, world_size=2, buffer=1) for rank in (0, 1)]
    begun = {int(b.sample_ids) >> 32 for loader in loaders for b in take(loader, 3)}
    position = max(loader.next_shard for loader in loaders)
    resumed = {
        int(b.sample_ids) >> 32
        for rank in (0, 1)
        for b in take(stream(dataset, rank=rank, world_size=2, first_shard=position, buffer=1), 3)
    }
    assert not begun & resumed


@pytest.mark.parametrize("where", ["payload", "header", "between"])
def test_a_cut_shard_gives_whole_samples_and_one_record(dataset, where):
    path = dataset.parent / "train-000001.tar"
    offsets = json.loads(path.with_suffix(".index.json").read_text())["fields"]["tokens.npy"][
        "offsets"
    ]
    split = open_split(dataset, "train", verify="sizes")
    sound = {tuple(split.read(i).tolist()) for i in range(len(split))}
    os.truncate(
        path,
        {"payload": offsets[5] + 10, "header": offsets[5] - 100, "between": offsets[5] - 512}[
            where
        ],
    )
    loader = stream(dataset, buffer=1)
    got = rows(take(loader, 2 * len(split)))
    assert (
        set(got) <= sound
        and loader.found
        and all("train-000001.tar" in bad.shard and "cut off" in bad.reason for bad in loader.found)
    )


@pytest.mark.multiprocess
def test_a_failing_command_is_recorded_and_the_rest_goes_on(dataset):
    shards = [f"pipe:cat {s}" for s in shards_of(dataset)]
    shards[1] = "pipe:false"
    loader = stream(dataset, shards, buffer=1)
    take(loader, 2 * len(open_split(dataset, "train", verify="sizes")))
    assert {(bad.shard, "exit code 1" in bad.reason) for bad in loader.found} == {
        ("pipe:false", True)
    }


@pytest.mark.parametrize("shards", [["a.tar", "pipe:touch {made}"], ["pipe:touch {made}{{0..3}}"]])
def test_commands_run_only_with_permission(dataset, tmp_path, shards):
    made = tmp_path / "made"
    with pytest.raises(ConfigError, match="commands in a shell.*--allow-pipe"):
        stream(dataset, [shard.format(made=made) for shard in shards], allow_pipe=False)
    assert list(tmp_path.glob("made*")) == []


@pytest.mark.multiprocess
def test_nothing_readable_is_an_error_not_a_silent_wait(dataset):
    loader = stream(dataset, ["pipe:true", "/nowhere/a.tar"], buffer=1)
    with pytest.raises(DataError, match="shard in a row without a whole sample"):
        next(loader)


def test_fewer_shards_than_processes_is_refused(dataset):
    with pytest.raises(ConfigError, match="names 1 shards for 2 processes"):
        stream(dataset, shards_of(dataset)[:1], world_size=2)


def test_ranges_are_spelled_out():
    assert expand("s3://b/a-{000..002}.tar") == [f"s3://b/a-{i:03d}.tar" for i in range(3)]
    assert expand("pipe:cat x{8..10}.tar") == [f"pipe:cat x{i}.tar" for i in (8, 9, 10)] and expand(
        "plain.tar"
    ) == ["plain.tar"]
