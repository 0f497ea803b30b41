"""Very many shards: their lists stand in files of their own, rank 0 reads and checks them, and
nothing else changes.
"""

import json
import multiprocessing
import os
import pickle
import socket

import numpy as np
import pytest

from ebwm_scale.core import files as manifest_module
from ebwm_scale.core.errors import DataError
from ebwm_scale.data.format import shard_table, writer
from ebwm_scale.data.format.manifest import load_manifest
from ebwm_scale.data.format.shards import ShardError, open_split
from ebwm_scale.data.format.verify import verify_dataset
from ebwm_scale.data.loading.batches import BatchLoader
from ebwm_scale.data.loading.opening import open_splits


@pytest.fixture
def parted(dataset, monkeypatch):
    """The manifest of the same dataset with the lists of shards in files of two each."""
    monkeypatch.setattr(writer, "MAX_INLINE", 1)
    monkeypatch.setattr(writer, "SHARDS_PER_PART", 2)
    monkeypatch.setattr(shard_table, "PARTS_KEPT", 1)
    writer.write_manifest(dataset.parent, json.loads(dataset.read_text()))
    return dataset


def first_batches(split, count=12):
    loader = BatchLoader(
        split,
        context_length=16,
        global_batch_size=4,
        micro_batch_size=4,
        rank=0,
        world_size=1,
        seed=3,
        window_shards=2,
        num_workers=0,
    )
    return [next(loader) for _ in range(count)]


def test_the_same_dataset_with_its_lists_in_files_has_the_same_fingerprint_order_and_bytes(
    pristine, parted
):
    values = json.loads(parted.read_text())
    assert "shards" not in values["splits"]["train"] and len(values["splits"]["train"]["parts"]) > 1
    one, two = (open_split(path, "train", verify="hashes") for path in (pristine, parted))
    assert one.fingerprint == two.fingerprint and len(one) == len(two)
    assert list(one.info.shards) == list(two.info.shards)
    assert [two.info.shards[i] for i in (-1, 0, 2)] == [one.info.shards[i] for i in (-1, 0, 2)]
    for a, b in zip(first_batches(one), first_batches(two)):
        assert a.sequences.equal(b.sequences) and a.sample_ids.equal(b.sample_ids)
    assert verify_dataset(parted) == verify_dataset(pristine)


def edit_part(manifest, change):
    """A part that was changed together with its hash in the manifest."""
    path = manifest.parent / "train-000000.shards.json"
    entries = json.loads(path.read_text())
    change(entries)
    path.write_bytes(shard_table.canonical_json(entries))
    values = json.loads(manifest.read_text())
    values["splits"]["train"]["parts"][0]["sha256"] = manifest_module.file_sha256(path)
    manifest.write_text(json.dumps(values))


def edit_head(manifest, **changes):
    values = json.loads(manifest.read_text())
    values["splits"]["train"]["parts"][0].update(changes)
    manifest.write_text(json.dumps(values))


PART = "train-000000.shards.json"
DAMAGE = {
    "gone": (lambda m: (m.parent / PART).unlink(), "cannot read this part"),
    "cut": (lambda m: os.truncate(m.parent / PART, 90), "its sha256 is"),
    "other content": (lambda m: (m.parent / PART).write_text("[]"), "its sha256 is"),
    "a path upwards": (
        lambda m: edit_part(m, lambda e: e[0].update(path="../x")),
        r"shards\[0\].path is '../x': refused",
    ),
    "one shard less": (lambda m: edit_part(m, lambda e: e.pop()), "does not hold 2 shards"),
    "another number": (
        lambda m: edit_part(m, lambda e: e[1].update(num_samples=3)),
        "do not add up",
    ),
    "a fraction": (
        lambda m: edit_part(m, lambda e: e[1].update(size=3.5)),
        r"shards\[1\].size is 3.5: expected a whole number",
    ),
    "a list for an entry": (lambda m: edit_part(m, lambda e: e.__setitem__(0, [])), "an object"),
    "head: path upwards": (lambda m: edit_head(m, path="../p.json"), "'../p.json': refused"),
    "head: number of shards": (lambda m: edit_head(m, num_shards=3), "does not hold 3 shards"),
    "head: samples": (lambda m: edit_head(m, num_samples=3), "do not add up"),
    "head: text": (lambda m: edit_head(m, size="x"), "size is 'x': expected a whole number"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_part_is_one_line(parted, name):
    damage, expected = DAMAGE[name]
    damage(parted)
    with pytest.raises(DataError, match=expected) as error:
        load_manifest(parted)
    assert "\n" not in str(error.value)


def test_a_part_that_is_lost_while_training_is_a_lost_shard(parted):
    split = open_split(parted, "train", verify="sizes")
    (parted.parent / PART).unlink()
    assert len(split.read(len(split) - 1)) == 17
    split.info.shards._cached.clear()
    with pytest.raises(ShardError, match="cannot read this part"):
        split.read(0)


def test_what_other_ranks_are_sent_is_small_and_works(parted):
    split = open_splits([(parted, 1)], ["train"], verify="sizes")["train"]
    expected = [split.read(i) for i in range(len(split))]
    sent = pickle.dumps(split)
    assert b"train-000000.tar" not in sent and len(sent) < 8000
    received = pickle.loads(sent)
    assert received.fingerprint == split.fingerprint
    assert all(np.array_equal(received.read(i), row) for i, row in enumerate(expected))


def _rank(rank, port, manifest, results):
    """One process of a group: counts the files it asks for while the data are opened."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch
    import torch.distributed as dist

    from ebwm_scale.core.world import World
    from ebwm_scale.data.format import shard_checks

    dist.init_process_group("gloo", rank=rank, world_size=2)
    asked = []
    sizes = shard_checks._sizes
    shard_checks._sizes = lambda paths: asked.extend(paths) or sizes(paths)
    world = World(rank, 2, rank, torch.device("cpu"))
    try:
        split = open_splits([(manifest, 1)], ["train"], verify="sizes", group=world)["train"]
        answer = split.fingerprint, [int(split.read(i).sum()) for i in range(len(split))]
    except DataError as error:
        answer = str(error)
    results.put((rank, len(asked), answer))
    dist.destroy_process_group()


def of_two_ranks(manifest):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=_rank, args=(rank, port, manifest, results)) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    try:
        return sorted(results.get(timeout=120) for _ in processes)
    finally:
        for process in processes:
            process.join(30)
            process.kill()


def test_rank_0_checks_for_all_and_all_hear_what_is_wrong(parted):
    (_, asked, mine), (_, asked_too, theirs) = of_two_ranks(parted)
    assert asked > 2 and asked_too == 0 and mine == theirs and len(mine[1]) > 40
    (parted.parent / "train-000001.tar").unlink()
    (_, _, mine), (_, asked_too, theirs) = of_two_ranks(parted)
    assert asked_too == 0 and mine == theirs and "train-000001.tar: the shard is missing" in mine


def test_indexes_are_kept_by_bytes_least_recently_used_first_and_at_least_a_window(pristine):
    split = open_split(pristine, "train", verify="sizes")
    first = [int(end) for end in (0, *split._ends[:-1])]
    split.keep(window_shards=2, index_budget=0)
    for number in (0, 1, 0, 2):
        split.read(first[number])
    assert list(split._indexes) == [0, 2]  # 1 was used longest ago
    split.close()
    split.read(first[0])
    split.keep(window_shards=1, index_budget=3 * split._index_bytes + 64)
    for number in (1, 2, 3):
        split.read(first[number])
    assert len(split._indexes) == 3 and split._index_bytes <= split.index_budget
    assert split._index_bytes == sum(index.num_bytes for index in split._indexes.values())


def test_an_index_of_many_samples_is_small(tmp_path):
    from ebwm_scale.data.format.index import parse_index

    count = 100_000
    column = {
        "offsets": list(range(512, 512 + 1024 * count, 1024)),
        "sizes": [642] * count,
        "crc32": list(range(count)),
    }
    values = {
        "index_version": 2,
        "shard": "x.tar",
        "num_targets": [256] * count,
        "keys": [f"train-{i:09d}" for i in range(count)],
        "fields": {"tokens.npy": column},
    }
    content = json.dumps(values).encode()
    index = parse_index(content, "x", "x.tar", size=2**40)
    assert index.num_bytes < 4 * 2**20 and len(index) == count
    assert index.places[7].tolist() == [(512 + 7 * 1024, 642, 7)]
    assert index.keys[7] == "train-000000007"
    assert index.fields["tokens.npy"].offsets[-1] == 512 + 1024 * (count - 1)
