"""What cannot be read is one line that says what and where, and nothing is left of it."""

import gzip
import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from corpora import found, read_documents

pytest.importorskip("zstandard", reason="the package zstandard is not installed")

import kinds_of_text as kinds
import pyarrow
from kinds_of_text import PACKERS, WRITERS, texts

from ebwm_scale.core.errors import DataError
from ebwm_scale.data.prepare.reading import opening
from ebwm_scale.data.prepare.reading.selection import Selection, parse_filter

TOOLS = Path(__file__).parents[2] / "tools"


def refused(*inputs, **selected):
    with pytest.raises(DataError) as error:
        read_documents(*inputs, selection=Selection(**selected))
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    return message


def lists(path):
    table = pyarrow.table({"id": [1, 2], "text": [["a"], ["b", "c"]], "m": [{"p": ["x"]}] * 2})
    pyarrow.parquet.write_table(table, path)
    return path


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "feather", "csv", "tsv", "json", "jsonl"])
def test_a_file_without_the_field_names_the_fields_there_are(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(WRITERS[suffix](texts("a")))
    message = refused(path, field="content.body")
    assert f"a.{suffix}: " in message and 'no field "content.body"' in message
    assert "id, text" in message or "it has text" in message
    assert "--field" in message


def test_a_field_that_is_a_list_is_refused_by_name(tmp_path):
    path = lists(tmp_path / "a.parquet")
    assert 'its field "text" is list<' in refused(path) and "not a text" in refused(path)
    assert 'its field "m.p" is list<' in refused(path, field="m.p")
    assert 'its field "id" is int64, not a text' in refused(path, field="id")
    assert 'no field "m.q"' in refused(path, field="m.q")
    (tmp_path / "b.jsonl").write_text('{"text": ["a"]}\n{"text": "b"}\n{"text": {"c": 1}}\n')
    documents, said = found(tmp_path / "b.jsonl")
    assert documents == {"b.jsonl#2": "b"}
    assert '2 lines skipped, the first is line 1 (its field "text" is a list' in said[0]


@pytest.mark.parametrize("packing", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "txt"])
def test_a_truncated_file_is_refused_wherever_it_is_cut(tmp_path, packing, suffix):
    content = b"".join(kinds.as_lines([f"{i * i} text"]) for i in range(500))
    if suffix == "csv":
        content = kinds.as_table([f"{i * i} text" for i in range(500)])
    packed = PACKERS[packing](content)
    path = tmp_path / f"a.{suffix}{packing}"
    for size in (len(packed) - 1, len(packed) - 9, len(packed) // 3, 13):
        path.write_bytes(packed[:size])
        message = refused(path)
        assert f"a.{suffix}{packing}: ends in the middle of its {packing} data" in message, size


@pytest.mark.parametrize("packing", [".gz", ".bz2", ".xz", ".zst"])
def test_what_is_not_packed_as_its_name_says_is_refused(tmp_path, packing):
    (tmp_path / f"a.txt{packing}").write_bytes(b"prose that nobody packed " * 100)
    assert f"its {packing} data are damaged" in refused(tmp_path / f"a.txt{packing}")


@pytest.mark.parametrize("suffix", ["parquet", "feather", "arrow"])
def test_cut_and_damaged_tables_are_refused(tmp_path, suffix):
    content = WRITERS[suffix](texts("a", 200))
    path = tmp_path / f"a.{suffix}"
    for size in (len(content) // 2, 40):
        path.write_bytes(content[:size])
        assert f"a.{suffix}: " in refused(path) and "copy it again" in refused(path)


def test_a_cut_list_and_an_open_quote_are_refused(tmp_path):
    whole = kinds.as_json(texts("a"))
    (tmp_path / "a.json").write_bytes(whole[:-20])
    assert "a.json: not JSON at character" in refused(tmp_path / "a.json")
    assert "behind 2 records: truncated" in refused(tmp_path / "a.json")
    (tmp_path / "b.json").write_bytes(whole + b"]")
    assert "text behind the list" in refused(tmp_path / "b.json")
    (tmp_path / "c.csv").write_text('text\ngood\n"open\nand on\n')
    assert "c.csv: line 4: not a table of this kind" in refused(tmp_path / "c.csv")
    (tmp_path / "d.csv").write_text("text,text\na,b\n")
    assert 'has the field "text" twice' in refused(tmp_path / "d.csv")
    (tmp_path / "e.tar").write_bytes(kinds.as_tar({"a.txt": b"a" * 2000})[:1500])
    assert "the archive ends where" in refused(tmp_path / "e.tar")


def test_json_that_is_no_text_is_named_and_left_out_of_a_folder(tmp_path):
    (tmp_path / "config.json").write_text('{"layers": 3}')
    (tmp_path / "number.json").write_text("3")
    (tmp_path / "labels.csv").write_text("name,label\na,1\n")
    (tmp_path / "a.txt").write_text("prose")
    documents, said = found(tmp_path)
    assert documents == {"a.txt": "prose"} and len(said) == 3
    assert "config.json: 1 records skipped" in said[0] and "it has layers" in said[0]
    assert "labels.csv: skipped: no field" in said[1] and "it has name, label" in said[1]
    assert "number.json: skipped: not a list of records" in said[2]


@pytest.mark.parametrize(
    "url, said",
    [
        ("http://127.0.0.1:9/a.jsonl", "cannot be read (.*check the address"),
        ("s3://key:secret@bucket/a.parquet", "needs the package s3fs"),
        ("nowhere://bucket/a.parquet", "no such kind of address"),
        ("memory://nothing/here.txt", "cannot be read"),
        ("memory://nothing/*.txt", "no file there"),
    ],
)
def test_addresses_that_cannot_be_read_are_named_without_their_secrets(url, said, monkeypatch):
    import re

    if url.startswith("s3"):  # installed or not, loaded by another test or not
        loaded = pytest.importorskip(
            "fsspec.registry", reason="the package fsspec is not installed"
        )
        monkeypatch.delitem(loaded._registry, "s3", raising=False)
        monkeypatch.setitem(sys.modules, "s3fs", None)
    message = refused(url)
    assert re.search(said.replace("(", "\\("), message), message
    assert "secret" not in message


def test_a_library_that_quotes_a_part_of_an_address_gives_no_secret_away(monkeypatch):
    fsspec = pytest.importorskip("fsspec", reason="the package fsspec is not installed")
    pytest.importorskip("s3fs", reason="s3:// needs the package s3fs")
    message = refused("s3://AKIAKEY:hunter2@bucket/a.parquet")  # no name of a bucket to boto
    assert "cannot be read (ParamValidationError" in message
    assert "AKIAKEY" not in message and "hunter2" not in message

    def fail(self, path, **options):
        raise OSError("no login AKIA:hun/ter2 at AKIA:hun%2Fter2")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "info", fail)
    message = refused("memory://AKIA:hun%2Fter2@bucket/a.txt")
    assert "OSError: no login *** at ***" in message


def test_missing_credentials_are_one_line(monkeypatch):
    fsspec = pytest.importorskip("fsspec", reason="the package fsspec is not installed")
    memory = fsspec.filesystem("memory")

    class NoCredentialsError(Exception):
        pass

    def fail(self, path, **options):
        raise NoCredentialsError("Unable to locate\ncredentials")

    monkeypatch.setattr(type(memory), "info", fail)
    message = refused("memory://bucket/a.txt")
    assert "NoCredentialsError: Unable to locate credentials" in message
    assert "check the address, the network and the credentials" in message


@pytest.mark.parametrize(
    "package, name", [("pyarrow", "parquet"), ("zstandard", "jsonl.zst"), ("pyarrow", "arrow")]
)
def test_a_missing_package_is_named_with_its_pip_line(tmp_path, monkeypatch, package, name):
    suffix, _, packing = name.partition(".")
    content = PACKERS["." + packing if packing else ""](WRITERS[suffix](texts("a")))
    (tmp_path / f"a.{name}").write_bytes(content)
    for module in [m for m in sys.modules if m.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, module, None)
    assert f"python -m pip install {package}" in refused(tmp_path / f"a.{name}")


@pytest.mark.parametrize(
    "text, said",
    [
        ("lang", "must be FIELD OPERATION VALUE"),
        ("lang ~ en", "must be FIELD OPERATION VALUE"),
        ("lang in en", "takes a JSON list"),
        ("score > [1]", "compares numbers or texts, not a list"),
    ],
)
def test_what_is_no_filter_is_refused(text, said):
    with pytest.raises(DataError, match="filter") as error:
        parse_filter(text)
    assert said in str(error.value)


def test_a_filter_that_does_not_fit_the_values_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "score": "high"}\n')
    message = refused(tmp_path / "a.jsonl", filters=(parse_filter("score > 0.5"),))
    assert "a record has score = 'high', a text, which does not compare with 0.5" in message
    lists(tmp_path / "b.parquet")
    message = refused(tmp_path / "b.parquet", field="id", filters=(parse_filter("no == 1"),))
    assert "not a text" in message or 'no field "no"' in message


def write_bad_inputs(folder):
    lists(folder / "list.parquet")
    (folder / "fields.parquet").write_bytes(WRITERS["parquet"](texts("a")))
    (folder / "cut.jsonl.zst").write_bytes(PACKERS[".zst"](kinds.as_lines(texts("a", 50)))[:-5])
    (folder / "cut.txt.gz").write_bytes(gzip.compress(b"text " * 50)[:-5])
    (folder / "empty.jsonl").write_text(json.dumps({"body": "x"}))


@pytest.mark.parametrize("name", ["list.parquet", "cut.jsonl.zst", "cut.txt.gz", "empty.jsonl"])
@pytest.mark.parametrize("tool", ["make_text_shards", "train_tokenizer"])
def test_the_tools_say_it_in_one_line_and_leave_nothing(tmp_path, name, tool):
    (tmp_path / "in").mkdir()
    write_bad_inputs(tmp_path / "in")
    options = {
        "make_text_shards": ("--tokenizer", "bytes", "--context-length", "16"),
        "train_tokenizer": ("--vocabulary-size", "300"),
    }[tool]
    command = [sys.executable, TOOLS / f"{tool}.py", tmp_path / "in" / name, "--output"]
    done = subprocess.run(
        [*command, tmp_path / "out", *options], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and done.stdout == "", done
    assert len(done.stderr.splitlines()) == 1 and name in done.stderr, done
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def said_by_make_text_shards(arguments, monkeypatch, capsys):
    """The one line of the tool, in this process; it ends with exit code 2 and leaves nothing."""
    before = sorted(Path().rglob("*"))
    monkeypatch.setattr(sys, "argv", ["make_text_shards.py", *map(str, arguments)])
    tool = importlib.machinery.SourceFileLoader("tool", str(TOOLS / "make_text_shards.py"))
    spec = importlib.util.spec_from_loader("tool", tool)
    module = importlib.util.module_from_spec(spec)
    tool.exec_module(module)
    assert module.main() == 2
    output, errors = capsys.readouterr()
    assert output == "" and len(errors.splitlines()) == 1, errors
    assert sorted(Path().rglob("*")) == before
    return errors


@pytest.fixture
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    write_bad_inputs(Path("in"))


BUILD = ["--output", "out", "--context-length", "16"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["in/fields.parquet", "--field", "body"], 'no field "body"; it has id, text'),
        (["in/list.parquet"], 'its field "text" is list<'),
        (["in/list.parquet", "--field", "m.p"], 'its field "m.p" is list<'),
        (["in/cut.jsonl.zst"], "ends in the middle of its .zst data"),
        (["http://127.0.0.1:9/a.parquet"], "cannot be read"),
        (["in/cut.txt.gz", "--tokenizer", "code"], "a tokenizer that needs code of its own"),
    ],
)
def test_each_bad_input_is_one_line_of_the_tool(in_a_folder, monkeypatch, capsys, arguments, said):
    Path("code").mkdir()
    Path("code", "tokenization_x.py").write_text("raise SystemExit")
    options = [*BUILD, "--tokenizer", "bytes"]
    if "--tokenizer" in arguments:
        options = BUILD
    assert said in said_by_make_text_shards([*arguments, *options], monkeypatch, capsys)


def test_a_real_client_without_credentials_is_one_line(in_a_folder, monkeypatch, capsys):
    s3fs = pytest.importorskip("s3fs", reason="s3:// needs the package s3fs")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "nowhere")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # never the network
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    arguments = ["s3://bucket/a.parquet", *BUILD, "--tokenizer", "bytes"]
    said = said_by_make_text_shards(arguments, monkeypatch, capsys)
    assert "s3://bucket/a.parquet: cannot be read (" in said and "credentials" in said
    s3fs.S3FileSystem.clear_instance_cache()


def test_zstandard_windows_of_two_gibibytes_are_allowed():
    assert opening._LARGEST_WINDOW == 2**31
