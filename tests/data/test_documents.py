"""What is found in folders of text, and that nothing is left out in silence."""

import json

import pytest
from corpora import found

from ebwm_scale.core.errors import DataError


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return folder


def test_text_in_linked_folders_is_found(tmp_path):
    write(tmp_path, {"in/a.txt": "one", "out/b.txt": "two", "out/c.jsonl": '{"text": "three"}'})
    (tmp_path / "in" / "part").symlink_to(tmp_path / "out")
    expected = {"a.txt": "one", "part/b.txt": "two", "part/c.jsonl#1": "three"}
    assert found(tmp_path / "in") == (expected, [])


def test_a_cycle_of_linked_folders_is_refused(tmp_path):
    write(tmp_path, {"a.txt": "one"})
    (tmp_path / "back").symlink_to(tmp_path)
    with pytest.raises(DataError, match="back: a link to .* that leads back"):
        found(tmp_path)


@pytest.mark.parametrize(
    "names, line",
    [
        (
            ["a.jsonl.lz4", "b.pdf", "c.npy"],
            "ignored: 3 files of other kinds (.jsonl.lz4, .npy, .pdf)",
        ),
        (["x/a.pdf", "b.PDF", "c.docx"], "ignored: 3 files of other kinds (.pdf x 2, .docx)"),
        (["README", "v1.5 final"], "ignored: 2 files of other kinds (no suffix x 2)"),
        (
            ["part.00000.gz", "part.00001.gz", "a.zip"],
            "ignored: 3 files of other kinds (.gz x 2, .zip)",
        ),
        (
            [f"a.k{i:02d}" for i in range(14)],
            (
                "ignored: 14 files of other kinds (.k00, .k01, .k02, .k03, .k04, .k05, .k06, .k07, "
                ".k08, .k09, and 4 other kinds)"
            ),
        ),
    ],
)
def test_files_of_other_kinds_are_counted_by_kind(tmp_path, names, line):
    write(tmp_path / "in", dict.fromkeys(names, b"\x1f\x8b"))
    with pytest.raises(DataError) as error:
        found(tmp_path / "in")
    assert "no text found" in str(error.value)
    assert line.removeprefix("ignored: ") in str(error.value)
    write(tmp_path / "in", {"good.txt": "good"})
    assert found(tmp_path / "in") == ({"good.txt": "good"}, [line])


JSON_LIST = json.dumps([{"text": "first"}, {"text": "second"}])


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.data", JSON_LIST),
        ("a", "\ufeff \n" + JSON_LIST),
        ("a", '{"text": "x"}\n{"text": "y"}\n'),
        ("a.dump", "[" * 100_000),
        ("a.gz", b"\x1f\x8b"),
        ("a.zip", b"PK"),
        ("a.pkl", b"\x80"),
    ],
)
def test_a_named_file_of_another_kind_is_refused_and_never_one_document(tmp_path, name, content):
    write(tmp_path, {name: content, "good.txt": "good"})
    with pytest.raises(DataError, match=f"{name}: .* is not read.*one document") as error:
        found(tmp_path / name, tmp_path / "good.txt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["prose", "[1] a footnote", "{curly} prose", "[unclosed"])
def test_a_named_file_without_suffix_is_one_document_of_prose(tmp_path, content):
    write(tmp_path, {"notes": content})
    assert found(tmp_path / "notes") == ({"notes": content}, [])


INVISIBLE = {
    "nothing": "",
    "white space": " \t\n\r\x0b\x0c\u00a0\u2003\u3000\u2028",
    "zero width": "\u200b\u200c\u200d\u2060\ufeff\u180e",
    "marks of direction": "\u200e\u200f\u202a\u202e\u2066\u2069\u061c",
    "fillers": "\u115f\u1160\u3164\uffa0\u2800",
    "selectors and tags": "\ufe0f\U000e0100\U000e0041\u034f\u00ad",
    "controls": "\0\x01\x1b\x7f\x85",
    "mixed": " \u200b\n\u200b ",
}


@pytest.mark.parametrize("name", INVISIBLE)
def test_documents_of_nothing_visible_are_dropped_and_counted(tmp_path, name):
    lines = [json.dumps({"text": text}) for text in (INVISIBLE[name], "seen", INVISIBLE[name])]
    write(tmp_path, {"a.jsonl": "\n".join(lines), "b.txt": INVISIBLE[name], "c.md": "seen too"})
    texts, said = found(tmp_path)
    assert texts == {"a.jsonl#2": "seen", "c.md": "seen too"}
    assert len(said) == 1 and "ignored: 3 documents of nothing but white space" in said[0]
    assert said[0].endswith("the first is a.jsonl#1")


@pytest.mark.parametrize("text", ["\u200bx", "\u0301", "1", "\U0001f600", ".", "\ue000", "日"])
def test_documents_with_anything_visible_are_kept(tmp_path, text):
    write(tmp_path, {"a.txt": text})
    assert found(tmp_path) == ({"a.txt": text}, [])


def nested(depth, opening="[", closing="]"):
    return opening * depth + closing * depth


@pytest.mark.parametrize(
    "line",
    [
        nested(100_000),
        '{"text": "x", "more": ' + nested(100_000) + "}",
        '{"text": ' + nested(50_000, '{"a": ', "}") + "}",
        "[" * 100_000,
        '{"text": "x", "n": ' + "1" * 10_000 + "}",
    ],
    ids=["list", "beside the text", "objects", "unclosed", "long number"],
)
def test_a_line_that_cannot_be_parsed_is_named_and_the_others_are_taken(tmp_path, line):
    write(tmp_path, {"a.jsonl": '{"text": "one"}\n' + line + '\n{"text": "three"}\n'})
    texts, said = found(tmp_path)
    assert texts == {"a.jsonl#1": "one", "a.jsonl#3": "three"}
    assert len(said) == 1 and "1 lines skipped, the first is line 2" in said[0]
    assert len(said[0]) < 300


def test_names_that_are_not_text_are_shown_in_one_line(tmp_path):
    write(tmp_path, {"good.txt": "good", "two\nlines.txt": b"\xff"})
    (tmp_path / b"\xff.txt".decode(errors="surrogateescape")).write_bytes(b"\xff")
    texts, said = found(tmp_path)
    assert list(texts) == ["good.txt"] and len(said) == 2
    assert all("\n" not in line and line.encode("utf-8") for line in said)
