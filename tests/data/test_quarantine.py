import json
import os

import numpy as np
import pytest
import torch
from corpora import CONTEXT_LENGTH

from ebwm_scale.core.disk import RowLog
from ebwm_scale.core.errors import DataError
from ebwm_scale.core.faults import Faults
from ebwm_scale.data.format.shards import open_split
from ebwm_scale.data.loading.batches import BatchLoader, validation_batches
from ebwm_scale.data.loading.quarantine import Quarantine

SHARD = "train-000001.tar"  # samples 20 .. 39


def loader(dataset, *, rank=0, world_size=1, num_workers=0, known_bad=None):
    return BatchLoader(
        open_split(dataset, "train", verify="sizes"),
        context_length=CONTEXT_LENGTH,
        global_batch_size=4,
        micro_batch_size=1,
        rank=rank,
        world_size=world_size,
        seed=33,
        window_shards=2,
        num_workers=num_workers,
        known_bad=known_bad,
    )


def writer(folder):
    """What rank 0 of a run writes rows with."""
    log = RowLog(folder / "quarantine.jsonl", Faults(None, 0))

    def write(row):
        log.add(row)
        assert log.flush() is None

    return write


def flip(path, field_row):
    index = json.loads(path.with_suffix(".index.json").read_text())
    offset = index["fields"]["tokens.npy"]["offsets"][field_row]
    content = bytearray(path.read_bytes())
    content[offset + 140] ^= 1
    path.write_bytes(content)
    return offset


def an_epoch(dataset, **options):
    """(batches of one epoch, what was found)."""
    batches = loader(dataset, **options)
    steps = len(open_split(dataset, "train", verify="sizes")) // 4 + 1
    taken = [next(batches) for _ in range(steps * batches.micro_batches_per_step)]
    found = list(batches.found)
    batches.close()
    return taken, found


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.multiprocess
def test_a_flipped_bit_is_written_down_and_the_next_sample_stands_in(
    dataset, num_workers, tmp_path
):
    offset = flip(dataset.parent / SHARD, 3)
    split = open_split(dataset, "train", verify="sizes")
    taken, found = an_epoch(dataset, num_workers=num_workers)
    bad = {(b.shard, b.key, b.offset, b.sample_id, b.replaced_by) for b in found}
    assert (
        bad == {(str(dataset.parent / SHARD), "train-000000023", offset, 23, 24)}
        and "checksum is" in found[0].reason
    )
    rows = {int(i): row for batch in taken for i, row in zip(batch.sample_ids, batch.sequences)}
    assert len(rows) == len(split)  # equal counts: nothing is dropped
    assert all(rows[i].tolist() == split.read(24 if i == 23 else i).tolist() for i in rows)
    quarantine = Quarantine(tmp_path, limit=1, write=writer(tmp_path))
    assert (
        len(quarantine.add(found)) == 1 and quarantine.add(found) == [] and not quarantine.exceeded
    )
    (line,) = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "train-000000023" and json.loads(line)["offset"] == offset


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_what_stands_in_does_not_depend_on_the_processes(dataset, world_size):
    for row in (3, 4, 9):
        flip(dataset.parent / SHARD, row)
    expected = {int(b.positions): b.sequences for b in an_epoch(dataset)[0]}
    for rank in range(world_size):
        for batch in an_epoch(dataset, rank=rank, world_size=world_size)[0]:
            assert torch.equal(batch.sequences, expected[int(batch.positions)])


DAMAGE = {
    "cut in a payload": lambda path, offsets: os.truncate(path, offsets[5] + 10),
    "cut in a header": lambda path, offsets: os.truncate(path, offsets[5] - 100),
    "cut between members": lambda path, offsets: os.truncate(path, offsets[5] - 512),
    "gone": lambda path, offsets: path.unlink(),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_shard_cut_while_training_loses_no_sample_silently_and_gives_none_by_half(dataset, name):
    path = dataset.parent / SHARD
    offsets = json.loads(path.with_suffix(".index.json").read_text())["fields"]["tokens.npy"][
        "offsets"
    ]
    batches, split = loader(dataset), open_split(dataset, "train", verify="sizes")
    sound = {i: split.read(i) for i in range(len(split))}
    split.close()
    DAMAGE[name](path, offsets)
    taken = [next(batches) for _ in range(len(sound) + 4)]
    lost = set(range(25, 40)) if "cut" in name else set(range(20, 40))
    assert {b.sample_id for b in batches.found} == lost
    for batch in taken:
        i = int(batch.sample_ids)
        assert any(
            np.array_equal(batch.sequences[0], sound[j])
            for j in ([i] if i not in lost else set(sound) - lost)
        )
    batches.close()


def test_a_damaged_header_changes_no_sample(dataset):
    path = dataset.parent / SHARD
    content = bytearray(path.read_bytes())
    offset = json.loads(path.with_suffix(".index.json").read_text())["fields"]["tokens.npy"][
        "offsets"
    ][3]
    content[offset - 512] ^= 4
    path.write_bytes(content)
    assert an_epoch(dataset)[1] == []


def test_known_bad_samples_are_replaced_even_if_the_disk_recovers(dataset):
    before = (dataset.parent / SHARD).read_bytes()
    flip(dataset.parent / SHARD, 3)
    expected, found = an_epoch(dataset)
    (dataset.parent / SHARD).write_bytes(before)
    again, nothing_new = an_epoch(dataset, known_bad={b.sample_id: b for b in found})
    assert nothing_new == [] and all(
        torch.equal(a.sequences, b.sequences) for a, b in zip(expected, again)
    )


def test_nothing_readable_near_is_one_clear_error(dataset):
    batches = loader(dataset)
    for path in dataset.parent.glob("train-*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DataError, match="no sample after it can be read either") as error:
        next(batches)
    assert "\n" not in str(error.value)


def test_a_damaged_validation_sample_is_replaced_and_reported(dataset):
    flip(dataset.parent / "validation-000000.tar", 0)
    found = []
    split = open_split(dataset, "validation", verify="sizes")
    batches = list(
        validation_batches(
            split,
            context_length=CONTEXT_LENGTH,
            batch_size=2,
            max_samples=4,
            rank=0,
            world_size=1,
            found=found,
        )
    )
    assert [b.sample_id for b in found] == [0] and found[0].split == "validation"
    assert batches[0].sequences[0].tolist() == split.read(1).tolist()


def test_the_list_survives_a_checkpoint_and_a_second_writing(tmp_path, dataset):
    flip(dataset.parent / SHARD, 3)
    found = an_epoch(dataset)[1]
    first = Quarantine(tmp_path, limit=0, write=writer(tmp_path))
    first.add(found)
    assert first.exceeded
    with (tmp_path / "quarantine.jsonl").open("a") as file:
        file.write('{"split": "train", "sam')  # killed while writing
    resumed = Quarantine(tmp_path, limit=0, write=writer(tmp_path))
    resumed.load_state_dict(first.state_dict())
    assert resumed.known("train").keys() == {23} and resumed.known("validation") == {}
    killed_before_the_checkpoint = Quarantine(tmp_path, limit=0, write=writer(tmp_path))
    assert len(killed_before_the_checkpoint.add(found)) == 1
    assert (
        sum(
            "train-000000023" in line
            for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()
        )
        == 1
    )
