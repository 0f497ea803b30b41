"""Every kind of text that is read, against what was written and against pandas and pyarrow."""

import hashlib
import http.server
import json
import threading
from functools import partial

import pytest
from corpora import found, read_documents

pytest.importorskip("zstandard", reason="the package zstandard is not installed")

import kinds_of_text as kinds
import numpy as np
from kinds_of_text import PACKERS, WRITERS, texts

from ebwm_scale.data.format.manifest import load_manifest
from ebwm_scale.data.format.shards import open_split
from ebwm_scale.data.prepare.reading import json_records, opening, source, tasks
from ebwm_scale.data.prepare.reading.left_out import LeftOut
from ebwm_scale.data.prepare.reading.readers import TextInput, documents_of
from ebwm_scale.data.prepare.reading.selection import EVERYTHING, Selection, parse_filter
from ebwm_scale.data.prepare.text import make_text_dataset


def texts_in(*inputs, **selected):
    return [d.text for d in read_documents(*inputs, selection=Selection(**selected))]


def hash_of(values):
    return hashlib.sha256("\0".join(sorted(values)).encode()).hexdigest()


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    folder = tmp_path_factory.mktemp("everything")
    return folder, kinds.write_one_of_everything(folder)


def test_one_of_everything_is_read_and_nothing_else(everything):
    folder, expected = everything
    documents, said = found(folder)
    wanted = [text for values in expected.values() for text in values]
    assert len(documents) == len(wanted) == len(set(wanted))
    assert hash_of(documents.values()) == hash_of(wanted)
    assert said == [f"ignored: {5 * 3} files of other kinds (.mp4 x 15)"]


def test_a_dataset_of_one_of_everything_holds_every_text_once(everything, tmp_path):
    """Number and hash are those of an independent reading with pandas, pyarrow and tarfile. Read
    back from the blocks: to the tail that fills none, which is at most a block a split.
    """
    folder, _ = everything
    wanted = kinds.read_folder_independently(folder)
    manifest = make_text_dataset(
        [folder], tmp_path / "out", tokenizer="bytes", context_length=16, report=lambda line: None
    )
    loaded = load_manifest(manifest)
    digests = sorted(hashlib.sha256(text.encode()).hexdigest() for text in wanted)
    assert loaded.source["num_documents"] == len(wanted)
    assert loaded.source["documents_sha256"] == hash_of_lines(digests)
    read = []
    for name in loaded.splits:
        split = open_split(manifest, name, verify="hashes")
        blocks = [split.read(i) for i in range(len(split))]
        tokens = np.concatenate([blocks[0][:1], *(block[1:] for block in blocks)])
        ends = np.flatnonzero(tokens == loaded.content.eos_id)
        pieces = np.split(tokens, ends + 1)[: len(ends)]
        read += [bytes(piece[:-1].tolist()).decode() for piece in pieces]
    assert set(read) <= set(wanted) and len(set(read)) == len(read) >= len(wanted) - 2


def hash_of_lines(lines):
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_each_file_holds_what_pandas_and_pyarrow_read_in_it(everything):
    folder, expected = everything
    for name in expected:
        path = folder / name
        assert texts_in(path) == kinds.read_independently(path.name, path.read_bytes()), name
    assert len(expected) == 5 * (3 + len(WRITERS) + 2) + 3


def test_saved_datasets_of_hugging_face_are_their_arrow_files(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    splits = {name: datasets.Dataset.from_dict({"text": texts(name)}) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    documents, said = found(tmp_path / "saved")
    assert sorted(documents.values()) == sorted(texts("train") + texts("test"))
    assert len(said) == 1 and "all splits of this saved dataset are read" in said[0]
    assert texts_in(tmp_path / "saved" / "test") == texts("test")
    chosen = splits["train"].select([2, 0])
    chosen.save_to_disk(tmp_path / "chosen")
    assert texts_in(tmp_path / "chosen") == [texts("train")[2], texts("train")[0]]


def test_fields_in_objects_identities_and_filters(tmp_path):
    rows = [
        {"meta": {"lang": "en", "score": 0.9}, "doc": {"body": "one"}, "url": "u/1"},
        {"meta": {"lang": "de", "score": 0.9}, "doc": {"body": "zwei"}, "url": "u/2"},
        {"meta": {"lang": "en", "score": 0.1}, "doc": {"body": "three"}, "url": "u/3"},
        {"meta": {"lang": "en"}, "doc": {"body": "four"}, "url": "u/4"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = kinds.pyarrow.Table.from_pylist(rows)
    kinds.pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    filters = (parse_filter("meta.lang == en"), parse_filter("meta.score >= 0.5"))
    selection = Selection("doc.body", "url", filters, True)
    for name in ("a.jsonl", "b.parquet"):
        documents, said = found(tmp_path / name, selection=selection)
        assert documents == {"u/1": "one"}
        assert said[0] == "ignored: 2 records for which the filters do not hold"
        assert "1 records without the value that a filter looks at" in said[1]
        assert said[1].endswith("#4" if name == "a.jsonl" else "#3")


@pytest.mark.parametrize(
    "text, holds",
    [
        ("n == 3", True),
        ("n != 3", False),
        ("n > 2.5", True),
        ('word in ["a", "b"]', True),
        ('word not in ["a"]', False),
        ("word contains a", True),
        ("tags contains 7", True),
        ("flag == true", True),
        ("word == b", False),
        ("digits < 10", True),
        ("absent == 1", None),
        ("null == 1", None),
    ],
)
def test_filters_say_whether_they_hold(text, holds):
    record = {"n": 3, "word": "a", "tags": [7], "flag": True, "digits": "9", "null": None}
    assert parse_filter(text).holds(record) is holds


def test_parts_of_a_large_file_are_the_file(tmp_path, monkeypatch):
    values = [f"text {i} " + "x" * (i % 37) for i in range(300)]
    (tmp_path / "a.jsonl").write_bytes(kinds.as_lines(values))
    sink = tmp_path / "b.parquet"
    kinds.pyarrow.parquet.write_table(kinds.table_of(values), sink, row_group_size=20)
    monkeypatch.setattr(tasks, "TASK_BYTES", 1000)
    for path in (tmp_path / "a.jsonl", tmp_path / "b.parquet"):
        made = tasks.tasks_of(TextInput().find([path], LeftOut(), print))
        assert len(made) > 5 and sum(task.size for task in made) <= path.stat().st_size
        sources = [s for task in made for s in task.sources]
        read = [d.text for s in sources for d in documents_of(s, EVERYTHING, LeftOut())]
        assert read == values
        assert len({task.key([], "") for task in made}) == len(made)


def test_a_list_is_taken_apart_wherever_the_window_ends(tmp_path, monkeypatch):
    values = [
        {"text": f'[{i}] "a\\ {{}}' + "é" * (i % 7), "n": [i, {"x": -1.5e3}]} for i in range(40)
    ]
    content = json.dumps(values, indent=2, ensure_ascii=False)
    (tmp_path / "a.json").write_text("\ufeff \n" + content + "\n ", encoding="utf-8")
    (tmp_path / "b.json").write_text("\n\n".join(map(json.dumps, values)))
    (tmp_path / "c.json").write_text("[ ]")
    for size in (1, 2, 3, 7, 64, 2**18):
        monkeypatch.setattr(json_records, "_CHUNK_BYTES", size)
        for name in ("a.json", "b.json"):
            assert texts_in(tmp_path / name) == [value["text"] for value in values], (name, size)
        assert texts_in(tmp_path / "c.json") == []


def test_globs_and_the_same_file_twice(tmp_path):
    for name in ("x/a.txt", "x/deep/b.txt", "y/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts_in(f"{tmp_path}/*/*.txt") == ["x/a.txt", "y/c.txt"]
    assert sorted(texts_in(f"{tmp_path}/**", tmp_path / "x")) == [
        "x/a.txt",
        "x/deep/b.txt",
        "y/c.txt",
    ]
    (tmp_path / "odd[1].txt").write_text("a name, and no pattern")
    assert texts_in(tmp_path / "odd[1].txt") == ["a name, and no pattern"]


def test_clips_give_their_caption_or_the_field_of_their_description(tmp_path):
    (tmp_path / "a.tar").write_bytes(kinds.as_tar(kinds.webdataset_members(texts("clip"))))
    assert texts_in(tmp_path / "a.tar") == texts("clip")
    assert texts_in(tmp_path / "a.tar", field_given=True) == ["of the description"] * 3


@pytest.fixture
def server(tmp_path):
    """An address of the folder, from a server that hands out whole files only."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    handler = partial(Quiet, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.csv"])
def test_addresses_are_read_as_streams(tmp_path, server, name):
    _, suffix, *packing = name.split(".")
    content = PACKERS["." + packing[0] if packing else ""](WRITERS[suffix](texts(name)))
    (tmp_path / name).write_bytes(content)
    assert texts_in(f"{server}/{name}?signature=x") == texts(name)


def test_folders_and_globs_of_an_object_store(everything):
    fsspec = pytest.importorskip("fsspec", reason="the package fsspec is not installed")
    memory = fsspec.filesystem("memory")
    try:
        for name in ("in/a.txt", "in/deep/b.jsonl", "in/c.pdf", "in/.hidden.txt"):
            content = kinds.as_lines(["lines"]) if name.endswith("l") else name.encode()
            memory.pipe(f"/{name}", content)
        documents, said = found("memory://in")
        assert documents == {"a.txt": "in/a.txt", "deep/b.jsonl#1": "lines"}
        assert said == ["ignored: 1 files of other kinds (.pdf)"]
        assert texts_in("memory://in/*.txt") == ["in/a.txt"]
    finally:
        memory.rm("/in", recursive=True)


def test_a_broken_connection_is_made_again_where_it_was(monkeypatch):
    fsspec = pytest.importorskip("fsspec", reason="the package fsspec is not installed")
    content = kinds.as_lines([f"text {i}" for i in range(2000)])
    memory = fsspec.filesystem("memory")
    memory.pipe("/flaky.jsonl", content)
    monkeypatch.setattr(opening, "_FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(opening, "_BUFFER_BYTES", 1000)
    opened, breaks = memory.open, []

    class Breaking:
        def __init__(self, file):
            self.file = file

        def read(self, size):
            if len(breaks) < 7 and self.file.tell() > 5000 * len(breaks):
                breaks.append(self.file.tell())
                raise OSError("connection reset")
            return self.file.read(size)

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr(type(memory), "open", lambda self, *a, **k: Breaking(opened(*a, **k)))
    try:
        assert texts_in("memory://flaky.jsonl") == [f"text {i}" for i in range(2000)]
        assert len(breaks) == 7
    finally:
        memory.rm("/flaky.jsonl")


def test_rows_that_are_no_text_are_counted_and_the_others_taken(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"id,text\n1,good\n2,b\xffad\n3\n4,also good\n")
    documents, said = found(tmp_path / "a.csv")
    assert documents == {"a.csv#1": "good", "a.csv#4": "also good"}
    assert "2 rows skipped, the first is row 2 (has half of a surrogate pair" in said[0]
    raw = kinds.pyarrow.array([b"good", b"b\xffad", None, b"more"]).cast("string", safe=False)
    kinds.pyarrow.parquet.write_table(kinds.pyarrow.table({"text": raw}), tmp_path / "b.parquet")
    documents, said = found(tmp_path / "b.parquet")
    assert documents == {"b.parquet#0": "good", "b.parquet#3": "more"}
    assert "2 rows skipped, the first is row 1 (not UTF-8 at byte 1)" in said[0]


def test_kinds_follow_from_names():
    assert source.kind_by_name("A.JSONL.GZ") == ("lines", "gz")
    assert source.kind_by_name("x.tar.zst") == ("tar", "zst") == source.kind_by_name("x.tzst")
    assert source.kind_by_name("part.0000.gz") is None and source.kind_by_name("v1.5") is None
    assert source.is_url("S3://bucket") and not source.is_url("a:b")
