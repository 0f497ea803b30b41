"""Names that end up in job scripts, file names and on terminals: one line of text, without control
characters."""

from __future__ import annotations

import unicodedata

from ebwm_scale.core.errors import ConfigError

SHOWN = 80
NOT_PLAIN = {
    "Cc": "the control character",  # newline, tab, escape, 0x80 to 0x9F
    "Zl": "the line separator",
    "Zp": "the paragraph separator",
    "Cs": "the byte, which is no UTF-8,",  # how Python stands in for it
}


def one_line(what: str, value: object) -> str:
    """`value` as text; ConfigError if it holds a character that would begin another line, or that a
    terminal would obey."""
    text = str(value)
    for character in text:
        kind = NOT_PLAIN.get(unicodedata.category(character))
        if kind is not None:
            raise ConfigError(
                f"{what} is {shown(text)}: it holds {kind} {character!r}, and must be one line of "
                "plain text; name it otherwise"
            )
    return text


def shown(value: object) -> str:
    """A value for a message: quoted, on one line, and cut."""
    quoted = repr(value)
    return quoted if len(quoted) <= SHOWN else f"{quoted[:SHOWN]}..."


def printable(text: str) -> str:
    """Text from a file for a terminal: what a terminal would obey is spelled out."""
    return "".join(
        repr(character)[1:-1] if unicodedata.category(character) in NOT_PLAIN else character
        for character in text
    )
