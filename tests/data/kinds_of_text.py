"""One folder with a file of every kind that is read, each with texts of its own."""

import bz2
import csv
import gzip
import io
import json
import lzma
import tarfile

import pandas
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import zstandard

PACKERS = {
    "": lambda content: content,
    ".gz": lambda content: gzip.compress(content, mtime=0),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    # two frames, as tools write them that pack in parallel
    ".zst": lambda content: b"".join(
        zstandard.compress(part)
        for part in (content[: len(content) // 2], content[len(content) // 2 :])
    ),
}


def texts(kind, number=3):
    """With quotes, separators, line ends and other scripts in them."""
    return [
        f'{kind} {i}: a "quoted", text; with\ttabs\nand lines, 日本 and \U0001f600 {i * i}\n'
        for i in range(number)
    ]


def as_lines(values):
    return "".join(json.dumps({"text": text}) + "\n" for text in values).encode()


def as_json(values):
    return json.dumps([{"text": text, "n": 1} for text in values], indent=1).encode()


def as_objects(values):
    """What is called .json and holds a record a line, as C4 does."""
    return as_lines(values)


def as_table(values, delimiter=","):
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=delimiter)
    writer.writerow(["id", "text"])
    writer.writerows([i, text] for i, text in enumerate(values))
    return stream.getvalue().encode()


def table_of(values):
    return pyarrow.table({"id": list(range(len(values))), "text": values})


def as_parquet(values):
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table_of(values), sink, row_group_size=2)
    return sink.getvalue()


def as_arrow_file(values):
    sink = io.BytesIO()
    pyarrow.feather.write_feather(table_of(values), sink, compression="lz4")
    return sink.getvalue()


def as_arrow_stream(values):
    sink = io.BytesIO()
    table = table_of(values)
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue()


def as_tar(members):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return sink.getvalue()


def webdataset_members(values):
    """As video2dataset writes them: a clip, its description, its caption."""
    members = {}
    for i, text in enumerate(values):
        members[f"{i:05d}.json"] = json.dumps({"text": "of the description", "url": "x"}).encode()
        members[f"{i:05d}.mp4"] = b"\0" * 1000
        members[f"{i:05d}.txt"] = text.encode()
    return members


WRITERS = {
    "jsonl": as_lines,
    "ndjson": as_lines,
    "json": as_json,
    "csv": as_table,
    "tsv": lambda values: as_table(values, "\t"),
    "parquet": as_parquet,
    "feather": as_arrow_file,
    "arrow": as_arrow_stream,
}


def write_one_of_everything(folder):
    """{file: its texts}, as they should be read."""
    expected = {}

    def add(name, values, content):
        expected[name] = values
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    for packing, pack in PACKERS.items():
        for suffix in ("txt", "md", "rst"):
            (text,) = texts(f"prose {suffix}{packing}", 1)
            add(f"prose/a.{suffix}{packing}", [text], pack(text.encode()))
        for suffix, write in WRITERS.items():
            values = texts(f"table {suffix}{packing}")
            add(f"tables/b.{suffix}{packing}", values, pack(write(values)))
        values = texts(f"objects {packing}")
        add(f"tables/c4.json{packing}", values, pack(as_objects(values)))
        values = texts(f"archive {packing}")
        add(f"tars/clips.tar{packing}", values, pack(as_tar(webdataset_members(values))))
    values = texts("saved by Hugging Face")
    saved = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "0"}
    add("saved/data-00000-of-00001.arrow", values, as_arrow_stream(values))
    (folder / "saved" / "state.json").write_text(json.dumps(saved))
    (folder / "saved" / "dataset_info.json").write_text("{}")
    values = texts("described")
    described = {f"{i}.json": json.dumps({"text": t}).encode() for i, t in enumerate(values)}
    add("tars/described.tgz", values, PACKERS[".gz"](as_tar(described)))
    values = texts("folder in an archive")
    members = {"notes/a.md": values[0].encode(), "b.jsonl.gz": gzip.compress(as_lines(values[1:]))}
    add("tars/folder.tar", values, as_tar(members))
    return expected


UNPACKERS = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
    ".zst": lambda content: (
        zstandard.ZstdDecompressor().stream_reader(content, read_across_frames=True).read()
    ),
}


def read_independently(name, content):
    """The texts of a file with pandas, pyarrow and tarfile, and nothing of ours."""
    stem, _, suffix = name.rpartition(".")
    if f".{suffix}" in UNPACKERS:
        return read_independently(stem, UNPACKERS[f".{suffix}"](content))
    stream = io.BytesIO(content)
    if suffix in ("txt", "md", "rst"):
        return [content.decode()]
    if suffix in ("csv", "tsv"):
        separator = {"csv": ",", "tsv": "\t"}[suffix]
        return pandas.read_csv(stream, sep=separator, keep_default_na=False)["text"].tolist()
    if suffix in ("jsonl", "ndjson", "json"):
        is_list = content.lstrip().startswith(b"[")
        table = pandas.read_json(stream, lines=not is_list, convert_dates=False)
        return table["text"].tolist()
    if suffix == "parquet":
        return pandas.read_parquet(stream)["text"].tolist()
    if suffix == "feather":
        return pyarrow.feather.read_table(stream)["text"].to_pylist()
    if suffix == "arrow":
        return pyarrow.ipc.open_stream(stream).read_all()["text"].to_pylist()
    assert suffix in ("tar", "tgz"), name
    return _read_tar_independently(stream)


def _read_tar_independently(stream):
    """Of a clip the caption, else the text of its description; else what a file holds."""
    with tarfile.open(fileobj=stream) as archive:
        members = {m.name: archive.extractfile(m).read() for m in archive.getmembers()}
    found = []
    for name, content in members.items():
        stem, _, suffix = name.rpartition(".")
        if suffix == "mp4" or (suffix == "json" and f"{stem}.txt" in members):
            continue
        if suffix == "json":
            found.append(json.loads(content)["text"])
        else:
            found += read_independently(name, content)
    return found


def read_folder_independently(folder):
    """All texts below a folder."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in ("state.json", "dataset_info.json"):
            found += read_independently(path.name, path.read_bytes())
    return found
