"""A dataset without its damaged samples: nothing sound is lost, nothing damaged is kept."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_reasoning import make as make_tasks
from test_verify import add_shard, copied, shard_of
from worlds import write_world

from ebwm_scale.core.errors import DataError
from ebwm_scale.data.format import repair as repair_module
from ebwm_scale.data.format.manifest import load_manifest
from ebwm_scale.data.format.repair import repair_dataset
from ebwm_scale.data.format.shards import SampleError, ShardedSplit, ShardError, open_split
from ebwm_scale.data.format.verify import verify_dataset

TOOL = Path(__file__).parents[2] / "tools" / "verify_shards.py"


def sound_samples(manifest, split):
    """{key: bytes of its fields} of what can be read, by the reader that training uses."""
    reader = ShardedSplit(load_manifest(manifest), split)
    found = {}
    for sample_id in range(len(reader)):
        try:
            reader.read_sample(sample_id)
            number, row = reader.locate(sample_id)
            found[reader._index(number).keys[row]] = reader.read_fields(sample_id)
        except (SampleError, ShardError):
            continue
    return found


def flip(path, offset):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


def offsets(manifest, split="train", number=0, field="tokens.npy"):
    entry = shard_of(manifest, split, number)
    values = json.loads((manifest.parent / entry["index_path"]).read_text())
    return values["fields"][field]["offsets"]


def repaired(manifest, tmp_path):
    """(manifest of the repaired dataset, what was said); it is sound whatever was repaired."""
    said = []
    path = repair_dataset(manifest, tmp_path / "sound", report=said.append)
    assert verify_dataset(path)[0] == []
    return path, said


def test_a_sound_dataset_comes_out_with_the_same_shards(dataset, tmp_path):
    path, said = repaired(dataset, tmp_path)
    assert said == []
    before, after = (json.loads(manifest.read_text()) for manifest in (dataset, path))
    assert after.pop("repaired")["left_out"] == {"train": 0, "validation": 0}
    assert after == before


def test_damaged_samples_are_left_out_and_all_others_kept(dataset, tmp_path):
    shard = dataset.parent / "train-000001.tar"
    places = offsets(dataset, number=1)
    for row in (3, 7):
        flip(shard, places[row] + 140)
    expected = sound_samples(dataset, "train")
    whole = load_manifest(dataset).splits["train"]
    assert len(expected) == whole.num_samples - 2
    path, said = repaired(dataset, tmp_path)
    assert sound_samples(path, "train") == expected
    assert [("sample train-000000023" in a, "sample train-000000027" in b) for a, b in [said]] == [
        (True, True)
    ]
    kept = load_manifest(path).splits["train"]
    assert kept.num_targets == whole.num_targets - 2 * 16
    bytes_per_token = [
        split.facts["num_text_bytes"] / (split.num_targets + split.facts["num_dropped_tokens"] + 1)
        for split in (whole, kept)
    ]
    assert bytes_per_token[0] == bytes_per_token[1]
    assert kept.facts["unigram_entropy"] == pytest.approx(unigram_entropy(path), abs=1e-12)
    assert kept.facts["unigram_entropy"] != whole.facts["unigram_entropy"]


def unigram_entropy(manifest):
    import collections
    import math

    split = open_split(manifest, "train", verify="sizes")
    counts = collections.Counter(t for i in range(len(split)) for t in split.read(i)[1:].tolist())
    total = sum(counts.values())
    return -sum(n / total * math.log(n / total) for n in counts.values())


@pytest.mark.parametrize("what", ["cut", "header", "index", "both", "shard gone", "index gone"])
def test_every_kind_of_damage_leaves_what_is_sound(dataset, tmp_path, what):
    shard = dataset.parent / "train-000001.tar"
    index = shard.with_suffix(".index.json")
    places = offsets(dataset, number=1)
    kept = {"cut": 5, "header": 20, "index": 20, "both": 0, "shard gone": 0, "index gone": 20}[what]
    if what == "cut":
        os.truncate(shard, places[5] + 10)
    if what in ("header", "both"):
        flip(shard, places[5] - 500)
    if what in ("index", "both"):
        index.write_text(index.read_text()[:-20])
    if what == "shard gone":
        shard.unlink()
    if what == "index gone":
        index.unlink()
    num_samples = load_manifest(dataset).splits["train"].num_samples
    path, said = repaired(dataset, tmp_path)
    after = load_manifest(path)
    assert after.splits["train"].num_samples == num_samples - 20 + kept
    assert after.values["repaired"]["left_out"] == {"train": 20 - kept, "validation": 0}
    assert said and all("train-000001" in line and "\n" not in line for line in said)


def test_a_shard_that_is_there_twice_is_kept_once(dataset, tmp_path):
    num_samples = load_manifest(dataset).splits["train"].num_samples
    add_shard(dataset, "validation", copied(dataset, "train", retar=True))
    path, said = repaired(dataset, tmp_path)
    assert load_manifest(path).splits["train"].num_samples == num_samples
    assert len(said) == 1 and "validation split holds samples of the train split" in said[0]


def test_tasks_keep_their_scores_and_entropy(tmp_path):
    (manifest,) = make_tasks(tmp_path / "tasks")
    path, _ = repaired(manifest, tmp_path)
    assert json.loads(path.read_text())["splits"] == json.loads(manifest.read_text())["splits"]
    shutil.rmtree(path.parent)
    flip(manifest.parent / "train-000000.tar", offsets(manifest)[0] + 140)
    path, said = repaired(manifest, tmp_path)
    assert len(said) == 1
    assert sound_samples(path, "train") == sound_samples(manifest, "train")


def test_clips_of_worlds_keep_their_conditions(tmp_path):
    manifest = write_world(tmp_path / "world", num_clips=5)
    flip(manifest.parent / "train-000000.tar", offsets(manifest, field="frames.npy")[1] + 140)
    path, said = repaired(manifest, tmp_path)
    assert len(said) == 1 and sound_samples(path, "train") == sound_samples(manifest, "train")


def test_a_damaged_tokenizer_is_refused_and_nothing_is_written(dataset, tmp_path):
    flip(dataset.parent / "tokenizer.model", 100)
    with pytest.raises(DataError, match="cannot be repaired by leaving samples out"):
        repair_dataset(dataset, tmp_path / "sound")
    assert not (tmp_path / "sound").exists() and not list(tmp_path.glob(".sound*"))


def test_nothing_left_and_an_output_that_is_there_are_refused(dataset, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(DataError, match="is there already"):
        repair_dataset(dataset, tmp_path / "full")
    for shard in load_manifest(dataset).splits["validation"].shards:
        (dataset.parent / shard.path).unlink()
    with pytest.raises(DataError, match="nothing of the validation split is sound"):
        repair_dataset(dataset, tmp_path / "sound", report=lambda line: None)
    assert not list(tmp_path.glob("*sound*"))


def test_the_check_notices_a_damaged_sample_that_is_kept(dataset, tmp_path, monkeypatch):
    """A shard that is taken to be whole, without its index, is believed."""
    shard = dataset.parent / "train-000001.tar"
    flip(shard, offsets(dataset, number=1)[3] + 140)
    before = sound_samples(dataset, "train")
    shard.with_suffix(".index.json").unlink()
    monkeypatch.setattr(repair_module, "_is_whole", lambda path, shard: True)
    path = repair_dataset(dataset, tmp_path / "sound", report=lambda line: None)
    assert len(sound_samples(path, "train")) == len(before) + 1


@pytest.mark.multiprocess
def test_the_tool_says_what_it_leaves_out(dataset, tmp_path):
    flip(dataset.parent / "train-000001.tar", offsets(dataset, number=1)[3] + 140)
    command = [sys.executable, TOOL, dataset, "--repair", tmp_path / "sound"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "sample train-000000023" in done.stdout and "1 left out" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 2 and "is there already" in again.stderr


def test_a_repaired_dataset_has_a_fingerprint_of_its_own(dataset, tmp_path):
    path, _ = repaired(dataset, tmp_path)
    before, after = load_manifest(dataset), load_manifest(path)
    assert after.fingerprint != before.fingerprint
    assert after.values["repaired"]["fingerprint"] == before.fingerprint
