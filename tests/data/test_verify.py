"""What tools/verify_shards.py has to find, each as a line, with exit code 1."""

import builtins
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from ebwm_scale.data.format.verify import verify_dataset

TOOL = Path(__file__).parents[2] / "tools" / "verify_shards.py"


def edit(manifest, change):
    values = json.loads(manifest.read_text())
    change(values)
    manifest.write_text(json.dumps(values))


def add_shard(manifest, split, entry):
    """One more shard in a split, its totals adjusted."""

    def change(values):
        part = values["splits"][split]
        part["shards"].append(entry)
        part["num_samples"] += entry["num_samples"]
        part["num_targets"] += entry["num_targets"]

    edit(manifest, change)


def shard_of(manifest, split, number=0):
    return json.loads(manifest.read_text())["splits"][split]["shards"][number]


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def with_index(manifest, entry, change):
    """The shard's entry after a change to its index; its hash fits again."""
    path = manifest.parent / entry["index_path"]
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    return {**entry, "index_sha256": sha256(path)}


def copied(manifest, split, *, retar):
    """The entry of a copy of a split's first shard by another name; retar: with other bytes."""
    entry, folder = shard_of(manifest, split), manifest.parent
    path = folder / "copy-000000.tar"
    if retar:
        with (
            tarfile.open(folder / entry["path"]) as source,
            tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as target,
        ):
            for member in source.getmembers():
                content = source.extractfile(member)
                member.mtime = 1
                target.addfile(member, content)
    else:
        shutil.copyfile(folder / entry["path"], path)
    shutil.copyfile(folder / entry["index_path"], folder / "copy-000000.index.json")
    entry |= {"path": path.name, "index_path": "copy-000000.index.json"}
    entry |= {"size": path.stat().st_size, "sha256": sha256(path)}
    return with_index(manifest, entry, lambda values: values.update(shard=path.name))


def twice(manifest):
    add_shard(manifest, "train", shard_of(manifest, "train"))


def twice_spelt_differently(manifest):
    entry = shard_of(manifest, "train")
    add_shard(manifest, "train", entry | {"path": "./" + entry["path"]})


def train_in_validation(manifest):
    add_shard(manifest, "validation", shard_of(manifest, "train"))


def copy_in_validation(manifest):
    add_shard(manifest, "validation", copied(manifest, "train", retar=False))


def retarred_in_validation(manifest):
    add_shard(manifest, "validation", copied(manifest, "train", retar=True))


def set_spans(offset, size):
    def damage(manifest):
        def change(values):
            for column in values["fields"].values():
                column["offsets"][0], column["sizes"][0] = offset, size

        entry = with_index(manifest, shard_of(manifest, "train"), change)
        edit(manifest, lambda values: values["splits"]["train"]["shards"].__setitem__(0, entry))

    return damage


def eos(value):
    return lambda manifest: edit(manifest, lambda values: values.update(eos_id=value))


LARGEST = 2**63 - 1
DAMAGES = {
    "offset and size overflow int64": (set_spans(LARGEST, LARGEST), "train-000000"),
    "offset beyond the shard": (set_spans(LARGEST, 1), "train-000000"),
    "size beyond the shard": (set_spans(512, LARGEST), "train-000000"),
    "sum that wraps to inside": (set_spans(LARGEST, 2), "train-000000"),
    "beyond int64": (set_spans(2**64, 1), "train-000000"),
    "a shard twice": (twice, r"train.shards\[\d\] .*again: the same path; its samples count"),
    "twice, spelt differently": (twice_spelt_differently, r"again: the same path"),
    "a training shard in validation": (
        train_in_validation,
        r"again: the same path; the validation split holds samples of the train split",
    ),
    "a copy of it": (copy_in_validation, r"again: the same sha256; the validation split holds"),
    "a copy with other bytes": (
        retarred_in_validation,
        r"again: the same sample keys; the validation split holds",
    ),
    "end of sequence beyond the vocabulary": (eos(320), r"eos_id is 320: must be below .*320"),
    "far beyond": (eos(10**12), r"eos_id is 10{12}: must be below"),
    "another end of sequence": (eos(5), r"eos_id is 5, its tokenizer tokenizer.model has 1"),
    "another vocabulary": (
        lambda manifest: edit(manifest, lambda values: values.update(vocabulary_size=400)),
        r"vocabulary_size is 400, its tokenizer tokenizer.model has 320",
    ),
    "a name that is too long": (
        lambda manifest: edit(
            manifest,
            lambda values: values["splits"]["train"]["shards"][0].update(path="a" * 5000),
        ),
        r"aaaa: the shard is missing",
    ),
    "a tokenizer's name that is too long": (
        lambda manifest: edit(manifest, lambda v: v["tokenizer"].update(path="a" * 5000)),
        r"aaaa: is missing",
    ),
    "a shard that is a folder": (
        lambda m: (
            (m.parent / "train-000000.tar").unlink(),
            (m.parent / "train-000000.tar").mkdir(),
        ),
        r"train-000000.tar: the shard is missing",
    ),
    "a shard that is a link to nowhere": (
        lambda m: (
            (m.parent / "train-000000.tar").unlink(),
            (m.parent / "train-000000.tar").symlink_to("nowhere"),
        ),
        r"train-000000.tar: the shard is missing",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_each_is_a_problem_and_the_exit_code_is_1(dataset, name):
    damage, expected = DAMAGES[name]
    damage(dataset)
    problems, _ = verify_dataset(dataset)
    assert any(re.search(expected, problem) for problem in problems), problems
    assert all("\n" not in problem for problem in problems)
    done = subprocess.run([sys.executable, TOOL, dataset], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == ""
    assert f" {len(problems)} problems" in done.stdout.splitlines()[-1]


def test_a_number_that_no_manifest_can_hold_is_one_line_and_exit_code_2(dataset):
    eos(10**30)(dataset)
    done = subprocess.run([sys.executable, TOOL, dataset], capture_output=True, text=True)
    assert done.returncode == 2 and "eos_id is 10" in done.stderr
    assert "\n" not in done.stderr.strip()


@pytest.mark.parametrize("name", ["train-000001.tar", "train-000001.index.json"])
@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), OSError(5, "I/O error")]
)
def test_a_file_that_cannot_be_opened_is_a_problem(dataset, monkeypatch, name, error):
    def guarded(function):
        def call(path, *arguments, **options):
            if isinstance(path, (str, os.PathLike)) and Path(path).name == name:
                raise error
            return function(path, *arguments, **options)

        return call

    for module, function in ((builtins, "open"), (io, "open"), (os, "open")):
        monkeypatch.setattr(module, function, guarded(getattr(module, function)))
    problems, num_samples = verify_dataset(dataset)
    assert any(name in problem and error.strerror in problem for problem in problems), problems
    assert len(problems) < 5 and num_samples > 20  # the others were checked


def test_a_sound_dataset_has_no_problem(pristine):
    assert verify_dataset(pristine)[0] == []
