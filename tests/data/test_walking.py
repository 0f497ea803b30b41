import os
from pathlib import Path

import pytest

from ebwm_scale.core.errors import DataError
from ebwm_scale.data.walking import walk_files


def make(root, tree):
    """tree: {path: None (a file), or the target of a link}; folders are made on the way."""
    for name, target in tree.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if target is None:
            path.write_text(name)
        else:
            path.symlink_to(str(target).replace("ROOT", str(root)))


def walked(root, **options):
    said = []
    names = [
        p.relative_to(root).as_posix() for p in walk_files(root, report=said.append, **options)
    ]
    return names, said


TREES = {
    "plain": ({"b.txt": None, "a/x.txt": None, "a.txt": None}, ["a/x.txt", "a.txt", "b.txt"]),
    "linked folder": (
        {"out/part/x.txt": None, "in/a.txt": None, "in/part": "ROOT/out/part"},
        ["a.txt", "part/x.txt"],
    ),
    "relative link": ({"out/x.txt": None, "in/part": "../out"}, ["part/x.txt"]),
    "two links to one folder": (
        {"out/x.txt": None, "in/b": "ROOT/out", "in/a": "ROOT/out"},
        ["a/x.txt"],
    ),
    "a link never renames what is there anyway": (
        {"in/zz/deep/x.txt": None, "in/aa": "zz/deep"},
        ["zz/deep/x.txt"],
    ),
    "linked folders in linked folders": (
        {"out1/x.txt": None, "out2/y.txt": None, "out1/next": "ROOT/out2", "in/first": "ROOT/out1"},
        ["first/next/y.txt", "first/x.txt"],
    ),
    "a folder inside a linked one and linked itself": (
        {"out/deep/x.txt": None, "in/b": "ROOT/out/deep", "in/a": "ROOT/out"},
        ["a/deep/x.txt"],
    ),
    "linked files": ({"out/x.txt": None, "in/y.txt": "ROOT/out/x.txt"}, ["y.txt"]),
    "hidden": ({"in/.h/x.txt": None, "in/.y.txt": None, "in/a.txt": None}, ["a.txt"]),
    "a link into a hidden folder": ({"in/.h/x.txt": None, "in/seen": ".h"}, ["seen/x.txt"]),
}


@pytest.mark.parametrize("name", TREES)
def test_files_are_found_once_in_the_order_of_their_paths(tmp_path, name):
    tree, expected = TREES[name]
    make(tmp_path / "tree", tree)
    root = tmp_path / "tree"
    if (root / "in").exists():
        root = root / "in"
    assert walked(root) == (expected, [])
    (tmp_path / "linked_root").symlink_to(root)
    assert walked(tmp_path / "linked_root") == (expected, [])


def test_the_order_is_the_one_that_datasets_were_made_in(tmp_path):
    make(tmp_path, dict.fromkeys(("a b/x", "a/y", "a.d/z", "B/x", "a-/x", "é/x", "z")))
    before = [
        p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*")) if p.is_file()
    ]
    assert walked(tmp_path)[0] == before and len(before) == 7


def test_hidden_files_are_found_when_asked_for(tmp_path):
    make(tmp_path, {".h/x.txt": None, ".y.txt": None})
    assert walked(tmp_path, hidden=True)[0] == [".h/x.txt", ".y.txt"]


CYCLES = {
    "to itself": {"a.txt": None, "deep/back": "."},
    "to a parent": {"deep/er/back": "ROOT/in"},
    "to above the root": {"back": "ROOT"},
    "to the root of the disk": {"back": "/"},
    "two folders to each other": {"p/back": "../q", "q/forth": "../p"},
    "through the outside": {
        "part": "ROOT/out",
        "../out/back": "ROOT/in/deep",
        "deep/in": "ROOT/out",
    },
    "outside alone": {"part": "ROOT/out", "../out/deep/back": "ROOT/out"},
    "from outside to above the root": {"part": "ROOT/out", "../out/back": "ROOT"},
    "a link to itself": {"back": "back"},
    "links to each other": {"back": "forth", "forth": "back"},
}


@pytest.mark.parametrize("name", CYCLES)
def test_a_cycle_of_links_is_refused_and_named(tmp_path, name):
    (tmp_path / "in").mkdir()
    for path, target in CYCLES[name].items():
        make(tmp_path, {f"in/{path}": target})
    with pytest.raises(DataError, match=r"(back|forth|part/back|in): a link .*remove") as error:
        list(walk_files(tmp_path / "in"))
    assert "\n" not in str(error.value)


def test_what_cannot_be_walked_is_said_with_its_number(tmp_path):
    make(tmp_path, {"a.txt": None, "gone1": "nowhere", "gone2": "nowhere/else"})
    os.mkfifo(tmp_path / "pipe")
    names, said = walked(tmp_path)
    assert names == ["a.txt"] and len(said) == 2
    assert "2 x link or file that cannot be reached (No such file or directory)" in said[0]
    assert "gone1" in said[0] and "1 x pipe, socket or device" in said[1]


def test_a_folder_that_cannot_be_listed_is_said(tmp_path, monkeypatch):
    make(tmp_path, {"a.txt": None, "closed/b.txt": None})
    listdir = os.listdir

    def refuse(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)  # the tests may run as root, who may list anything
    names, said = walked(tmp_path)
    assert names == ["a.txt"]
    assert "1 x folder that cannot be listed (Permission denied)" in said[0]
    assert said[0].endswith("closed")


def test_deep_folders_do_not_exhaust_the_stack(tmp_path):
    folders = [tmp_path]
    for _ in range(1200):
        folders.append(folders[-1] / "d")
        folders[-1].mkdir()
    (folders[-1] / "x.txt").write_text("x")
    assert len(walked(tmp_path)[0]) == 1
    (folders[-1] / "x.txt").unlink()
    for folder in reversed(folders[1:]):  # what removes the folders of tests is recursive
        folder.rmdir()
