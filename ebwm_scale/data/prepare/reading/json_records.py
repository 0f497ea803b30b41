"""JSON: a record a line (.jsonl), or one list of records, or records one after the other (.json).

A list is taken apart while it is read: one record is in memory, not the file.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from ebwm_scale.core.errors import DataError
from ebwm_scale.data.prepare.reading.left_out import LeftOut
from ebwm_scale.data.prepare.reading.opening import label, open_source
from ebwm_scale.data.prepare.reading.selection import Selection
from ebwm_scale.data.prepare.reading.source import Source
from ebwm_scale.data.prepare.reading.taking import Document, Taker, text_of_bytes

_CHUNK_BYTES = 2**18
_BLANK = re.compile(r"[ \t\r\n]*")


def read_lines(source: Source, selection: Selection, left_out: LeftOut) -> Iterator[Document]:
    """A record a line, of the lines that begin in the source's part."""
    taker = Taker(source, selection, left_out, "lines")
    with open_source(source) as stream:
        for where, line in _lines(stream, source.part):
            if not line.strip():
                continue
            try:
                record = _parsed(text_of_bytes(line))
            except ValueError as error:
                taker.bad(where, str(error))
                continue
            document = taker.record(where, record)
            if document is not None:
                yield document
    taker.finish()


def _lines(stream: BinaryIO, part: tuple[int, int] | None) -> Iterator[tuple[str, bytes]]:
    """(where, line): by number, or in a part by the byte at which it begins."""
    if part is None or part[0] == 0:
        offset = 0
        for number, line in enumerate(stream, start=1):
            if part is not None and offset >= part[1]:
                return
            offset += len(line)
            yield str(number), line
        return
    first, end = part
    stream.seek(first - 1)
    # A line that begins before this part is the other part's, wherever it ends.
    offset = first - 1 + len(stream.readline())
    while offset < end:
        line = stream.readline()
        if not line:
            return
        yield f"at byte {offset}", line
        offset += len(line)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    except ValueError:
        raise ValueError("not JSON") from None


def read_json(source: Source, selection: Selection, left_out: LeftOut) -> Iterator[Document]:
    """The items of a list, or objects that follow each other."""
    taker = Taker(source, selection, left_out, "records")
    number = 0
    try:
        with open_source(source) as stream:
            for number, record in enumerate(_values(stream), start=1):
                document = taker.record(str(number), record)
                if document is not None:
                    yield document
    except ValueError as error:
        if not number:
            raise
        raise DataError(
            f"{label(source)}: {error}, behind {number} records: truncated or damaged; copy it "
            "again, or leave it out"
        ) from None
    taker.finish()


def _values(stream: BinaryIO) -> Iterator[Any]:
    """The values; ValueError where the file stops being JSON."""
    window = _Window(stream)
    window.skip_blanks()
    is_list = window.peek() == "["
    if is_list:
        window.take()
        window.skip_blanks()
        if window.peek() == "]":
            window.take()
            window.refuse_more()
            return
    elif window.peek() != "{":
        raise ValueError("not a list of records, nor records that follow each other")
    while True:
        yield window.value()
        window.skip_blanks()
        separator = window.peek()
        if is_list and separator == "]":
            window.take()
            window.refuse_more()
            return
        if is_list and separator != ",":
            found = repr(separator) if separator else "its end"
            raise ValueError(f"not JSON at character {window.position}: {found} in the list")
        if not separator:
            return
        if is_list:
            window.take()
            window.skip_blanks()


class _Window:
    """The part of a text that is being parsed."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._parser = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._before = 0  # characters that have left the window
        self._is_last = False

    @property
    def position(self) -> int:
        return self._before + self._at

    def peek(self) -> str:
        """The next character; nothing at the end."""
        while self._at == len(self._text) and not self._is_last:
            self._more(_CHUNK_BYTES)
        return self._text[self._at : self._at + 1]

    def take(self) -> None:
        self._at += 1

    def skip_blanks(self) -> None:
        while self.peek():
            match = _BLANK.match(self._text, self._at)
            self._at = match.end() if match else self._at
            if self._at < len(self._text):
                return

    def refuse_more(self) -> None:
        self.skip_blanks()
        if self.peek():
            raise ValueError(f"not JSON at character {self.position}: text behind the list")

    def value(self) -> Any:
        """The next value. The window grows by doubling until the value is whole."""
        size = _CHUNK_BYTES
        while True:
            problem = None
            try:
                value, end = self._parser.raw_decode(self._text, self._at)
            except RecursionError:
                raise ValueError("JSON nested too deeply") from None
            except ValueError as error:
                problem = error
            else:
                # A number at the edge of the window may go on behind it.
                if end < len(self._text) or self._is_last:
                    self._at = end
                    return value
            if self._is_last:
                raise ValueError(f"not JSON at character {self.position} ({problem})") from None
            self._more(size)
            size *= 2

    def _more(self, size: int) -> None:
        """Another piece of the file; what was parsed leaves the window."""
        content = self._stream.read(size)
        self._is_last = not content
        try:
            text = self._decoder.decode(content, final=self._is_last)
        except UnicodeDecodeError:
            raise ValueError("not UTF-8") from None
        self._before += self._at
        self._text = self._text[self._at :] + text
        self._at = 0
