"""Text from outside stands in one line of a message: printable, of bounded length, told apart."""

import sys

import pytest

from ebwm_scale.core.disk import replacement
from ebwm_scale.core.plain_text import cut, printable, shorten, shown

OUTSIDE = ["\n", "\x1b[2J", "\0", "\u2028", "\udcff", "\u202e", "\u200b"]


@pytest.mark.parametrize("text", OUTSIDE, ids=ascii)
@pytest.mark.parametrize("function", [printable, cut, shown, shorten])
def test_what_a_terminal_would_obey_or_hide_is_spelled_out(function, text):
    result = function(f"a{text}b")
    assert result.isprintable() and "a" in result and "b" in result


@pytest.mark.parametrize(
    "value", [None, True, 3, 0.1, "x", b"x", "it's", [1, [2, "y"]], (1,), {"b": 1, "a": {"c": []}}]
)
def test_a_value_that_fits_is_shown_as_python_writes_it(value):
    assert shown(value) == repr(value)


@pytest.mark.parametrize(
    "value", ["x" * 10**6, list(range(10**5)), {i: [i] * 50 for i in range(10**4)}, [["y" * 200]]]
)
def test_a_large_value_is_its_beginning_and_an_ellipsis(value):
    expected = repr(value)[:77] + "..."
    assert shown(value) == cut(repr(value)) == expected and len(expected) == 80


def test_a_value_that_is_deeper_than_the_interpreter_goes_is_shown():
    deep = []
    for _ in range(2 * sys.getrecursionlimit()):
        deep = [deep]
    assert shown(deep).startswith("[[[[[[[[[[")


def test_what_a_library_says_loses_its_line_breaks():
    assert shorten("no such\n   key:\t'a'\n") == "no such key: 'a'"
    assert shorten("word " * 1000, 20) == "word word word wo..."


def test_a_file_is_replaced_whole_or_stays_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacement(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with replacement(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
