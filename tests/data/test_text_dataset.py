import json
import os
import subprocess
import sys

import numpy as np
import pytest
import webdataset
from corpora import CONTEXT_LENGTH, found, read_documents, write_corpus

from ebwm_scale.core.errors import DataError
from ebwm_scale.data.format.shards import open_split
from ebwm_scale.data.prepare import packing, text
from ebwm_scale.data.prepare.packing import Packer
from ebwm_scale.data.prepare.splitting import split_documents
from ebwm_scale.data.prepare.text import make_text_dataset
from ebwm_scale.data.tokenizer import open_tokenizer


def quiet(line):
    pass


def build(inputs, output, tokenizer_path, **changes):
    return make_text_dataset(
        inputs,
        output,
        **{
            "tokenizer": tokenizer_path,
            "context_length": CONTEXT_LENGTH,
            "report": quiet,
            **changes,
        },
    )


def blocks_of(manifest, split):
    opened = open_split(manifest, split, verify="hashes")
    return np.stack([opened.read(i) for i in range(len(opened))]).astype(np.int64)


@pytest.mark.parametrize(
    "pieces, length",
    [
        ([[1, 2, 3], [4], [], [5, 6, 7, 8, 9]], 3),
        ([list(range(100))], 7),
        ([[1]] * 30, 4),
        ([[1, 2]], 5),
        ([], 2),
        ([list(range(9))], 8),
        ([list(range(9))], 1),
    ],
)
def test_every_token_is_a_target_exactly_once(pieces, length):
    packer = Packer(context_length=length, vocabulary_size=200)
    blocks = list(packer.blocks(pieces))
    stream = [t for piece in pieces for t in piece]
    targets = [int(t) for block in blocks for t in block[1:]]
    assert all(len(block) == length + 1 for block in blocks)
    assert (
        targets == stream[1 : 1 + len(targets)]
        and [int(b[0]) for b in blocks] == stream[: len(targets) : length]
    )
    assert packer.num_dropped == max(len(stream) - 1 - len(targets), 0) < max(length, 1)
    assert packer.num_tokens == len(stream) and packer.counts.sum() == len(targets)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_dataset_holds_the_split_documents_in_order_with_an_end_after_each(
    pristine, corpus, tokenizer_path, split
):
    tokenizer = open_tokenizer(tokenizer_path)
    documents = split_documents(read_documents(corpus), validation_fraction=0.2, seed=0)[split]
    stream = [i for d in documents for i in tokenizer.encode(d.text) + [tokenizer.eos_id]]
    blocks = blocks_of(pristine, split)
    info = open_split(pristine, split, verify="sizes").info
    got = [int(blocks[0, 0]), *blocks[:, 1:].ravel().tolist()]
    assert (
        got == stream[: len(got)]
        and len(stream) - len(got) == info.facts["num_dropped_tokens"] < CONTEXT_LENGTH
    )
    assert (
        info.facts["num_documents"] == len(documents)
        and info.num_targets == len(got) - 1
        and tokenizer.eos_id in got
    )
    p = np.bincount(got[1:]) / (len(got) - 1)
    assert info.facts["unigram_entropy"] == pytest.approx(
        -(p[p > 0] * np.log(p[p > 0])).sum(), rel=1e-12
    )
    assert info.facts["num_text_bytes"] == sum(len(d.text.encode()) for d in documents)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_plain_webdataset_reads_the_same_tokens(pristine, split):
    opened = open_split(pristine, split, verify="sizes")
    urls = [str(opened.manifest.folder / shard.path) for shard in opened.info.shards]
    assert len(urls) > 1
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert len(samples) == len(opened) and len({s["__key__"] for s in samples}) == len(opened)
    assert all(np.array_equal(s["tokens.npy"], opened.read(i)) for i, s in enumerate(samples))


def test_wide_vocabularies_are_stored_in_32_bits():
    block = next(Packer(context_length=2, vocabulary_size=70000).blocks([[69999, 1, 2]]))
    assert block.dtype == np.dtype("<u4") and block[0] == 69999
    assert Packer(context_length=2, vocabulary_size=65535).dtype == np.dtype("<u2")


def test_split_is_disjoint_and_stable_when_files_move_or_are_added(tmp_path):
    write_corpus(tmp_path / "a", num_documents=40)
    write_corpus(tmp_path / "b", num_documents=10, seed=9)
    sides = {}
    for inputs in ([tmp_path / "a"], [tmp_path / "b", tmp_path / "a"], [tmp_path]):
        split = split_documents(read_documents(*inputs), validation_fraction=0.2, seed=3)
        train, validation = ({d.text for d in split[name]} for name in ("train", "validation"))
        assert train and validation and not train & validation
        for name, documents in (("train", train), ("validation", validation)):
            for document in documents:
                assert sides.setdefault(document, name) == name
    assert len(sides) == 50
    other = split_documents(read_documents(tmp_path), validation_fraction=0.2, seed=4)
    assert {d.digest for d in other["validation"]} != {d.digest for d in split["validation"]}


def test_copies_of_a_text_are_on_one_side(tmp_path):
    for i in range(30):
        for copy in "ab":
            (tmp_path / f"{i}{copy}.txt").write_text(f"text number {i}")
    split = split_documents(read_documents(tmp_path), validation_fraction=0.3, seed=0)
    assert sum(map(len, split.values())) == 60
    assert not {d.digest for d in split["train"]} & {d.digest for d in split["validation"]}


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_each_side_gets_a_document(tmp_path, fraction):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    assert [
        len(d)
        for d in split_documents(
            read_documents(tmp_path), validation_fraction=fraction, seed=0
        ).values()
    ] == [1, 1]


def test_jsonl_lines_are_documents_and_bad_ones_are_named(tmp_path):
    lines = [
        json.dumps({"text": "first é"}),
        "not json",
        json.dumps({"other": 1}),
        "",
        json.dumps({"text": "second", "url": "x"}),
        json.dumps({"text": 3}),
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    documents, said = found(tmp_path)
    assert documents == {"a.jsonl#1": "first é", "a.jsonl#5": "second"}
    assert len(said) == 1 and "3 lines skipped" in said[0] and "line 2 (not JSON)" in said[0]


def test_undecodable_files_are_skipped_and_named(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bad.txt").write_bytes(b"ab\xff\xfe")
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / "program.py").write_text("pass")
    texts, said = found(tmp_path, tmp_path / "good.txt")
    assert list(texts) == ["good.txt"]
    assert len(said) == 3 and "bad.txt" in said[0] and "not UTF-8 at byte 2" in said[0]
    assert said[1] == "ignored: 1 files of other kinds (.py)"
    assert "1 documents of nothing but white space" in said[2] and "empty.txt" in said[2]


def fill(folder, files):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    "files, changes, expected",
    [
        ({}, {}, "no text found"),
        ({"a.txt": b"\xff", "b.txt": b"\xfe"}, {}, "2 of them not readable as UTF-8"),
        ({"a.txt": b"words " * 50}, {}, "1 different documents: .* at least 2"),
        ({"a.txt": b"words " * 50, "b.txt": b"words " * 50}, {}, "1 different documents"),
        ({"a.txt": b"a", "b.txt": b"b"}, {}, "needs 17; give more text"),
        (
            {"a.txt": b"word " * 50, "b.txt": b"other " * 50},
            {"validation_fraction": 0.0},
            "validation fraction is 0.0",
        ),
        (
            {"a.txt": b"word " * 50, "b.txt": b"other " * 50},
            {"context_length": 0},
            "context length is 0",
        ),
        (
            {"a.txt": b"word " * 50, "b.txt": b"other " * 50},
            {"tokenizer": "missing.model"},
            "missing.model: cannot read the tokenizer",
        ),
    ],
)
def test_unusable_input_is_one_clear_error_and_leaves_nothing(
    tmp_path, tokenizer_path, files, changes, expected
):
    fill(tmp_path / "in", files)
    with pytest.raises(DataError, match=expected) as error:
        build([tmp_path / "in"], tmp_path / "out", tokenizer_path, **changes)
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_missing_input_is_named(tmp_path, tokenizer_path):
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        build([tmp_path / "nowhere"], tmp_path / "out", tokenizer_path)


def test_same_inputs_give_the_same_fingerprint_anywhere(corpus, tokenizer_path, pristine, tmp_path):
    again = build(
        [corpus], tmp_path / "other", tokenizer_path, validation_fraction=0.2, samples_per_shard=20
    )
    names = sorted(p.name for p in again.parent.iterdir())
    assert names == sorted(p.name for p in pristine.parent.iterdir())
    assert all((again.parent / n).read_bytes() == (pristine.parent / n).read_bytes() for n in names)


def test_second_run_keeps_the_dataset_and_other_settings_are_refused(
    corpus, tokenizer_path, dataset
):
    before, said = dataset.stat().st_mtime_ns, []
    same = {"validation_fraction": 0.2, "samples_per_shard": 20}
    build([corpus], dataset.parent, tokenizer_path, report=said.append, **same)
    assert "already there" in said[0] and dataset.stat().st_mtime_ns == before
    with pytest.raises(DataError, match="differs in settings"):
        build(
            [corpus], dataset.parent, tokenizer_path, validation_fraction=0.3, samples_per_shard=20
        )
    with pytest.raises(DataError, match="differs in block_length"):
        build([corpus], dataset.parent, tokenizer_path, context_length=8, **same)
    with pytest.raises(DataError, match="differs in documents"):
        build([corpus / "deep"], dataset.parent, tokenizer_path, **same)
    assert dataset.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda m: m.unlink(),
        lambda m: m.write_text("{"),
        lambda m: (m.parent / "train-000001.tar").unlink(),
        lambda m: os.truncate(m.parent / "train-000000.tar", 5000),
    ],
)
def test_half_made_dataset_is_replaced(corpus, tokenizer_path, dataset, pristine, damage):
    damage(dataset)
    build([corpus], dataset.parent, tokenizer_path, validation_fraction=0.2, samples_per_shard=20)
    assert {p.name: p.read_bytes() for p in dataset.parent.iterdir()} == {
        p.name: p.read_bytes() for p in pristine.parent.iterdir()
    }
    assert [p.name for p in dataset.parent.parent.iterdir()] == [dataset.parent.name]


def test_foreign_files_in_the_output_folder_are_never_deleted(corpus, tokenizer_path, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(DataError, match="already holds thesis.tex"):
        build([corpus], tmp_path / "out", tokenizer_path)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize("module, failing", [(text, "write_manifest"), (packing, "_link")])
def test_a_build_that_fails_leaves_its_work_and_the_next_one_goes_on(
    corpus, tokenizer_path, tmp_path, monkeypatch, module, failing
):
    def fail(*arguments):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(module, failing, fail)
        with pytest.raises(OSError, match="disk full"):
            build([corpus], tmp_path / "out", tokenizer_path)
    assert [path.name for path in tmp_path.iterdir()] == [".out.work"]
    assert len(blocks_of(build([corpus], tmp_path / "out", tokenizer_path), "train")) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


KILLED = """
import os, signal, sys
from ebwm_scale.data.prepare import text
text.write_manifest = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
text.make_text_dataset([sys.argv[1]], sys.argv[2], tokenizer=sys.argv[3], context_length=16)
"""


def test_a_killed_build_leaves_no_dataset_and_the_next_succeeds(corpus, tokenizer_path, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, corpus, tmp_path / "out", tokenizer_path],
        capture_output=True,
    )
    assert (
        done.returncode == -9
        and not (tmp_path / "out").exists()
        and (tmp_path / ".out.partial").exists()
    )
    assert len(blocks_of(build([corpus], tmp_path / "out", tokenizer_path), "train")) > 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_two_builders_of_one_dataset_wait_for_each_other(corpus, tokenizer_path, tmp_path):
    program = KILLED.replace("text.write_manifest", "ignored")
    command = [sys.executable, "-c", program, corpus, tmp_path / "out", tokenizer_path]
    outputs = [
        p.communicate(timeout=60)[0]
        for p in [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for _ in "ab"
        ]
    ]
    assert sum("already there" in o for o in outputs) == 1 and all(
        "train: " in o for o in outputs
    ), outputs
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


PEAK = """
import resource, sys
from ebwm_scale.data.prepare.text import make_text_dataset
folder, output, model = sys.argv[1:]
make_text_dataset([folder], output, tokenizer=model, context_length=4096, report=str)
whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
print(max(resource.getrusage(who).ru_maxrss for who in whose) * 1024)
"""


def peak_bytes(folder, tokenizer_path, num_bytes):
    """Of a process that packs one document of that size, and a small one."""
    words = "energy minimum step field query model token slow deep think\n"
    (folder / "in").mkdir(parents=True)
    (folder / "in" / "large.txt").write_text(words * (num_bytes // len(words)))
    (folder / "in" / "small.txt").write_text("gradient descent state block order " * 2000)
    command = [sys.executable, "-c", PEAK, folder / "in", folder / "out", tokenizer_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_memory_is_a_small_multiple_of_the_largest_document(tokenizer_path, tmp_path):
    small, large = 2**20, 9 * 2**20  # from the first on, a batch of parts is full
    more = peak_bytes(tmp_path / "large", tokenizer_path, large)
    more -= peak_bytes(tmp_path / "small", tokenizer_path, small)
    assert more < 6 * (large - small)  # it was 60; the text, its bytes and what reads them: 3


def test_a_document_in_parts_gives_the_bytes_of_the_whole(
    corpus, tokenizer_path, pristine, tmp_path, monkeypatch
):
    monkeypatch.setattr("ebwm_scale.data.tokenizers.sentence_piece._PART_CHARACTERS", 50)
    monkeypatch.setattr(text, "_BATCH_CHARACTERS", 120)
    again = build(
        [corpus], tmp_path / "o", tokenizer_path, validation_fraction=0.2, samples_per_shard=20
    )
    for path in pristine.parent.iterdir():
        assert (again.parent / path.name).read_bytes() == path.read_bytes()
