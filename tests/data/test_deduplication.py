"""Exact copies of documents, within and across sources: one is kept, or none, and it is said."""

import json
from collections import Counter

import numpy as np
import pytest
from corpora import WORDS

from ebwm_scale.core.errors import DataError
from ebwm_scale.data.format.manifest import load_manifest
from ebwm_scale.data.format.shards import open_split
from ebwm_scale.data.prepare import runs as runs_module
from ebwm_scale.data.prepare.text import make_text_dataset
from ebwm_scale.data.tokenizer import open_tokenizer


def texts(number, *, first=0):
    draw = np.random.default_rng(first)
    sizes = draw.integers(1, 6, number)
    return [f"{first + i} {' '.join(draw.choice(WORDS, size=int(n)))}" for i, n in enumerate(sizes)]


def write(path, values):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in values))
    return path


def make(inputs, output, **options):
    """(manifest, what was said)."""
    said = []
    settings = dict(tokenizer="bytes", context_length=8, validation_fraction=0.2)
    manifest = make_text_dataset(inputs, output, report=said.append, **settings, **options)
    return manifest, said


def documents_of(manifest):
    """Counter of the whole documents of both splits, read from the blocks."""
    found = Counter()
    for name in ("train", "validation"):
        split = open_split(manifest, name, verify="sizes")
        tokenizer = open_tokenizer(split.manifest.content.tokenizer_path)
        stream = [split.read(0)[:1], *(split.read(i)[1:] for i in range(len(split)))]
        tokens = np.concatenate(stream)
        ends = np.flatnonzero(tokens == split.manifest.content.eos_id)
        pieces = np.split(tokens, ends + 1)[: len(ends)]
        found += Counter(tokenizer.decode(piece[:-1].tolist()) for piece in pieces)
    return found


@pytest.fixture
def sources(tmp_path):
    """a: 40 documents, 10 of them twice; b: 30, of which 12 are also in a; c: 5 of a."""
    a, b = texts(40), texts(18, first=100)
    return {
        "a": write(tmp_path / "a.jsonl", [*a, *a[:10]]),
        "b": write(tmp_path / "b.jsonl", [*b, *a[20:32]]),
        "c": write(tmp_path / "c.jsonl", a[:5]),
        "texts": {"a": a, "b": b},
    }


@pytest.mark.parametrize("bucket_bytes", [pytest.param(2**25, marks=pytest.mark.soak), 2**9])
def test_one_of_each_is_kept_across_sources(sources, tmp_path, monkeypatch, bucket_bytes):
    monkeypatch.setattr(runs_module, "_BUCKET_BYTES", bucket_bytes)
    manifest, said = make([sources["a"], sources["b"]], tmp_path / "out", deduplicate=True)
    expected = set(sources["texts"]["a"]) | set(sources["texts"]["b"])
    found = documents_of(manifest)
    assert set(found.values()) == {1} and set(found) <= expected
    assert len(found) >= len(expected) - 2  # what is cut off at the end of each split
    loaded = load_manifest(manifest)
    assert loaded.source["num_documents"] == len(expected)
    assert sum(s.facts["num_documents"] for s in loaded.splits.values()) == len(expected)
    assert any("22 further copies" in line for line in said)
    # it is the dataset of the distinct documents, to the byte
    once = write(tmp_path / "once.jsonl", sorted(expected))
    plain, _ = make([once], tmp_path / "plain")
    assert [s.shards[0].sha256 for s in load_manifest(plain).splits.values()] == [
        s.shards[0].sha256 for s in loaded.splits.values()
    ]
    assert load_manifest(plain).source["documents_sha256"] == loaded.source["documents_sha256"]


@pytest.mark.parametrize("deduplicate", [False, True])
def test_documents_of_another_source_are_left_out(sources, tmp_path, deduplicate):
    options = dict(without=[sources["c"], sources["b"]], deduplicate=deduplicate)
    manifest, said = make([sources["a"]], tmp_path / "out", **options)
    a = sources["texts"]["a"]
    expected = Counter([*a, *a[:10]])
    for text in [*a[:5], *a[20:32]]:
        del expected[text]
    if deduplicate:
        expected = Counter(set(expected))
    found = documents_of(manifest)
    assert not found - expected and (expected - found).total() <= 2
    assert load_manifest(manifest).source["num_documents"] == expected.total()
    assert any("22 documents that are also in" in line and "c.jsonl" in line for line in said)
    assert any("5 further copies" in line for line in said) == deduplicate


def test_without_the_options_nothing_is_left_out(sources, tmp_path):
    manifest, said = make([sources["a"]], tmp_path / "out")
    assert load_manifest(manifest).source["num_documents"] == 50
    assert documents_of(manifest).most_common(1)[0][1] == 2
    assert not any("copies" in line for line in said)
    with pytest.raises(DataError, match="differs in settings"):
        make([sources["a"]], tmp_path / "out", deduplicate=True)


def test_nothing_left_is_one_line(sources, tmp_path):
    with pytest.raises(DataError, match="all 5 documents are left out by --without"):
        make([sources["c"]], tmp_path / "out", without=[sources["a"]])
    assert not (tmp_path / "out").exists()
