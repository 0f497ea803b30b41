"""Token ids that other projects wrote give the dataset that their texts give."""

import gzip
import json
import struct

import numpy as np
import pytest
from corpora import CONTEXT_LENGTH, read_documents

from ebwm_scale.core.errors import DataError
from ebwm_scale.data.prepare.reading import token_files
from ebwm_scale.data.prepare.reading.left_out import LeftOut
from ebwm_scale.data.prepare.reading.token_input import TokenInput
from ebwm_scale.data.prepare.text import make_text_dataset
from ebwm_scale.data.tokenizer import open_tokenizer


def nanogpt(folder, documents, eos):
    stream = np.concatenate([[*ids, eos] for ids in documents])
    stream.astype("<u2").tofile(folder / "train.bin")


def nanogpt_packed(folder, documents, eos):
    stream = np.concatenate([[*ids, eos] for ids in documents])
    (folder / "train.bin.gz").write_bytes(gzip.compress(stream.astype("<u2").tobytes()))


def end_in_front(folder, documents, eos):
    """llm.c: a header of 256 numbers, and the end of sequence before each document."""
    stream = np.concatenate([[eos, *ids] for ids in documents])
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(stream)
    (folder / "a.bin").write_bytes(header.tobytes() + stream.astype("<u2").tobytes())


def lit_llama(folder, documents, eos):
    stream = np.concatenate([[*ids, eos] for ids in documents] + [[eos] * 40])  # filled up
    header = b"LITPKDS" + struct.pack("<QBQ", 1, 8, len(stream))
    (folder / "a.bin").write_bytes(header + stream.astype("<u2").tobytes())


def megatron(folder, documents, eos):
    """The first document as two sequences; each document ends with the end of sequence."""
    first, *others = [[*ids, eos] for ids in documents]
    sequences = [first[:3], first[3:], *others]
    sizes = np.array([len(ids) for ids in sequences], dtype="<i4")
    pointers = 4 * (np.cumsum(sizes, dtype="<i8") - sizes)
    index = np.array([0, *range(2, len(sequences) + 1)], dtype="<i8")
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, len(sizes), len(index))
    content = head + sizes.tobytes() + pointers.astype("<i8").tobytes() + index.tobytes()
    (folder / "a_text_document.idx").write_bytes(content)
    np.concatenate(sequences).astype("<i4").tofile(folder / "a_text_document.bin")


def litgpt(folder, documents, eos):
    """Two chunks of litdata: where documents begin, and their ids."""
    chunks = []
    half = len(documents) // 2
    for number, part in enumerate((documents[:half], documents[half:])):
        sizes = [4 * len(ids) for ids in part]
        offsets = 4 * (len(part) + 2) + np.concatenate([[0], np.cumsum(sizes)])
        content = np.array([len(part), *offsets], dtype="<u4").tobytes()
        content += np.concatenate(part).astype("<i4").tobytes()
        name = f"chunk-0-{number}.bin"
        (folder / name).write_bytes(content)
        chunks.append({"filename": name, "chunk_size": len(part), "chunk_bytes": len(content)})
    config = {"compression": None, "data_format": ["no_header_tensor:16"], "item_loader": "Tokens"}
    (folder / "index.json").write_text(json.dumps({"chunks": chunks, "config": config}))


def vector_with_starts(folder, documents, eos):
    np.save(folder / "a.npy", np.concatenate(documents).astype("<u4"))
    sizes = [len(ids) for ids in documents]
    np.save(folder / "a.starts.npy", np.cumsum([0, *sizes[:-1]]))


WRITERS = {
    f.__name__: f
    for f in (
        nanogpt,
        nanogpt_packed,
        end_in_front,
        lit_llama,
        megatron,
        litgpt,
        vector_with_starts,
    )
}


@pytest.fixture(scope="module")
def ids_of_documents(corpus, tokenizer_path):
    tokenizer = open_tokenizer(tokenizer_path)
    return [tokenizer.encode(d.text) for d in read_documents(corpus)], tokenizer


def read(folder, tokenizer, kind="uint16"):
    how = TokenInput(tokenizer, kind)
    sources = how.find([folder], LeftOut(), print)
    return [d.ids.tolist() for source in sources for d in how.read(source, LeftOut())]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("piece_bytes", [4, 2**22])
def test_documents_are_those_that_were_written(
    ids_of_documents, tmp_path, name, piece_bytes, monkeypatch
):
    documents, tokenizer = ids_of_documents
    WRITERS[name](tmp_path, documents, tokenizer.eos_id)
    monkeypatch.setattr(token_files, "_PIECE_BYTES", piece_bytes)
    assert read(tmp_path, tokenizer) == documents


def test_ids_give_the_bytes_that_their_texts_give(
    pristine, ids_of_documents, tokenizer_path, tmp_path
):
    documents, tokenizer = ids_of_documents
    (tmp_path / "ids").mkdir()
    nanogpt(tmp_path / "ids", documents, tokenizer.eos_id)
    manifest = make_text_dataset(
        [tmp_path / "ids"],
        tmp_path / "out",
        tokenizer=tokenizer_path,
        context_length=CONTEXT_LENGTH,
        validation_fraction=0.2,
        samples_per_shard=20,
        tokens="uint16",
        report=str,
    )
    names = sorted(path.name for path in pristine.parent.iterdir())
    assert sorted(path.name for path in manifest.parent.iterdir()) == names
    for name in names:
        ours, theirs = (manifest.parent / name).read_bytes(), (pristine.parent / name).read_bytes()
        if name == "manifest.json":
            ours, theirs = json.loads(ours), json.loads(theirs)
            assert ours["source"].pop("inputs") == ["ids"] and theirs["source"].pop("inputs")
        assert ours == theirs, name


def refused(folder, tokenizer, kind="uint16"):
    with pytest.raises(DataError) as error:
        read(folder, tokenizer, kind)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_ids_that_are_not_the_tokenizers_are_refused(ids_of_documents, tmp_path):
    documents, tokenizer = ids_of_documents
    nanogpt(tmp_path, [documents[0], [5, tokenizer.vocabulary_size]], tokenizer.eos_id)
    assert f"document 2 has the token {tokenizer.vocabulary_size}" in refused(tmp_path, tokenizer)
    assert "nowhere in it" in refused(tmp_path, tokenizer, "uint32")
    np.array([5, 6, 7], dtype="<u2").tofile(tmp_path / "train.bin")
    assert "end of sequence, 1, is nowhere in it" in refused(tmp_path, tokenizer)
    (tmp_path / "train.bin").write_bytes(b"\x05\x00\x01\x00\x07")
    assert "ends in the middle of its ids of 2 bytes" in refused(tmp_path, tokenizer)


@pytest.mark.parametrize("name", ["megatron", "litgpt", "vector_with_starts"])
def test_a_cut_file_with_an_index_is_refused(ids_of_documents, tmp_path, name):
    documents, tokenizer = ids_of_documents
    WRITERS[name](tmp_path, documents, tokenizer.eos_id)
    (path,) = sorted(p for p in tmp_path.glob("*.*") if p.suffix in (".bin", ".npy"))[:1]
    path.write_bytes(path.read_bytes()[:-6])
    assert path.name in refused(tmp_path, tokenizer)


def test_indexes_that_do_not_fit_are_refused(ids_of_documents, tmp_path):
    documents, tokenizer = ids_of_documents
    megatron(tmp_path, documents, tokenizer.eos_id)
    index = tmp_path / "a_text_document.idx"
    whole = index.read_bytes()
    for content, said in (
        (b"TNTIDX" + whole[6:], "does not begin with its mark"),
        (whole[:40], "not an index of Megatron"),
        (whole[:17] + b"\x07" + whole[18:], "type number 7"),
    ):
        index.write_bytes(content)
        assert said in refused(tmp_path, tokenizer)
    index.unlink()
    (tmp_path / "a_text_document.bin").unlink()
    np.save(tmp_path / "a.npy", np.zeros((2, 3), dtype="<u2"))
    assert "must be a vector of ids" in refused(tmp_path, tokenizer)
    np.save(tmp_path / "a.npy", np.zeros(3))
    assert "holds <f8, not whole numbers" in refused(tmp_path, tokenizer)
    np.save(tmp_path / "a.npy", np.zeros(3, dtype="<u2"))
    np.save(tmp_path / "a.starts.npy", np.array([2, 0]))
    assert "that do not fall" in refused(tmp_path, tokenizer)
