"""Text from outside in one line of a message: names, values, and what libraries say.

    printable(name)         whole, with what a terminal would obey or hide spelled out
    cut(name)               the same, cut to a length
    shown(value)            a value as Python writes it, cut
    shorten(error)          what a library says: white space folded into single blanks, cut
    one_line(what, name)    refuses a name that is not one line of plain text

Whatever its size, a value costs about as much as the part of it that is shown.
"""

from __future__ import annotations

import itertools
import reprlib
import unicodedata
from typing import Any

from ebwm_scale.core.errors import ConfigError

LENGTH = 80  # characters of a value in a message
_NOT_PLAIN = {
    "Cc": "the control character",  # newline, tab, escape, 0x80 to 0x9F
    "Zl": "the line separator",
    "Zp": "the paragraph separator",
    "Cs": "the byte, which is no UTF-8,",  # how Python stands in for it
}


def printable(text: object) -> str:
    """The text on one line: each character that is not printable is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def cut(text: object, length: int = LENGTH) -> str:
    """The text as `printable` gives it, at most `length` characters; an ellipsis where it ends."""
    part = printable(str(text)[: length + 1])
    return part if len(part) <= length else f"{part[: length - 3]}..."


def shown(value: object, length: int = LENGTH) -> str:
    """A value as Python writes it, at most `length` characters."""
    return cut(_Repr(length).repr(value), length)


def shorten(text: object, length: int = LENGTH) -> str:
    """The text with all its white space folded into single blanks, at most `length` characters."""
    return cut(" ".join(str(text)[: 4 * length].split()), length)


def one_line(what: str, value: object) -> str:
    """`value` as text; ConfigError if it holds a character that would begin another line, or that a
    terminal would obey."""
    text = str(value)
    for character in text:
        kind = _NOT_PLAIN.get(unicodedata.category(character))
        if kind is not None:
            raise ConfigError(
                f"{what} is {shown(text)}: it holds {kind} {character!r}, and must be one line of "
                "plain text; name it otherwise"
            )
    return text


class _Repr(reprlib.Repr):
    """repr() without what lies beyond the first `length` characters of the result."""

    def __init__(self, length: int):
        super().__init__()
        self.length = length
        self.maxlevel = 20
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = length
        self.maxlong = self.maxother = 4 * length  # these two are shortened in the middle

    def repr_str(self, x: str, level: int) -> str:
        return repr(x[: self.length])

    def repr_bytes(self, x: bytes, level: int) -> str:
        return repr(x[: self.length])

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        """In the order of its keys; reprlib would sort them."""
        if level <= 0:
            return "{...}"
        items = itertools.islice(x.items(), self.maxdict)
        pieces = [f"{self.repr1(k, level - 1)}: {self.repr1(v, level - 1)}" for k, v in items]
        return "{" + ", ".join(pieces) + "}"
