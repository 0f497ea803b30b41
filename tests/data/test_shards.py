import hashlib
import io
import json
import os
import pickle
import random
import re
import subprocess
import sys

import numpy as np
import pytest

from ebwm_scale.core.errors import DataError
from ebwm_scale.data.format import shards
from ebwm_scale.data.format.manifest import load_manifest
from ebwm_scale.data.format.shards import open_split
from ebwm_scale.data.format.verify import verify_dataset
from ebwm_scale.data.loading.batches import BatchLoader
from ebwm_scale.data.loading.quarantine import read_or_replace

SHARD, INDEX = "train-000001.tar", "train-000001.index.json"


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 4
    path.write_bytes(content)


def read_all(manifest, verify="hashes"):
    split = open_split(manifest, "train", verify=verify)
    return [split.read(i) for i in range(len(split))]


def edit(manifest, change):
    values = json.loads(manifest.read_text())
    change(values)
    manifest.write_text(json.dumps(values))


def edit_index(manifest, change):
    """An index that was changed together with its hash in the manifest: only its content can give
    it away.
    """
    path = manifest.parent / INDEX
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    edit(
        manifest,
        lambda v: v["splits"]["train"]["shards"][1].update(
            index_sha256=hashlib.sha256(path.read_bytes()).hexdigest()
        ),
    )


def payload(manifest, row=5):
    """(key, offset) of a sample of the damaged shard."""
    index = json.loads((manifest.parent / INDEX).read_text())
    return index["keys"][row], index["fields"]["tokens.npy"]["offsets"][row]


def first_train_shard(values):
    return values["splits"]["train"]["shards"][0]


MANIFEST_DAMAGE = {
    "missing": (lambda m: m.unlink(), "cannot read the manifest: No such file"),
    "not JSON": (lambda m: m.write_text("{ nope"), "not a manifest: not JSON"),
    "not an object": (
        lambda m: m.write_text("[1]"),
        "format_version is None: this release reads 2",
    ),
    "not text": (lambda m: m.write_bytes(b"\xff\xfe\x00"), "not a manifest"),
    "other version": (
        lambda m: edit(m, lambda v: v.update(format_version=9)),
        "format_version is 9: this release reads 2",
    ),
    "other modality": (
        lambda m: edit(m, lambda v: v.update(modality="sound")),
        "modality is 'sound': this release reads text and video",
    ),
    "empty split": (
        lambda m: edit(m, lambda v: v["splits"]["train"].update(shards=[], num_samples=0)),
        "split train has 0 samples",
    ),
    "counts do not add up": (
        lambda m: edit(m, lambda v: v["splits"]["train"].update(num_samples=3)),
        "split train has 3 samples and its",
    ),
    "no split": (
        lambda m: edit(m, lambda v: v["splits"].pop("train")),
        "has no split 'train'; it has validation",
    ),
    "absent field": (
        lambda m: edit(m, lambda v: v.pop("eos_id")),
        "eos_id is None: expected a whole number",
    ),
    "wrong type": (
        lambda m: edit(m, lambda v: first_train_shard(v).update(size="big")),
        r"splits.train.shards\[0\].size is 'big': expected a whole number",
    ),
    "negative size": (
        lambda m: edit(m, lambda v: first_train_shard(v).update(size=-1)),
        "size is -1: expected 0 or more",
    ),
    "split is a list": (
        lambda m: edit(m, lambda v: v["splits"].update(train=[])),
        "splits.train is .*: expected an object",
    ),
    "absolute path": (
        lambda m: edit(m, lambda v: first_train_shard(v).update(path="/etc/passwd")),
        "'/etc/passwd': refused",
    ),
    "path upwards": (
        lambda m: edit(m, lambda v: first_train_shard(v).update(path="a/../../x.tar")),
        r"'a/../../x.tar': refused",
    ),
    "index upwards": (
        lambda m: edit(m, lambda v: first_train_shard(v).update(index_path="../x.json")),
        "'../x.json': refused",
    ),
    "tokenizer outside": (
        lambda m: edit(m, lambda v: v["tokenizer"].update(path="/tokenizer.model")),
        "'/tokenizer.model': refused",
    ),
}
MANIFEST_DAMAGE |= {
    name: (lambda m, text=text: m.write_bytes(text(m.read_text())), expected)
    for name, (text, expected) in {
        "NaN": (
            lambda t: re.sub(r'("unigram_entropy": )[0-9.]+', r"\1NaN", t).encode(),
            "not JSON .NaN is no number of JSON",
        ),
        "infinity": (
            lambda t: re.sub(r'("unigram_entropy": )[0-9.]+', r"\1-Infinity", t).encode(),
            "not JSON .-Infinity is no number",
        ),
        "a number out of range": (
            lambda t: re.sub(r'("unigram_entropy": )[0-9.]+', r"\g<1>1e999", t).encode(),
            "not JSON .the number '1e999' is out of range",
        ),
        "a number of many digits": (
            lambda t: t.replace('"eos_id": ', '"eos_id": ' + "9" * 5000, 1).encode(),
            "not JSON",
        ),
        "a whole number beyond 64 bits": (
            lambda t: t.replace('"num_samples": ', '"num_samples": ' + "9" * 30, 1).encode(),
            "num_samples is 9+.*: expected a whole number",
        ),
        "a whole number as a fraction": (
            lambda t: re.sub(r'("size": \d+)', r"\1.0", t, count=1).encode(),
            r"size is \d+.0: expected a whole number",
        ),
        "true for a number": (
            lambda t: re.sub(r'("block_length": )\d+', r"\1true", t).encode(),
            "block_length is True: expected a whole number",
        ),
        "a key twice": (
            lambda t: t.replace("{", '{"modality": "text",', 1).encode(),
            "a key stands twice",
        ),
        "nested without end": (lambda t: b"[" * 10**5, "nested too deeply"),
        "UTF-16": (lambda t: t.encode("utf-16"), "not a manifest"),
        "half a surrogate": (
            lambda t: t.replace("train-000000.tar", "train-\\ud800.tar").encode(),
            "refused, a path must be relative",
        ),
        "a line break in a name": (
            lambda t: t.replace("train-000000.tar", "train\\nfine.tar").encode(),
            "refused, a path must be relative",
        ),
        "a hash that is none": (
            lambda t: re.sub(r'("index_sha256": ")[0-9a-f]{64}', r"\1ABC", t, count=1).encode(),
            "index_sha256 is 'ABC': expected the 64 digits of a sha256",
        ),
        "a very long value": (
            lambda t: t.replace('"modality": "text"', f'"modality": "{"x" * 10**6}"').encode(),
            "modality is 'x+",
        ),
        "shards and parts": (
            lambda t: t.replace('"shards":', '"parts": [], "shards":', 1).encode(),
            "expected either parts or shards",
        ),
    }.items()
}
FILE_DAMAGE = {
    "missing shard": (lambda m: (m.parent / SHARD).unlink(), f"{SHARD}: the shard is missing"),
    "missing index": (
        lambda m: (m.parent / INDEX).unlink(),
        f"{INDEX}: the index of shard {SHARD} is missing",
    ),
    "truncated shard": (
        lambda m: os.truncate(m.parent / SHARD, payload(m)[1] + 10),
        (
            f"{SHARD}: the shard has .* truncated, 15 samples, the first is sample "
            "train-000000025 .tokens.npy, offset"
        ),
    ),
    "longer shard": (
        lambda m: (m.parent / SHARD).open("ab").write(b"x"),
        f"{SHARD}: the shard has .*too long",
    ),
    "shards swapped": (
        lambda m: os.replace(m.parent / "train-000000.tar", m.parent / SHARD),
        "train-000000.tar: the shard is missing",
    ),
}
HASH_DAMAGE = {
    "flipped bit in a sample": (
        lambda m: flip(m.parent / SHARD, payload(m)[1] + 140),
        (
            f"{SHARD}: sha256 of the shard .*damaged, 1 samples, the first is sample "
            "train-000000025 .tokens.npy, offset"
        ),
    ),
    "flipped bit in a header": (
        lambda m: flip(m.parent / SHARD, payload(m)[1] - 512),
        f"{SHARD}: sha256 .*damaged, outside of its samples",
    ),
    "flipped bit in an index": (
        lambda m: flip(m.parent / INDEX, 100),
        f"{INDEX}: sha256 of the index",
    ),
    "index of another shard": (
        lambda m: (m.parent / INDEX).write_bytes(
            (m.parent / "train-000000.index.json").read_bytes()
        ),
        f"{INDEX}: sha256 of the index",
    ),
    "index with fewer samples": (
        lambda m: edit_index(m, lambda v: v["keys"].pop()),
        f"{INDEX}: not an index .num_targets are .*: expected 19 whole numbers",
    ),
    "index that points outside": (
        lambda m: edit_index(
            m, lambda v: v["fields"]["tokens.npy"]["offsets"].__setitem__(3, 10**9)
        ),
        f"{INDEX}: does not fit",
    ),
    "index for another name": (
        lambda m: edit_index(m, lambda v: v.update(shard="train-000000.tar")),
        f"{INDEX}: does not fit shard {SHARD}",
    ),
    "index of nonsense": (
        lambda m: edit_index(m, lambda v: v.update(fields=7)),
        f"{INDEX}: not an index",
    ),
    "index version": (
        lambda m: edit_index(m, lambda v: v.update(index_version=9)),
        "index_version is 9",
    ),
}


def refuses(action, expected):
    with pytest.raises(DataError, match=expected) as error:
        action()
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize("name", MANIFEST_DAMAGE)
def test_damaged_manifest_is_one_clear_error(dataset, name):
    damage, expected = MANIFEST_DAMAGE[name]
    damage(dataset)
    refuses(lambda: open_split(dataset, "train", verify="sizes"), expected)


@pytest.mark.parametrize("verify", ["sizes", "hashes"])
@pytest.mark.parametrize("name", FILE_DAMAGE)
def test_missing_or_resized_file_is_found_at_opening(dataset, name, verify):
    damage, expected = FILE_DAMAGE[name]
    damage(dataset)
    refuses(lambda: open_split(dataset, "train", verify=verify), expected)
    assert any(
        name in p for p in verify_dataset(dataset)[0] for name in (SHARD, "train-000000.tar")
    )


@pytest.mark.parametrize("name", HASH_DAMAGE)
def test_changed_byte_is_found_at_opening_with_hashes(dataset, name):
    damage, expected = HASH_DAMAGE[name]
    damage(dataset)
    refuses(lambda: open_split(dataset, "train", verify="hashes"), expected)
    assert verify_dataset(dataset)[0]


def test_every_flipped_bit_of_a_manifest_is_another_manifest_or_one_line(dataset):
    whole, split = dataset.read_bytes(), open_split(dataset, "train", verify="sizes")
    for bit in random.Random(0).sample(range(8 * len(whole)), 1000):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        dataset.write_bytes(content)
        try:
            assert load_manifest(dataset).fingerprint != split.fingerprint, bit
        except DataError as error:
            assert "\n" not in str(error)


def column(name, value):
    return lambda v: v["fields"]["tokens.npy"].update({name: value})


def entry(name, value):
    return lambda v: v["fields"]["tokens.npy"][name].__setitem__(3, value)


INDEX_DAMAGE = {
    "offset + size overflow": lambda v: (entry("offsets", 2**63 - 10)(v), entry("sizes", 90)(v)),
    "an offset of 2^70": entry("offsets", 2**70),
    "an offset below zero": entry("offsets", -1),
    "a size below zero": entry("sizes", -1),
    "a size of 2^62": entry("sizes", 2**62),
    "a checksum of 2^40": entry("crc32", 2**40),
    "an offset that is a fraction": entry("offsets", 1536.5),
    "an offset that is a whole fraction": entry("offsets", 1536.0),
    "an offset that is true": entry("offsets", True),
    "an offset that is text": entry("offsets", "1536"),
    "an offset that is null": entry("offsets", None),
    "an offset that is a list": entry("offsets", [1536]),
    "no offsets": column("offsets", []),
    "offsets are a number": column("offsets", 3),
    "offsets are an object": column("offsets", {}),
    "no sizes": lambda v: v["fields"]["tokens.npy"].pop("sizes"),
    "a field that is a list": lambda v: v.update(fields={"tokens.npy": []}),
    "no field": lambda v: v.update(fields={}),
    "keys that are numbers": lambda v: v["keys"].__setitem__(3, 3),
    "a key with a line break": lambda v: v["keys"].__setitem__(3, "a\nb"),
    "half a surrogate in a key": lambda v: v["keys"].__setitem__(3, "\ud800"),
    "keys are text": lambda v: v.update(keys="train"),
    "targets are text": lambda v: v["num_targets"].__setitem__(3, "x"),
    "a sample that spans the shard": lambda v: v["fields"].update(
        more={"offsets": [0] * 20, "sizes": [2**30] * 20, "crc32": [0] * 20}
    ),
}


@pytest.mark.parametrize("name", INDEX_DAMAGE)
def test_an_index_of_nonsense_is_one_line_at_opening_reading_and_verification(dataset, name):
    edit_index(dataset, INDEX_DAMAGE[name])
    refuses(lambda: open_split(dataset, "train", verify="hashes"), INDEX)
    split = open_split(dataset, "train", verify="sizes")
    refuses(lambda: split.read(25), INDEX)
    known = {}
    assert read_or_replace(split, 25, known).states.shape == (17,)  # the next shard stands in
    assert known[25].key is None and known[25].replaced_by == 40
    assert any(INDEX in problem for problem in verify_dataset(dataset)[0])


@pytest.mark.parametrize("text", [b"[" * 10**5, b'{"a": NaN}', b"\xff", b"[]", b"null", b""])
def test_an_index_that_is_no_object_is_one_line(dataset, text):
    (dataset.parent / INDEX).write_bytes(text)
    digest = hashlib.sha256(text).hexdigest()
    edit(dataset, lambda v: v["splits"]["train"]["shards"][1].update(index_sha256=digest))
    refuses(lambda: open_split(dataset, "train", verify="hashes"), INDEX)


@pytest.mark.parametrize(
    "name", [n for n in HASH_DAMAGE if "header" not in n]
)  # a damaged tar header changes no sample
def test_changed_byte_is_found_when_the_sample_is_read(dataset, name):
    HASH_DAMAGE[name][0](dataset)
    split = open_split(dataset, "train", verify="sizes")
    assert np.array_equal(split.read(3), split.read(3))  # shard 0 is sound
    refuses(lambda: split.read(25), SHARD.split(".")[0])


def test_damaged_sample_is_named_with_key_and_offset(dataset):
    key, offset = payload(dataset)
    flip(dataset.parent / SHARD, offset + 140)
    split = open_split(dataset, "train", verify="sizes")
    refuses(
        lambda: split.read(25),
        f"{SHARD}: sample {key} .tokens.npy, offset {offset}, .*checksum is .*: damaged; "
        r".*tools/make_\*_shards\.py",
    )
    os.truncate(
        dataset.parent / SHARD, offset + 140
    )  # cut while open: another process overwrote the dataset
    refuses(lambda: split.read(25), f"{SHARD}: sample {key} .*truncated")


@pytest.mark.parametrize(
    "value, expected", [(np.zeros(9, "<u2"), r"\(9,\)"), (np.zeros(17, "<f4"), "float32")]
)
def test_sample_that_does_not_fit_the_manifest_is_refused(pristine, value, expected):
    manifest, stream, fitting = load_manifest(pristine), io.BytesIO(), io.BytesIO()
    np.save(stream, value)
    np.save(fitting, np.zeros(17, "<u2"))
    for content, message in (
        (stream.getvalue(), expected),
        (b"no array", "not a .npy array"),
        (fitting.getvalue()[:130], "not a .npy array"),
        (fitting.getvalue()[:30], "not a .npy array"),
        (fitting.getvalue() + b"x", "not a .npy array"),
    ):
        with pytest.raises(ValueError, match=message):
            manifest.content.decode({"tokens.npy": content}, manifest.block_length)


def test_tokens_beyond_the_vocabulary_are_found_by_loading_and_by_verification(dataset):
    edit(dataset, lambda v: v.update(vocabulary_size=100))
    split = open_split(dataset, "train", verify="sizes")
    loader = BatchLoader(
        split,
        context_length=16,
        global_batch_size=8,
        micro_batch_size=8,
        rank=0,
        world_size=1,
        seed=0,
        window_shards=2,
        num_workers=0,
    )
    refuses(
        lambda: next(loader),
        "must be below the vocabulary size 100; find it with tools/verify_shards.py",
    )
    assert any("must be below the vocabulary size 100" in p for p in verify_dataset(dataset)[0])


def test_sound_dataset_has_no_problem(pristine):
    problems, num_samples = verify_dataset(pristine)
    assert problems == [] and num_samples == sum(
        s.num_samples for s in load_manifest(pristine).splits.values()
    )


def test_damaged_tokenizer_is_found_by_verification(dataset):
    flip(dataset.parent / "tokenizer.model", 50)
    assert any("tokenizer.model" in p for p in verify_dataset(dataset)[0])


def test_fingerprint_follows_the_content_not_the_spelling(dataset, pristine):
    values = json.loads(dataset.read_text())
    dataset.write_text(json.dumps(dict(reversed(values.items()))))
    same = open_split(dataset, "train", verify="sizes").fingerprint
    assert (
        same == open_split(pristine, "validation", verify="sizes").fingerprint and len(same) == 64
    )
    edit(dataset, lambda v: first_train_shard(v).update(sha256="0" * 64))
    assert open_split(dataset, "train", verify="sizes").fingerprint != same


def test_split_survives_pickling_and_many_shards(pristine, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_FILES", 2)
    split = open_split(pristine, "train", verify="sizes")
    everything = [split.read(i) for i in range(len(split))]
    assert len(split._files) == 2 < len(split.samples_per_shard)
    copy = pickle.loads(pickle.dumps(split))
    assert (
        copy._files == {}
        and copy._indexes == {}
        and split.read(0).tolist() == everything[0].tolist()
    )
    assert all(np.array_equal(copy.read(i), everything[i]) for i in reversed(range(len(split))))
    with pytest.raises(IndexError):
        split.read(len(split))
    with pytest.raises(IndexError):
        split.read(-1)


def test_a_split_that_is_never_closed_ends_without_a_word(pristine):
    """What another module holds outlives the modules that a split is made of."""
    program = f"""
import torch, ebwm_scale
from ebwm_scale.data.format.shards import open_split
split = open_split({str(pristine)!r}, "validation", verify="sizes")
split.read(0)
torch.kept = split
"""
    process = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (process.returncode, process.stderr) == (0, "")


def test_huge_dataset_is_checked_by_size_and_says_so(dataset, monkeypatch):
    flip(dataset.parent / SHARD, payload(dataset)[1] + 140)
    monkeypatch.setattr(shards, "HASH_LIMIT_BYTES", 1000)
    said = []
    split = open_split(dataset, "train", verify="hashes", report=said.append)
    assert len(said) == 1 and "checking sizes only" in said[0]
    refuses(lambda: split.read(25), "checksum")
